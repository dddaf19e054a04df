"""ONNX Runtime: the baseline everywhere, and an engine on CPUs and NVIDIA GPUs (those in :mod:`.onnxruntime_cuda`).

When a position's result does not depend on the tile (seen with 1.32 on x86-64): the blocked 2-D convolutions
(ungrouped, input channels a multiple of 4) and whatever sums at most 128 products per output give the same bits at any
size, batch and thread count. The matrix kernels (ConvTranspose, 3-D and odd-channel convolutions) cut longer sums into
blocks of 128 products, and into longer ones where a thread has at most 64 positions: a transposed convolution of 256
channels rounds differently in a map of 8 x 8 than in one of 9 x 9, and with 32 threads in one of 48 x 48. No setting
changes that; written as a 1 x 1 convolution and DepthToSpace it goes the blocked way and is free of it. OpenVINO showed
none of this.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendError, size_text
from ..graph.passes.qdq import QUANTISED_KEY
from ..graph.passes.up_conv import up_conv
from ..graph.precision import copy_graph, precision_of
from ..system import facts
from .session import Array, Port, Session, SessionBase, arrays_for, thread_count

# ONNX Runtime names element types in its own way.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(uint16)": "uint16",
    "tensor(int16)": "int16",
    "tensor(uint32)": "uint32",
    "tensor(int32)": "int32",
    "tensor(uint64)": "uint64",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


def conflict() -> str | None:
    """Two ONNX Runtime wheels in one folder, None if there is at most one in each.

    Folders of their own, one before the other on the path, do no harm: the first is what is imported.
    """
    folders = {
        name: folder
        for name in facts.DISTRIBUTIONS["onnxruntime"]
        if (folder := facts.package_folder(name)) is not None
    }
    found = [name for name, folder in folders.items() if list(folders.values()).count(folder) > 1]
    if not found:
        return None
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found and facts.cuda().devices else "onnxruntime"
    return (
        f"{' and '.join(found)} are both installed and overwrite each other's files; "
        f"pip uninstall -y {' '.join(found)}, then pip install {keep}"
    )


def missing(device: str = "cpu") -> str | None:
    """None if usable on ``device``; else what is missing and how to get it."""
    clash = conflict()
    if clash is not None:
        return clash
    wheel = "onnxruntime" if device == "cpu" else "onnxruntime-gpu"
    if importlib.util.find_spec("onnxruntime") is None:
        return f"ONNX Runtime is not installed; pip install {wheel}"
    if device == "cpu":
        _import()
        return None
    reason = facts.cuda().missing
    if reason is not None:
        return f"ONNX Runtime cannot use {device}: {reason}; use --device cpu"
    if "CUDAExecutionProvider" not in _import().get_available_providers():
        return (
            f"ONNX Runtime cannot use {device}: this is the CPU wheel; "
            "pip uninstall -y onnxruntime, then pip install onnxruntime-gpu"
        )
    from ..kernels import device as gpu

    reason = gpu.missing(facts.cuda_index(device))
    return None if reason is None else f"ONNX Runtime cannot use {device}: {reason}"


# Since 1.30 or so, merely importing the official wheels creates an identifier and a database in the user's cache
# folder and sends events to Microsoft. Images and networks here may be confidential, and nothing may be written that
# nobody asked for. The library reads the variables when it is imported (the second is their name in older releases);
# whoever sets them to something else has decided otherwise.
_NO_TELEMETRY = ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED")


def _import() -> Any:
    for variable in _NO_TELEMETRY:
        os.environ.setdefault(variable, "1")
    try:
        import onnxruntime
    except (ImportError, OSError, AttributeError) as error:
        raise BackendError(
            f"ONNX Runtime is installed but cannot be imported ({error}); pip install --force-reinstall onnxruntime"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        # What is left of the folder after one of two wheels was uninstalled.
        raise BackendError(
            "ONNX Runtime is installed incompletely (it has no InferenceSession); "
            "pip install --force-reinstall onnxruntime"
        )
    return onnxruntime


def _errors(onnxruntime: Any) -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime; they have no base of their own."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    found = (getattr(state, name) for name in dir(state))
    return (
        *(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception)),
        RuntimeError,
        ValueError,
        MemoryError,
    )


def precisions(device: str = "cpu") -> tuple[str, ...]:
    """Precisions this backend computes in on ``device``: that of the graph."""
    # The CPU provider has no bfloat16 convolution, and no setting that would make FP32 graphs run in it; float16 graphs
    # run in float32 between casts. On CUDA bfloat16 lacks MaxPool and ConvTranspose.
    return ("fp32", "int8") if device == "cpu" else ("fp32", "fp16")


def build(
    model: Path,
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    blob: Path | None = None,
    tiles: Sequence[Sequence[int]] = (),
    batches: Sequence[int] = (),
) -> None:
    """Writes ``graph``: FP32 or INT8 for the CPU, ``precision`` and measured settings for a GPU.

    For INT8 ``model`` is quantised already, in the form of :mod:`unet_rt.passes.qdq` for this backend.

    On the CPU up-convolutions are rewritten so that a tile's bits are the whole image's. On a GPU ``tiles`` and
    ``batches`` name the shape that settings are measured at. ONNX Runtime computes in the types of the graph.

    Raises:
        BackendError: A precision this backend does not have on ``device``, or a graph of another precision.
    """
    _require_precision(precision, device)
    import onnx

    from ..graph.passes.half import halved

    found = precision_of(model)
    if precision == "int8":
        if found != "int8":
            raise BackendError(
                f"{model.name} computes in {found}, int8 was asked; "
                "quantise it first (unet-rt build with --samples does)"
            )
        copy_graph(model, graph)
        return
    if found != "fp32" and (found != precision or halved(onnx.load(str(model), load_external_data=False)) != precision):
        raise BackendError(f"{model.name} computes in {found}, {precision} was asked; give the FP32 graph")
    if device != "cpu":
        reason = missing(device)
        if reason is not None:
            raise BackendError(reason)
        from . import onnxruntime_cuda

        onnxruntime_cuda.build(model, graph, precision=precision, device=device, tiles=tiles, batches=batches)
        return
    copy_graph(model, graph)
    proto = onnx.load(str(graph))
    if up_conv(proto):
        onnx.save(proto, str(graph))


def _require_precision(precision: str, device: str) -> None:
    if precision not in precisions(device):
        others = "--backend openvino" if device == "cpu" else "--backend tensorrt"
        has = " or ".join(f"--precision {name}" for name in precisions(device))
        raise BackendError(f"ONNX Runtime has no {precision} on {device}; use {has}, or {others}")


def load(graph: Path, *, precision: str, device: str = "cpu", threads: int = 0, blob: Path | None = None) -> Session:
    """Session on ``device`` with ``threads`` threads; 0: as many as affinity and quota allow.

    On a GPU it is a :class:`~unet_rt.backends.session.DeviceSession` with the settings recorded in the graph.
    """
    _require_precision(precision, device)
    if device == "cpu":
        return OnnxRuntimeSession(Path(graph), precision, threads)
    from .onnxruntime_cuda import CudaSession

    return CudaSession(Path(graph), precision, device, threads)


def bare(graph: Path, threads: int) -> Callable[[Sequence[Array]], list[Array]]:
    """The library used directly on the CPU, as its documentation shows: what an engine must not be slower than.

    Its defaults, but for the threads. Returns a function of the graph's inputs, in graph order.
    """
    library = _import()
    options = library.SessionOptions()
    options.intra_op_num_threads = thread_count(threads)
    session = library.InferenceSession(str(graph), options, providers=[_provider()])
    names = [value.name for value in session.get_inputs()]
    return lambda inputs: list(session.run(None, dict(zip(names, inputs, strict=True))))


class OnnxRuntimeSession(SessionBase):
    """A graph in ONNX Runtime on the CPU."""

    title = "ONNX Runtime"

    def __init__(self, graph: Path, precision: str, threads: int) -> None:
        super().__init__(precision, "cpu", threads)
        reason = missing()
        if reason is not None:
            raise BackendError(reason)
        self._library = _import()
        self._errors = _errors(self._library)
        self._output_shapes: dict[tuple[tuple[int, ...], ...], list[tuple[tuple[int, ...], np.dtype[Any]]]] = {}
        self._last: tuple[tuple[int, ...], ...] | None = None
        self._session: Any = None
        try:
            session = self._open(graph)
            self._ports = tuple(_port(value) for value in session.get_inputs())
        except self._errors as error:
            raise BackendError(f"ONNX Runtime refuses {graph}: {error}") from error
        self._output_names = [value.name for value in session.get_outputs()]
        active, wanted = session.get_providers(), _provider()[0]
        if not active or active[0] != wanted:
            raise BackendError(
                f"{wanted} was asked for {graph.name}, ONNX Runtime took {', '.join(active) or 'nothing'}; "
                "pip install --force-reinstall onnxruntime"
            )
        self._session = session

    def _open(self, graph: Path) -> Any:
        options = session_options(self._library, self.threads)
        if self._precision != "int8":
            return self._library.InferenceSession(str(graph), options, providers=[_provider()])
        with tempfile.TemporaryDirectory(prefix="unet-rt-") as folder:
            options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
            session = self._library.InferenceSession(str(graph), options, providers=[_provider()])
            compiled = Path(options.optimized_model_filepath).read_bytes()
        asked = int(session.get_modelmeta().custom_metadata_map.get(QUANTISED_KEY, "1"))
        got = _count(compiled, "QLinearConv")
        if got < asked:
            raise BackendError(
                f"int8 was asked, ONNX Runtime runs {got} of {asked} quantised layers of {graph.name} in INT8; "
                "use another --precision, or --backend openvino"
            )
        return session

    @property
    def version(self) -> str:
        return f"onnxruntime {self._library.__version__}"

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        arrays = arrays_for(self._ports, inputs)
        try:
            return self._run_bound(arrays)
        except self._errors as error:
            shapes = ", ".join(size_text(array.shape) for array in arrays)
            raise BackendError(
                f"ONNX Runtime fails on an input of {shapes}: {error}; "
                "if memory is short, use a smaller --tile or --batch"
            ) from error

    def _run_bound(self, arrays: list[Array]) -> list[Array]:
        key = tuple(array.shape for array in arrays)
        known = self._output_shapes.get(key)
        names = [port.name for port in self._ports]
        options = self._run_options(key)
        if known is None:
            outputs: list[Array] = self._session.run(self._output_names, dict(zip(names, arrays, strict=True)), options)
            if len(self._output_shapes) < 64:  # shapes of one use each must not pile up
                self._output_shapes[key] = [(output.shape, output.dtype) for output in outputs]
            return outputs
        # Written by ONNX Runtime straight into the caller's arrays; `run` would hold them in its arena and copy.
        outputs = [np.empty(shape, dtype) for shape, dtype in known]
        binding = self._session.io_binding()
        for name, array in zip(names, arrays, strict=True):
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in zip(self._output_names, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding, options)
        return outputs

    def _run_options(self, key: tuple[tuple[int, ...], ...]) -> Any:
        """Options of a run: where the shapes changed, the arena gives its memory back after it.

        Else the memory of a whole image stays for as long as tiles follow; one run per change pays for new pages.
        """
        changed, self._last = self._last not in (None, key), key
        if not changed:
            return None
        options = self._library.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def _release(self) -> None:
        self._session = None


def _count(model: bytes, operator: str) -> int:
    """Nodes of one operator in a serialised graph (field 4 of a node), read without the onnx package."""
    return model.count(b"\x22" + bytes([len(operator)]) + operator.encode())


def _provider() -> tuple[str, dict[str, str]]:
    return "CPUExecutionProvider", {}


def session_options(library: Any, threads: int) -> Any:
    """Options that sessions have on all devices."""
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = library.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors; its warnings are about the exporter's graph, not the user's doing
    # The pattern is one block per input shape, traced in the first run beside the chunks that this run needed:
    # peak memory 626 MB instead of 290 MB for a 1024-px tile of a 0.45 M parameter U-Net, at the same speed.
    options.enable_mem_pattern = False
    # The arena stays: fresh pages for every tensor cost 1.35 s instead of 0.8 s in the same run.
    options.enable_cpu_mem_arena = True
    # Waiting threads sleep. Spinning saves tens of microseconds per operator, where operators take milliseconds,
    # and takes the cores from those who read, gather and stitch at the same time (and from a container's quota).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def strays(session: Any, provider: str, allowed: frozenset[str] = frozenset()) -> list[str]:
    """Nodes of a session that another provider than ``provider`` runs, operators in ``allowed`` aside.

    The session was made with ``session.record_ep_graph_assignment_info``.
    """
    return [
        node.name or node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type not in allowed
    ]


def _port(value: Any) -> Port:
    dtype = _DTYPES.get(value.type)
    if dtype is None:
        raise ValueError(f"input {value.name} is {value.type}, which NumPy cannot hold")
    return Port(value.name, tuple(n if isinstance(n, int) else None for n in value.shape), np.dtype(dtype))
