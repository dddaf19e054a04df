"""From an ONNX graph to a plan: parser, optimisation profiles, builder, and what they say when they refuse.

Works without a GPU where the library does (TensorRT-RTX); nothing here touches a runtime.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BackendError, TileError, size_text
from ...system import limits
from .inspect import network_convolutions, node_names
from .plan import Profile

if TYPE_CHECKING:
    import onnx


log = logging.getLogger("unet_rt")

_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
# Nodes in messages of the builder: "node {ForeignNode[a...b]}", "node /up/ConvTranspose"; "Error (/up/Concat: ...", where
# something else may stand as well.
_NODE = re.compile(r"node \{?(?:ForeignNode\[)?(?P<node>[^\]\s}]+)|Error \((?P<perhaps>[^\s():]+): ")
# The text is all there is. An error recorder receives codes, and one of them is FAILED_ALLOCATION, but in published logs
# of TensorRT 8 to 10.13 a block that the GPU refuses is INTERNAL_ERROR ("Error Code 2: OutOfMemory") or UNSPECIFIED_ERROR
# ("Error Code 1: Cuda Runtime (out of memory)"), like much else. And where a recorder is set, TensorRT-RTX 1.7 crashes
# after a graph that its parser refuses.
_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|cudaErrorMemoryAllocation", re.IGNORECASE)
_ADVICE = (
    (_MEMORY, "the GPU's memory is short: use a smaller --tile or --batch, or free the GPU"),
    (re.compile(r"could not find any implementation|no tactic|kNO_IMPL", re.IGNORECASE),
     "there is no kernel for this layer in this precision: build with another --precision"),
    (re.compile(r"compute capability|UNSUPPORTED_CC|unsupported (SM|GPU|arch)", re.IGNORECASE),
     "the library does not support this GPU: use --backend onnxruntime, or pip install tensorrt-cu13"),
    (re.compile(r"driver version is insufficient|cudaError 35", re.IGNORECASE), "install a newer NVIDIA driver"),
)  # fmt: skip


def title(trt: Any) -> str:
    """Name of the library in messages."""
    return _TITLES[trt.__name__]


class Messages:
    """What the library said lately; a library has one logger per process, whoever asks."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=16)

    def take(self) -> str:
        """The errors since the last call, as one text."""
        text = "; ".join(dict.fromkeys(self.errors))
        self.errors.clear()
        return text


@functools.cache
def logger(trt: Any) -> tuple[Any, Messages]:
    """The library's logger, which hands on to ``logging``, and the errors that it received."""
    messages = Messages()

    class _Logger(trt.ILogger):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            text = " ".join(text.split())
            if int(severity) <= int(trt.ILogger.ERROR):
                messages.errors.append(text)
            log.debug("%s: %s", trt.__name__, text)

    return _Logger(), messages


def failure(message: str, text: str) -> BackendError:
    """The error for a message that ends in the library's words: of its own kind where device memory is short."""
    if _MEMORY.search(text):
        from ...errors import DeviceMemoryError

        return DeviceMemoryError(message)
    return BackendError(message)


def remedy(text: str) -> str:
    """What to do about a message of the library."""
    found = (way_out for pattern, way_out in _ADVICE if pattern.search(text))
    return next(found, "build with --backend onnxruntime, or --precision fp32")


def profiles_for(model: onnx.ModelProto, tiles: Sequence[Sequence[int]], batches: Sequence[int]) -> tuple[Profile, ...]:
    """The shapes of every tile at every batch size, largest tile and largest batch first.

    Args:
        model: Its inputs may be free or fixed, channels first or last, with or without a batch axis.
        tiles: Sizes in pixels per spatial axis.
        batches: Tiles per run.

    Raises:
        TileError: No tile or batch, or one that the graph does not take.
    """
    if not tiles or not batches:
        raise TileError("a plan takes fixed shapes: give one tile size or two, and the batch sizes that will be run")
    constants = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in constants]
    dims = {
        value.name: [
            d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
            for d in value.type.tensor_type.shape.dim
        ]
        for value in values
    }
    found = []
    for tile in sorted({tuple(map(int, tile)) for tile in tiles}, reverse=True):
        for batch in sorted({int(batch) for batch in batches}, reverse=True):
            shapes = tuple(_shape(name, have, tile, batch) for name, have in dims.items())
            found.append(Profile(tile, batch, shapes))
    return tuple(found)


