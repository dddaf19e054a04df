"""OpenVINO on CPUs: FP32 everywhere, BF16 where the CPU computes in it, INT8 from quantised graphs."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendError, size_text
from ..graph.precision import copy_graph, precision_of
from ..system import facts
from .session import Array, BackendSettings, Port, SessionBase, arrays_for, thread_count

# Hint that is asked for -> runtime precision that layers report.
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}

# Runtime precisions of layers that compute in INT8: the type of their activations.
_BYTES = ("u8", "i8")

# Layers where the arithmetic is, by the names of OpenVINO's runtime graph.
_HEAVY = frozenset(
    {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "GroupConvolution", "GroupDeconvolution"}
)

# BF16 engines may keep a few layers in FP32 (a first convolution of one channel, say); an engine with fewer than half
# of its layers in BF16 is not one.
_BF16_SHARE = 0.5

# Compiled shapes that are kept: the tile, a short last batch, a small image, a whole one. Each holds its own copy of
# the weights (124 MB for the paper's U-Net); activations are held for the last used one only.
_SHAPES = 4
any_tile = True
variant = ""


def missing(device: str = "cpu") -> str | None:
    """None if usable on ``device``; else what is missing and how to get it."""
    if device != "cpu":
        return f"OpenVINO does not run on {device} (NVIDIA GPUs are not its devices); use --device cpu"
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed; pip install openvino"
    _core()
    return None


def _import() -> Any:
    if "openvino" in sys.modules:
        return _checked_import()
    # `import openvino` writes an identifier to the user's home folder and sends an event to Google Analytics, by the
    # package openvino_telemetry. Without that package it does not, so that is how things look while it is imported.
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # the import machinery's "not to be found"
    try:
        return _checked_import()
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]


def _checked_import() -> Any:
    try:
        import openvino
    except (ImportError, OSError, AttributeError) as error:
        raise BackendError(
            f"OpenVINO is installed but cannot be imported ({error}); pip install --force-reinstall openvino"
        ) from error
    return openvino


@functools.cache
def _core() -> Any:
    """OpenVINO's registry of devices: one per process, it loads the CPU plugin."""
    openvino = _import()
    core = openvino.Core()
    try:
        devices = core.available_devices
    except RuntimeError as error:
        raise BackendError(
            f"OpenVINO cannot list its devices ({error}); pip install --force-reinstall openvino"
        ) from error
    if "CPU" not in devices:
        raise BackendError(
            f"OpenVINO has no CPU device here (it has: {', '.join(devices) or 'none'}); "
            "pip install --force-reinstall openvino, or --backend onnxruntime"
        )
    return core


