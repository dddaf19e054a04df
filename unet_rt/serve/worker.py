"""A process that computes: jobs come in as lines of JSON, answers go out so. Its end is its own and not the service's.

``python -m unet_rt.serve.worker`` with the settings as its one argument; whoever starts it holds the pipes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.engine import Engine
from ..engine.load import load
from ..errors import EngineError, ServiceError, UnetRtError, size_text
from ..images.reading import Reading
from ..prediction.predict import predict
from ..prediction.report import RunReport
from ..system.json import from_json
from .failures import failure
from .job import Job


class Cancelled(Exception):
    """Nobody waits for the result any more."""


def main() -> int:
    """Loads the engines, says so, and answers job after job until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the service, which closes the pipe
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    asked = json.loads(sys.argv[1])

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    with ExitStack() as engines:
        try:
            loaded = {
                name: engines.enter_context(load(folder, threads=asked["threads"] or None))
                for name, folder in asked["engines"].items()
            }
        except UnetRtError as error:
            say(failure(error))
            return 2
        say({"versions": {name: engine.session_version for name, engine in loaded.items()}})
        for line in sys.stdin:
            job = from_json(Job, json.loads(line), where="job", error=EngineError, way_out="start the service again")
            try:
                say(answer(loaded[job.engine], job, asked))
            except Cancelled:
                say({"error": {"type": "Cancelled", "message": "cancelled"}, "status": 499})
            except Exception as error:  # noqa: BLE001 - the process goes on, and whoever asked is told
                say(failure(error))
    return 0


def answer(engine: Engine, job: Job, asked: dict[str, Any]) -> dict[str, Any]:
    """Does a job; what it made lies in its folder."""
    if job.kind == "infer":
        return _infer(engine, job)
    options = job.options
    check_image(engine, job, asked["max_px"], asked["roots"])
    if options.format in ("json", "view") and not options.out:
        from .answers import write_document

        return write_document(engine, job, _predict)
    suffix = "." + options.format.replace("json", "npy").replace("view", "npy")
    out = Path(options.out) if options.out else Path(job.folder) / f"{options.output or 'result'}{suffix}"
    report = _predict(engine, job, out)
    return {"file": str(out), "report": report.to_json()}


def check_image(engine: Engine, job: Job, max_px: int, roots: Sequence[str]) -> None:
    """Refuses, before any pixel is decoded, what is larger than allowed, and files whose headers name others elsewhere."""
    from ..images.listing import is_url
    from ..images.open import open_image

    _check_raster(Path(job.image), max_px) if not is_url(job.image) else None
    with open_image(job.image, engine.spec.contract, _reading(job), spatial=engine.spec.spatial) as source:
        px = source.planes * prod(source.shape)
        if px > max_px:
            raise too_large(source.name, (source.planes, *source.shape), max_px)
        places = [Path(os.path.realpath(root)) for root in (*roots, job.folder) if not is_url(root)]
        for file in source.files:
            if not any(Path(os.path.realpath(file)).is_relative_to(place) for place in places):
                raise ServiceError(
                    403, f"{source.name} names another file, {file.name}, outside of what this service may use"
                )


def too_large(name: str, shape: Sequence[int], max_px: int) -> ServiceError:
    return ServiceError(
        413, f"{name} declares {size_text(shape)} pixels, and {max_px:,} are taken at most; send it in parts"
    )


def _check_raster(path: Path, max_px: int) -> None:
    """PNG and its like are decoded as they are opened, so their header is read first."""
    if path.is_dir():
        return
    with path.open("rb") as stream:
        head = stream.read(24)
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 24:
        size = int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")
        if prod(size) > max_px:
            raise too_large(path.name, size, max_px)


def _reading(job: Job) -> Reading:
    return Reading(job.options.axes or None, job.options.channels or None)


def _predict(engine: Engine, job: Job, out: Path) -> RunReport:
    """One prediction as the command line makes it, to the same function with the same words."""
    from ..contract.words import parse_normalization
    from ..prediction.request import Tables

    options, reports = job.options, list[RunReport]()
    instances = options.output == "instances"
    predict(
        engine,
        job.image,
        out=out,
        output=options.output or None,  # type: ignore[arg-type]  # checked by read_options
        head=options.head or None,
        axes=options.axes or None,
        channels=options.channels or None,
        mask_values=options.mask_values,
        normalization=parse_normalization(options.normalize) if options.normalize else None,
        tables=Tables(options.min_size) if instances and options.min_size != 1 else None,
        progress=_stop_if(job.cancel),
        report=reports.append,
    )
    return reports[0]


def _stop_if(cancel: Path) -> Callable[[int, int], None]:
    def look(done: int, total: int) -> None:
        if cancel.exists():
            raise Cancelled

    return look


def _infer(engine: Engine, job: Job) -> dict[str, Any]:
    """The raw network on tensors of the graph's own axes; results in ``output-K``."""
    folder = Path(job.folder)
    dtypes = [np.dtype(port.dtype) for port in engine.spec.inputs]
    inputs = [
        np.fromfile(folder / f"input-{k}", dtype).reshape(shape)
        for k, (dtype, shape) in enumerate(zip(dtypes, job.shapes, strict=True))
    ]
    outputs = []
    for k, array in enumerate(engine.run_graph(inputs)):
        np.ascontiguousarray(array).tofile(folder / f"output-{k}")
        outputs.append({"name": engine.spec.outputs[k].name, "shape": array.shape, "dtype": array.dtype.name})
    return {"outputs": outputs}


if __name__ == "__main__":
    sys.exit(main())
