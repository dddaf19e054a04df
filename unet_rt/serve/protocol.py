"""The Open Inference Protocol, version 2, over HTTP: the raw network on tensors, for those who tile on their own."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .._version import __version__
from ..engine.spec import EngineSpec
from ..errors import ServiceError
from .job import Job
from .service import Service

DTYPES = {"float32": "FP32", "float16": "FP16", "float64": "FP64", "uint8": "UINT8"}
CUT = "Inference-Header-Content-Length"


class Protocol:
    """The protocol's routes of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        answered = self._service.answered
        routes = [
            Route("/v2", answered("v2", self.server)),
            Route("/v2/health/live", answered("v2", self.live)),
            Route("/v2/health/ready", answered("v2", self.live)),
        ]
        for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            routes += [
                Route(model, answered("v2", self.metadata)),
                Route(f"{model}/ready", answered("v2", self.ready)),
                Route(f"{model}/infer", answered("infer", self.infer), methods=["POST"]),
            ]
        return routes

    async def server(self, request: Request) -> Response:
        return JSONResponse({"name": "unet-rt", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def live(self, request: Request) -> Response:
        return Response()

    async def ready(self, request: Request) -> Response:
        self._spec(request)
        return Response()

    async def metadata(self, request: Request) -> Response:
        spec = self._spec(request)
        inputs = [
            {"name": port.name, "datatype": DTYPES[port.dtype], "shape": _shape(port.axes, port.channels, spec)}
            for port in spec.inputs
        ]
        outputs = [
            {"name": port.name, "datatype": "FP32", "shape": [-1 if a != "C" else port.channels for a in port.axes]}
            for port in spec.outputs
        ]
        named = {"name": request.path_params["name"], "versions": ["1"], "platform": f"unet-rt_{spec.backend}"}
        return JSONResponse({**named, "inputs": inputs, "outputs": outputs})

    async def infer(self, request: Request) -> Response:
        """Tensors in, tensors out, as JSON or as raw bytes behind it."""
        service, spec, name = self._service, self._spec(request), request.path_params["name"]
        with service.pool.place() as folder:
            async with service.time_limit():
                body = await service.read_body(request)
                asked, tail = _split(body, request.headers.get(CUT))
                shapes = _write_inputs(asked, tail, spec, folder)
                job = Job("infer", name, str(folder), shapes=shapes)
                answer = await service.while_there(request, service.pool.run(job))
            return _reply(asked, answer["outputs"], folder, name)

    def _spec(self, request: Request) -> EngineSpec:
        self._service.record(request.path_params["name"])
        if request.path_params.get("version", "1") != "1":
            raise ServiceError(404, f"there is no version {request.path_params['version']}; there is version 1")
        return self._service.folders[request.path_params["name"]].spec


def _shape(axes: str, channels: int, spec: EngineSpec) -> list[int]:
    space = iter(spec.sizes)
    sizes = {"N": spec.batch or -1, "C": channels}
    return [sizes[a] if a in sizes else (next(space).fixed or -1) for a in axes]


def _split(body: bytes, cut: str | None) -> tuple[dict[str, Any], memoryview]:
    """(the request, raw tensors behind it)."""
    if cut is not None and not (cut.isascii() and cut.isdigit() and int(cut) <= len(body)):
        raise ServiceError(
            400, f"{CUT}: {cut[:20]} does not lie in a body of {len(body):,} bytes; send the length of the JSON"
        )
    end = len(body) if cut is None else int(cut)
    try:
        asked = json.loads(body[:end])
    except (ValueError, RecursionError) as error:
        raise ServiceError(
            400, f"the request is no JSON ({error}); see the Open Inference Protocol, version 2"
        ) from None
    if not isinstance(asked, dict) or not isinstance(asked.get("inputs"), list):
        raise ServiceError(400, "the request holds no list of inputs; see the Open Inference Protocol, version 2")
    return asked, memoryview(body)[end:]


def _write_inputs(
    asked: dict[str, Any], tail: memoryview, spec: EngineSpec, folder: Path
) -> tuple[tuple[int, ...], ...]:
    """Writes every input to its file, and returns their shapes, in the graph's order."""
    ports = {port.name: (k, port) for k, port in enumerate(spec.inputs)}
    shapes: dict[int, tuple[int, ...]] = {}
    for tensor in asked["inputs"]:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if name not in ports:
            raise ServiceError(400, f"the engine has no input {str(name)[:40]!r}; its inputs are {', '.join(ports)}")
        k, port = ports[name]
        if k in shapes:
            raise ServiceError(400, f"input {name} is there twice; send it once")
        if tensor.get("datatype") != DTYPES[port.dtype]:
            raise ServiceError(
                400, f"input {name} is {str(tensor.get('datatype'))[:20]}, and the network takes {DTYPES[port.dtype]}"
            )
        shapes[k] = _tensor_shape(tensor, port.axes)
        dtype, count = np.dtype(port.dtype), prod(shapes[k])
        size = _parameters(tensor).get("binary_data_size")
        if size is None:
            data = _json_values(tensor, dtype).tobytes()
        else:
            if not isinstance(size, int) or not 0 <= size <= len(tail):
                raise ServiceError(
                    400, f"input {name}: binary_data_size {size} is not in the body; send all of its bytes"
                )
            data, tail = bytes(tail[:size]), tail[size:]
        if len(data) != count * dtype.itemsize:
            raise ServiceError(
                400,
                f"input {name} has {len(data):,} bytes, and its shape {list(shapes[k])} needs {count * dtype.itemsize:,}",
            )
        (folder / f"input-{k}").write_bytes(data)
    if len(shapes) != len(ports):
        raise ServiceError(400, f"the network needs the inputs {', '.join(ports)}; send all of them")
    return tuple(shapes[k] for k in range(len(ports)))


def _tensor_shape(tensor: dict[str, Any], axes: str) -> tuple[int, ...]:
    shape = tensor.get("shape")
    good = isinstance(shape, list) and len(shape) == len(axes) and all(type(n) is int and 0 < n < 2**31 for n in shape)
    if not good:
        raise ServiceError(
            400, f"shape {str(shape)[:60]} does not fit the axes {axes}; send one size per axis, above 0"
        )
    assert isinstance(shape, list)  # noqa: S101 - good
    return tuple(shape)


def _json_values(tensor: dict[str, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(tensor.get("data"), np.float64).astype(dtype).ravel()
    except (ValueError, TypeError, RecursionError):
        raise ServiceError(400, f"input {tensor['name']}: data are no numbers; send a list, or raw bytes") from None


def _parameters(record: dict[str, Any]) -> dict[str, Any]:
    found = record.get("parameters")
    return found if isinstance(found, dict) else {}


def _reply(asked: dict[str, Any], outputs: list[dict[str, Any]], folder: Path, name: str) -> Response:
    """The outputs that were asked for, each as JSON or as raw bytes."""
    binary = bool(_parameters(asked).get("binary_data_output"))
    made = {output["name"]: (k, output) for k, output in enumerate(outputs)}
    wanted: list[Any] = asked.get("outputs") or [{"name": output["name"]} for output in outputs]
    said, tail = [], b""
    for want in wanted:
        if not isinstance(want, dict) or want.get("name") not in made:
            raise ServiceError(400, f"the engine has no such output; its outputs are {', '.join(made)}")
        k, output = made[want["name"]]
        data = (folder / f"output-{k}").read_bytes()
        tensor = {"name": output["name"], "shape": output["shape"], "datatype": DTYPES[output["dtype"]]}
        if _parameters(want).get("binary_data", binary):
            tensor["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            tensor["data"] = np.frombuffer(data, output["dtype"]).tolist()
        said.append(tensor)
    document = {"model_name": name, "model_version": "1", "outputs": said}
    if isinstance(asked.get("id"), str):
        document["id"] = asked["id"]
    head = json.dumps(document).encode()
    if not tail:
        return Response(head, media_type="application/json")
    return Response(head + tail, media_type="application/octet-stream", headers={CUT: str(len(head))})