def _capabilities() -> frozenset[str]:
    """What OpenVINO says this CPU computes in: ``FP32``, ``INT8``, ``BF16``, ..."""
    return frozenset(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def precisions(device: str = "cpu") -> tuple[str, ...]:
    """Precisions this backend computes in on this CPU."""
    found = _capabilities()
    return ("fp32", *(name for name in ("bf16", "int8") if name.upper() in found))


def _require(precision: str, device: str) -> None:
    reason = missing(device)
    if reason is not None:
        raise BackendError(reason)
    if precision not in _HINTS:
        raise BackendError(f"OpenVINO has no {precision} here; use --precision {' or '.join(_HINTS)}")
    # Asked for BF16 without the instructions, OpenVINO emulates it (convolutions named jit_avx512_bf16 on a CPU with
    # AVX-512 but without avx512_bf16): the rounding of BF16, slower than FP32, and no word about it.
    if precision not in precisions():
        if precision == "int8":
            raise BackendError(f"OpenVINO computes in no INT8 on {facts.cpu_name()}; use --precision fp32")
        raise BackendError(
            f"{facts.cpu_name()} has no BF16 instructions (avx512_bf16, amx_bf16 or ARM bf16), "
            "OpenVINO would emulate them; use --precision fp32"
        )


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
    """Copy ``model`` to ``graph``: FP32, or quantised in the form of :mod:`unet_rt.graph.passes.qdq` for INT8.

    BF16 is a setting of the compiler. What layers compute in is read back from every compiled shape.

    Raises:
        BackendError: A precision that this CPU lacks, a graph of another one, or one that OpenVINO cannot read.
    """
    _require(precision, device)
    found = precision_of(model)
    if found != ("int8" if precision == "int8" else "fp32"):
        way = "quantise it first (unet-rt build with --samples does)" if precision == "int8" else "give the FP32 graph"
        raise BackendError(f"{model.name} computes in {found}, {precision} was asked; {way}")
    _read(model)
    copy_graph(model, graph)


def _read(graph: Path) -> Any:
    try:
        return _core().read_model(str(graph))
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot read {graph}: {_last_line(error)}; use --backend onnxruntime") from error


def _last_line(error: Exception) -> str:
    """What OpenVINO's exceptions end with: the fact, below the places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def load(
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    threads: int = 0,
    blob: Path | None = None,
    settings: BackendSettings | None = None,
    cache: Path | None = None,
) -> OpenVinoSession:
    """Session of a graph that ``build`` wrote. Shapes are compiled when they are first run.

    Args:
        graph: What ``build`` wrote.
        precision: ``"fp32"``, ``"bf16"`` or ``"int8"``.
        device: ``"cpu"``.
        threads: Threads to compute with; 0: as many as affinity and quota allow.
        blob: None: nothing is compiled ahead of time.
        settings: None: it has none.
        cache: Folder where OpenVINO may keep compiled shapes for the next process; nothing is written if None.
    """
    _require(precision, device)
    return OpenVinoSession(Path(graph), precision, threads, cache)


def bare(graph: Path, threads: int, precision: str = "fp32") -> Callable[[Sequence[Array]], list[Array]]:
    """The library used directly, as its documentation shows: what an engine must not be slower than.

    Latency hint, the threads and the precision; shapes are compiled static when they first come. Returns a function of
    the graph's inputs, in graph order.
    """
    core, library = _core(), _import()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": thread_count(threads),
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
    }
    requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def run(inputs: Sequence[Array]) -> list[Array]:
        shapes = tuple(array.shape for array in inputs)
        if shapes not in requests:
            model = core.read_model(str(graph))
            partial = library.PartialShape
            model.reshape({model.input(k): partial(list(shape)) for k, shape in enumerate(shapes)})
            requests[shapes] = core.compile_model(model, "CPU", config).create_infer_request()
        found = requests[shapes].infer(list(inputs))
        return [np.array(found[k]) for k in range(len(found))]

    return run


@dataclass(frozen=True)
class _Compiled:
    """The graph compiled for one set of input shapes."""

    model: Any
    request: Any
    outputs: tuple[tuple[tuple[int, ...], np.dtype[Any]] | None, ...]  # shape, dtype; None: known only after a run


class OpenVinoSession(SessionBase):
    """A graph in OpenVINO, compiled per input shape (static shapes compute faster, and tiles have few shapes)."""

    title = "OpenVINO"

    def __init__(self, graph: Path, precision: str, threads: int, cache: Path | None) -> None:
        super().__init__(precision, "cpu", threads)
        self._library = _import()
        self._graph = graph
        self._model: Any = _read(graph)
        self._ports = tuple(_port(port) for port in self._model.inputs)
        self._compiled: OrderedDict[tuple[tuple[int, ...], ...], _Compiled] = OrderedDict()
        self._layers: Counter[str] | None = None
        self._config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # One stream: all threads work on one tile. More would multiply the memory of activations.
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            # Always said: the default is BF16 on CPUs that have it.
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            # Weights may be stored small; activations are not to be quantised behind anybody's back (default 32).
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            # Pinned threads of two engines or processes share the first cores while others idle.
            "ENABLE_CPU_PINNING": False,
        }
        if cache is not None:
            self._config["CACHE_DIR"] = str(cache)
        if all(size is not None for port in self._ports for size in port.shape):
            with self._lock:
                self._for_shapes(tuple(tuple(size or 0 for size in port.shape) for port in self._ports))

    @property
    def precision(self) -> str:
        """Read back from the compiled layers, and equal to what was asked (anything else is refused)."""
        self._read_layers()
        return super().precision

    @property
    def layers(self) -> Mapping[str, int]:
        """Number of compute layers by runtime precision in the last compiled shape, e.g. ``{"bf16": 18}``."""
        self._read_layers()
        return dict(self._layers or {})

    def _read_layers(self) -> None:
        with self._lock:
            if self._layers is not None or self._model is None:
                return
            # Free sizes, and nothing has run yet: compiled once for any size (0.1 s), for this answer alone.
            try:
                compiled = _core().compile_model(self._model, "CPU", self._config)
            except RuntimeError as error:
                raise BackendError(
                    f"OpenVINO cannot compile {self._graph}: {_last_line(error)}; use --backend onnxruntime"
                ) from error
            self._check_precision(_layers(compiled))

    @property
    def version(self) -> str:
        # "2026.4.1-22982-e213a147257-releases/2026/4"
        return f"openvino {self._library.__version__.partition('-')[0]}"

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        arrays = arrays_for(self._ports, inputs)
        compiled = self._for_shapes(tuple(array.shape for array in arrays))
        try:
            return self._infer(compiled, arrays)
        except (RuntimeError, MemoryError) as error:
            shapes = ", ".join(size_text(array.shape) for array in arrays)
            raise BackendError(
                f"OpenVINO fails on an input of {shapes}: {_last_line(error)}; "
                "if memory is short, use a smaller --tile or --batch"
            ) from error

    def _infer(self, compiled: _Compiled, arrays: list[Array]) -> list[Array]:
        tensor = self._library.Tensor
        request = compiled.request
        # Inputs are read where they are and outputs are written into arrays of the caller: no copies. OpenVINO wants
        # writable memory even to read from.
        arrays = [array if array.flags.writeable else array.copy() for array in arrays]
        for index, array in enumerate(arrays):
            request.set_input_tensor(index, tensor(array, shared_memory=True))
        outputs: list[Array | None] = []
        for index, known in enumerate(compiled.outputs):
            output = None if known is None else np.empty(*known)
            outputs.append(output)
            if output is not None:
                request.set_output_tensor(index, tensor(output, shared_memory=True))
        request.infer(share_outputs=True)
        return [
            request.get_output_tensor(index).data.copy() if output is None else output
            for index, output in enumerate(outputs)
        ]

    def _for_shapes(self, shapes: tuple[tuple[int, ...], ...]) -> _Compiled:
        found = self._compiled.get(shapes)
        last = next(reversed(self._compiled), None)
        if last is not None and last != shapes:
            # Activations of a shape that is not running are given back (1024-px tile of a small U-Net: 375 to
            # 119 MB); running it again allocates them anew.
            self._compiled[last].model.release_memory()
        if found is None:
            while len(self._compiled) >= _SHAPES:
                self._compiled.popitem(last=False)
            found = self._compiled[shapes] = self._compile(shapes)
        self._compiled.move_to_end(shapes)
        return found

    def _compile(self, shapes: tuple[tuple[int, ...], ...]) -> _Compiled:
        text = ", ".join(map(size_text, shapes))
        try:
            model = self._model.clone()
            partial = self._library.PartialShape
            model.reshape({model.input(k): partial(list(shape)) for k, shape in enumerate(shapes)})
            compiled = _core().compile_model(model, "CPU", self._config)
            request = compiled.create_infer_request()
        except (RuntimeError, MemoryError) as error:
            raise BackendError(
                f"OpenVINO cannot compile {self._graph} for an input of {text}: {_last_line(error)}; "
                "use another --tile, or --backend onnxruntime"
            ) from error
        self._check_precision(_layers(compiled))
        outputs = tuple(
            (tuple(port.shape), port.element_type.to_dtype()) if port.partial_shape.is_static else None
            for port in compiled.outputs
        )
        return _Compiled(compiled, request, outputs)

    def _check_precision(self, layers: Counter[str]) -> None:
        """Hold the runtime precision of the layers against what was asked."""
        total = sum(layers.values())
        if self._precision == "int8":
            asked, got = _quantised(self._model), sum(layers[kind] for kind in _BYTES)
            if got and got >= asked:
                self._layers = layers
                return
            found = f"{got} of {asked} quantised layers in INT8"
            raise BackendError(
                f"int8 was asked, OpenVINO compiled {found}; use another --precision, or --backend onnxruntime"
            )
        wanted = _HINTS[self._precision]
        share = layers[wanted] / total if total else 1.0
        if share >= (1.0 if self._precision == "fp32" else _BF16_SHARE):
            self._layers = layers
            return
        found = ", ".join(f"{count} in {kind}" for kind, count in sorted(layers.items()))
        raise BackendError(
            f"{self._precision} was asked, OpenVINO compiled {found} of {total} compute layers of {self._graph.name}; "
            "use another --precision, or --backend onnxruntime"
        )

    def _release(self) -> None:
        self._compiled.clear()
        self._model = None


def _layers(compiled: Any) -> Counter[str]:
    """Runtime precision of each compute layer of a compiled model."""
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in _HEAVY:
            found[info["runtimePrecision"].astype(str)] += 1
    return found


def _quantised(model: Any) -> int:
    """Convolutions of a model whose weights are dequantised from integers."""
    return sum(
        node.get_type_name() == "Convolution" and node.input_value(1).get_node().get_type_name() != "Constant"
        for node in model.get_ordered_ops()
    )


def _port(port: Any) -> Port:
    shape = tuple(size.get_length() if size.is_static else None for size in port.partial_shape)
    return Port(port.any_name, shape, port.element_type.to_dtype())