def _shape(name: str, dims: list[int | None], tile: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """Shape of an input: channels first, channels last or none, with a batch axis or without, whichever fits."""
    rows = [batch] if len(dims) >= len(tile) + 2 else []
    forms: list[list[int | None]] = [[*rows, *tile]]
    if len(dims) > len(tile):
        forms = [[*rows, dims[len(rows)], *tile], [*rows, *tile, dims[-1]]]
    for form in forms:
        shape = [n for n in form if n is not None]
        if len(shape) == len(form) and _fits(dims, shape):
            return tuple(shape)
    have, want = size_text(dims), size_text(forms[0])
    raise TileError(f"input {name} is {have}, and tile and batch make it {want}; '?' sizes are free, others are not")


def _fits(dims: Sequence[int | None], wanted: Sequence[int | None]) -> bool:
    return len(dims) == len(wanted) and all(d is None or d == w for d, w in zip(dims, wanted, strict=True))


@dataclass(frozen=True)
class CompiledPlan:
    """A serialised plan, the precision the network asks for per convolution (by ONNX node), inputs and outputs in order."""

    plan: bytes
    convolutions: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


# Timings of kernels, which the builds of one process share: by library, version and GPU. They stay in memory, so that
# nothing is written that nobody asked for. (TensorRT-RTX times nothing.)
_TIMINGS: dict[tuple[str, str, str], bytes] = {}


def compile_plan(
    trt: Any,
    graph: Path,
    profiles: Sequence[Profile],
    *,
    gpu: str = "",
    compute_capability: tuple[int, int] | None = None,
) -> CompiledPlan:
    """Parses ``graph`` and builds a plan that takes the shapes of ``profiles`` and no others.

    Args:
        trt: The library.
        graph: ONNX file; its types are the precision of the plan.
        profiles: At least one.
        gpu: Name of the GPU it is built for; timings are kept per name.
        compute_capability: Of that GPU. None: without one, for all that the library builds for.

    Raises:
        BackendError: The parser or the builder refuses; the message names the node and a way out.
    """
    sink, messages = logger(trt)
    messages.take()
    builder = trt.Builder(sink)
    if not builder:
        text = messages.take()
        raise BackendError(f"{title(trt)} does not start: {text or 'no reason given'}; {remedy(text)}")
    builder.max_threads = limits.threads()
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, graph)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # TF32 is not FP32: ten bits of mantissa
    config.max_aux_streams = 0  # one stream, which the pipeline's copies and kernels share
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # Everything that a run needs is in the memory given to it: nothing is allocated while a graph is captured.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    _target(trt, config, compute_capability)
    _set_profiles(builder, network, config, profiles)
    convolutions = network_convolutions(trt, network)
    key = trt.__name__, trt.__version__, gpu
    timings = _use_timings(trt, config, key)
    try:
        plan = builder.build_serialized_network(network, config)
    except (RuntimeError, MemoryError) as error:
        messages.errors.append(str(error))
        plan = None
    text = messages.take()
    if plan is None:
        raise failure(refusal(trt, graph.name, profiles[0], text, node_names(network)), text)
    if timings is not None:
        _TIMINGS[key] = bytes(timings.serialize())
    inputs = tuple(network.get_input(k).name for k in range(network.num_inputs))
    outputs = tuple(network.get_output(k).name for k in range(network.num_outputs))
    return CompiledPlan(bytes(plan), convolutions, inputs, outputs)


def refusal(trt: Any, name: str, profile: Profile, text: str, nodes: Collection[str] = ()) -> str:
    """Why the builder refused, in one sentence: graph, shapes, node if it is named, the library's words, way out."""
    named = (
        match["node"] or match["perhaps"]
        for match in _NODE.finditer(text)
        if match["node"] or match["perhaps"] in nodes
    )
    node = next(named, None)
    where = f" at node {node.rstrip('.,;:')}" if node else ""
    return f"{title(trt)} cannot build {name} for {profile}{where}: {text or 'it gives no reason'}; {remedy(text)}"


def _network_flags(trt: Any) -> int:
    """Explicit types: 11.x knows nothing else and keeps the flag, 10.x has to be told."""
    flags = trt.NetworkDefinitionCreationFlag
    chosen = 1 << int(flags.STRONGLY_TYPED)
    if hasattr(flags, "PREFER_AOT_PYTHON_PLUGINS"):
        chosen |= 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    return chosen


def _parse(trt: Any, network: Any, graph: Path) -> None:
    parser = trt.OnnxParser(network, logger(trt)[0])
    if parser.parse_from_file(str(graph)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    text = logger(trt)[1].take()
    if not errors:
        raise BackendError(f"{title(trt)} cannot parse {graph.name}: {text or 'it gives no reason'}; {remedy(text)}")
    error = errors[0]
    kind, operator = error.code().name, error.node_operator()  # UNSUPPORTED_NODE, INVALID_GRAPH, ...
    where = f" at node {error.node_name() or f'number {error.node()}'} ({operator})" if operator else ""
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    way_out = "without this operator" if operator and kind.startswith("UNSUPPORTED") else "with another opset"
    raise BackendError(
        f"{title(trt)} cannot parse {graph.name}{where}: {kind.lower().replace('_', ' ')}, {' '.join(error.desc().split())}"
        f"{more}; use --backend onnxruntime, or export the graph {way_out}"
    )


def _target(trt: Any, config: Any, capability: tuple[int, int] | None) -> None:
    """TensorRT-RTX builds for several GPUs unless told which; a GPU that it does not list gets what it builds for all."""
    if capability is None or not hasattr(trt, "ComputeCapability"):
        return
    if hasattr(trt.ComputeCapability, f"SM{capability[0]}{capability[1]}"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)


def _set_profiles(builder: Any, network: Any, config: Any, profiles: Sequence[Profile]) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if len(profiles) == 1:  # a graph of fixed shapes leaves the builder the most to decide ahead of time
        for tensor, shape in zip(inputs, profiles[0].inputs, strict=True):
            tensor.shape = shape
        return
    for profile in profiles:
        made = builder.create_optimization_profile()
        for tensor, shape in zip(inputs, profile.inputs, strict=True):
            made.set_shape(tensor.name, shape, shape, shape)
        if config.add_optimization_profile(made) < 0:
            raise BackendError(f"the shapes of {profile} contradict the graph; choose another --tile or --batch")


def _use_timings(trt: Any, config: Any, key: tuple[str, str, str]) -> Any:
    if hasattr(trt, "ComputeCapability"):  # TensorRT-RTX compiles on the user's machine and times nothing
        return None
    cache = config.create_timing_cache(_TIMINGS.get(key, b""))
    config.set_timing_cache(cache, False)
    return cache
