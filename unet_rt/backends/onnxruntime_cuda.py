"""ONNX Runtime's CUDA provider: sessions that run on arrays of the GPU, and the trial that chooses their settings.

What decides (read in the sources and the binary of 1.31; speeds are measured by the trial, not believed):

- ``prefer_nhwc``: Conv, ConvTranspose, MaxPool and DepthToSpace have channels-last kernels for float16, which is how tensor
  cores read; Resize has none, so that networks with interpolation get a Transpose around each.
- ``fuse_conv_bias``: the bias is added inside the convolution (cuDNN compiles such kernels when a shape runs first). Only
  with ``prefer_nhwc``: for NCHW the provider clears the output by a plain ``cudaMemset``, on the default stream, while
  the session computes on another. For the same reason the fusion of Conv and Relu (FP32, NCHW) is switched off here.
- ``cudnn_conv_algo_search`` chooses cuDNN's heuristics: EXHAUSTIVE is mode B, HEURISTIC mode A, DEFAULT the fallback list.
  Nothing is timed by the provider itself, so the trial does it.
- ``use_tf32``: 0 forbids tensor cores altogether, for float16, too. So it is 0 for FP32 and 1 for FP16, where it can
  matter for islands only (they then have float16's mantissa and float32's range). Where cuDNN has no plan without tensor
  cores the provider takes TF32 for FP32 all the same and says nothing: fused biases always (so never in FP32), channels
  last perhaps. The trial compares results as closely as FP32 allows.
- A convolution plans anew whenever the shape of its input changes, and keeps one plan: hence one provider session per
  shape. It is made for that shape, so that crops are constants: as arithmetic they run on the CPU, between copies.
- A transposed convolution with a fused bias is refused by cuDNN; rewritten as a convolution it is not.
- Without cuDNN the provider of 1.31 convolves by kernels of its own and says nothing; such a machine is refused.
- ``enable_cuda_graph`` records the launches of a run once per set of addresses. It wins where launching takes longer
  than computing, small tiles alone.
- bfloat16 has no MaxPool and no ConvTranspose on CUDA, and its convolution no channels-last form: not offered.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..errors import BackendError, size_text
from ..kernels.device import DeviceMemoryError
from ..system import facts
from ..system import timing as timing_module
from . import onnxruntime as common
from .session import Array, Port, SessionBase, arrays_for, check_shapes

if TYPE_CHECKING:
    from ..kernels.device import DeviceArray, Stream


log = logging.getLogger("unet_rt")

RECORD = (
    "unet_rt.onnxruntime.cuda"  # key of the metadata entry of a built graph: its settings, and the trial behind them
)

_SHAPES = 4  # provider sessions that are kept, one per shape, each with its weights, arena and plans
_BINDINGS = 64  # sets of addresses whose bindings are kept
_GRAPHS = 16  # sets of addresses whose launches are recorded; a recording goes with its provider session, not before
_RUNS_BEFORE_GRAPH = 2  # runs of a set of addresses before it is taken for one that stays

# A variant is kept only if it is faster than what is in hand by more than this: less is noise.
_GAIN = 0.02
_TRIAL_S = 90.0  # after this no further stage of the trial begins: a stage compiles plans for every convolution

# Operators that may run on the CPU: the arithmetic of sizes. Anything else there is a network that left the GPU.
_ARITHMETIC = frozenset(
    "Shape Size Gather Concat Unsqueeze Squeeze Cast Slice Mul Add Sub Div Floor Ceil Min Max Constant ConstantOfShape "
    "Range Reshape Identity Equal Where Expand Not Mod Round Sqrt ReduceProd Neg".split()
)

# The text is all there is: no status code of ONNX Runtime means short memory, and so no exception of its Python module
# does. What the arena and the CUDA calls report arrives as Fail, RuntimeException or EPFail, like any other failure of a
# run. These are the words of the arena, and the number or name that CUDA's calls fail with.
_SHORT_OF_MEMORY = (
    "Failed to allocate memory for requested buffer of size",
    "CUDA failure 2:",  # cudaErrorMemoryAllocation
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Options:
    """Settings of a session that the trial chooses among."""

    prefer_nhwc: bool = False
    fuse_conv_bias: bool = False
    search: str = "HEURISTIC"
    cuda_graph: bool = False
    up_conv: bool = False  # of the graph: transposed convolutions as 1 x 1 convolutions and DepthToSpace

    def __post_init__(self) -> None:
        if self.fuse_conv_bias and not self.prefer_nhwc:
            raise BackendError(
                "fuse_conv_bias without prefer_nhwc computes on two streams at once in ONNX Runtime; set both or neither"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Options:
        if set(data) != set(cls.__dataclass_fields__):
            raise BackendError(
                f"the graph records the settings {', '.join(data)}, as another version of unet-rt has them; build it again: "
                "unet-rt build model.onnx --overwrite"
            )
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @property
    def text(self) -> str:
        """In a few words, e.g. ``"HEURISTIC prefer_nhwc"``."""
        return " ".join([self.search, *(name for name, value in vars(self).items() if value is True)])

    def provider(self, index: int, precision: str, stream: int) -> dict[str, str]:
        """The provider's own options for device ``index``."""
        return {
            "device_id": str(index),
            "has_user_compute_stream": "1",
            "user_compute_stream": str(stream),
            "use_tf32": "0" if precision == "fp32" else "1",
            "prefer_nhwc": str(int(self.prefer_nhwc)),
            "fuse_conv_bias": str(int(self.fuse_conv_bias)),
            "cudnn_conv_algo_search": self.search,
            "cudnn_conv_use_max_workspace": "1",
            "enable_cuda_graph": str(int(self.cuda_graph)),
            # The arena takes what is asked; its default doubles, which wastes up to half of what a large batch takes.
            "arena_extend_strategy": "kSameAsRequested",
        }


@dataclass(frozen=True)
class Trial:
    """What one setting did: milliseconds of a run, or why it could not be had."""

    options: Options
    ms: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"options": self.options.to_json(), "ms": self.ms, "note": self.note}


@dataclass(frozen=True)
class Named:
    """An input or output of a graph: free sizes by the names under which a session can be told them (None: unnamed)."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str

    @property
    def port(self) -> Port:
        return Port(self.name, tuple(n if isinstance(n, int) else None for n in self.shape), np.dtype(self.dtype))


@dataclass(frozen=True)
class Record:
    """What ``build`` wrote into a graph: the settings it is to be run with, and what they were chosen from."""

    options: Options = field(default_factory=Options)
    input_shapes: tuple[tuple[int, ...], ...] = ()
    trials: tuple[Trial, ...] = ()
    inputs: tuple[Named, ...] = ()
    outputs: tuple[Named, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        return cls(
            Options.from_json(data["options"]),
            tuple(tuple(int(n) for n in shape) for shape in data["input_shapes"]),
            tuple(Trial(Options.from_json(t["options"]), t["ms"], t["note"]) for t in data["trials"]),
            tuple(Named(v["name"], tuple(v["shape"]), v["dtype"]) for v in data["inputs"]),
            tuple(Named(v["name"], tuple(v["shape"]), v["dtype"]) for v in data["outputs"]),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [{**vars(value), "shape": list(value.shape)} for value in self.inputs],
            "outputs": [{**vars(value), "shape": list(value.shape)} for value in self.outputs],
            "options": self.options.to_json(),
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "trials": [trial.to_json() for trial in self.trials],
        }


# Loading --------------------------------------------------------------------------------------------------------------


def metadata(graph: Path) -> dict[str, str]:
    """The metadata entries of an ONNX file, without reading its weights or importing ONNX (field 14 of its protobuf)."""
    found: dict[str, str] = {}
    with graph.open("rb") as stream:
        while True:
            tag = _varint(stream)
            if tag is None:
                return found
            number, kind = tag >> 3, tag & 7
            if kind == 0:
                _varint(stream)
            elif kind in (1, 5):
                stream.seek(8 if kind == 1 else 4, io.SEEK_CUR)
            elif kind == 2:
                size = _varint(stream) or 0
                if number != 14:
                    stream.seek(size, io.SEEK_CUR)
                    continue
                entry = io.BytesIO(stream.read(size))
                pair = {}
                while (inner := _varint(entry)) is not None:
                    pair[inner >> 3] = entry.read(_varint(entry) or 0).decode()
                found[pair.get(1, "")] = pair.get(2, "")
            else:
                raise BackendError(
                    f"{graph} is not an ONNX file (field {number} of kind {kind}); build the engine again"
                )


def _varint(stream: BinaryIO) -> int | None:
    """The next variable-length integer, None at the end."""
    value, shift = 0, 0
    while byte := stream.read(1):
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7
    return None


def read_record(graph: Path) -> Record:
    """What ``build`` recorded in ``graph``; the provider's own settings and nothing else where it recorded nothing."""
    try:
        text = metadata(graph).get(RECORD)
    except FileNotFoundError as error:
        raise BackendError(f"{graph} does not exist; build the engine again") from error
    return Record() if text is None else Record.from_json(json.loads(text))


def preload(library: Any) -> None:
    """Loads CUDA and cuDNN from NVIDIA's wheels, where they are installed, and refuses machines without cuDNN."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it cannot find
        if hasattr(library, "preload_dlls"):
            library.preload_dlls()
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL("libcudnn.so.9")
    except OSError as error:
        first = said.getvalue().strip().partition("\n")[0]
        raise BackendError(
            f"ONNX Runtime would convolve on the GPU without cuDNN, slowly: {error}{'; ' + first if first else ''}; "
            "pip install nvidia-cudnn-cu13, or put the folder of libcudnn.so.9 on LD_LIBRARY_PATH"
        ) from error


@dataclass
class _Compiled:
    """A provider session for one set of input shapes."""

    session: Any
    outputs: tuple[tuple[int, ...], ...] | None = None  # known after the first run
    graphs: int = 0  # recordings that it holds
    arena_bytes: int = 0  # that its first run took, by what was free on the device before and after


class CudaSession(SessionBase):
    """A graph in ONNX Runtime on a GPU; a :class:`~unet_rt.backends.session.DeviceSession`.

    Args:
        graph: The ONNX file.
        precision: ``"fp32"`` or ``"fp16"``: what the graph computes in.
        device: ``"cuda:N"``.
        threads: Of the host, for what little it computes.
        options: Settings; None: those recorded in the graph.
    """

    title = "ONNX Runtime"

    def __init__(
        self, graph: Path, precision: str, device: str, threads: int = 0, options: Options | None = None
    ) -> None:
        super().__init__(precision, device, threads)
        reason = common.missing(device)
        if reason is not None:
            raise BackendError(reason)
        from ..kernels.device import Device

        self._library = common._import()
        self._errors = common._errors(self._library)
        self._graph = graph
        record = read_record(graph)
        self._options = record.options if options is None else options
        preload(self._library)
        self._device_handle: Device = Device.open(facts.cuda_index(device))
        self._stream: Stream = self._device_handle.stream()
        self._compiled: OrderedDict[tuple[tuple[int, ...], ...], _Compiled] = OrderedDict()
        self._bindings: OrderedDict[Any, _Binding] = OrderedDict()
        self._staging: OrderedDict[Any, tuple[Array, DeviceArray]] = OrderedDict()
        self._inputs = record.inputs
        with self._device_handle.activate():
            # What can be refused is refused now. The shape of the trial is most likely the one that will run.
            first = self._create(record.input_shapes)
        if not record.inputs:
            self._inputs = tuple(_named(value) for value in first.get_inputs())
        outputs = record.outputs or tuple(_named(value) for value in first.get_outputs())
        self._ports = tuple(value.port for value in self._inputs)
        self._out_ports = tuple(value.port for value in outputs)
        known = record.input_shapes or tuple(tuple(n or 0 for n in port.shape) for port in self._ports)
        if all(size for shape in known for size in shape):
            self._compiled[known] = _Compiled(first)
        self._run_options = self._no_wait()

    @property
    def version(self) -> str:
        return f"onnxruntime {self._library.__version__}"

    @property
    def options(self) -> Options:
        """The settings in use."""
        return self._options

    @property
    def stream(self) -> Stream:
        """Everything is enqueued here."""
        return self._stream

    @property
    def ports(self) -> tuple[Port, ...]:
        return self._ports

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        return tuple(port.dtype for port in self._ports)

    @property
    def output_dtypes(self) -> tuple[np.dtype[Any], ...]:
        return tuple(port.dtype for port in self._out_ports)

    def output_shapes(self, input_shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Shapes of the outputs; runs the graph once on zeros where the shapes are new, and waits for it."""
        with self._lock, self._device_handle.activate():
            self._require_open()
            return list(self._shapes(self._key(input_shapes)))

    def run_device(self, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> None:
        """Enqueues one run on :attr:`stream`: C-contiguous arrays of the graph's dtypes, in graph order."""
        with self._lock, self._device_handle.activate():
            self._require_open()
            self._enqueue(inputs, outputs)

    @property
    def held_bytes(self) -> int:
        """Device memory that runs use again: of the arenas, and of arrays that host arrays go through."""
        staged = sum(array.nbytes for _, array in self._staging.values())
        return staged + sum(compiled.arena_bytes for compiled in self._compiled.values())

    def give_back(self) -> None:
        """Frees :attr:`held_bytes`, with the provider sessions; shapes that are run again get new ones."""
        with self._lock, self._device_handle.activate():
            self._drop_all()

    # ------------------------------------------------------------------------------------------------------------------

    def _create(self, key: tuple[tuple[int, ...], ...]) -> Any:
        """A provider session for these input shapes; nothing but the arithmetic of sizes may run on the CPU.

        Sizes that have no names of their own stay free.
        """
        refused: Exception | None = None
        for strict in (True, False):
            try:
                session = self._library.InferenceSession(
                    str(self._graph),
                    self._session_options(strict, key),
                    providers=[
                        (
                            "CUDAExecutionProvider",
                            self._options.provider(self._device_handle.index, self.precision, self._stream.handle),
                        )
                    ],
                    disabled_optimizers={"ConvActivationFusion", "ConvAddActivationFusion"},
                    enable_fallback=0,
                )
                break
            except self._errors as error:
                refused = refused or error
        else:
            # Its errors have no kind of their own for short memory. The weights alone take as much as the file.
            weights, free = self._graph.stat().st_size, self._device_handle.memory()[0]
            if weights > free:
                raise DeviceMemoryError(
                    f"{self._graph.name} takes {weights / 1e6:.0f} MB of device memory, {free / 1e6:.0f} MB are free on "
                    f"{self.device}; free what others hold, or use --device cpu"
                ) from refused
            raise BackendError(f"ONNX Runtime refuses {self._graph} on {self.device}: {refused}") from refused
        active = session.get_providers()
        if not active or active[0] != "CUDAExecutionProvider":
            raise BackendError(
                f"CUDAExecutionProvider was asked for {self._graph.name}, ONNX Runtime took "
                f"{', '.join(active) or 'nothing'}; CUDA or cuDNN libraries are missing (see unet-rt doctor), "
                "or use --device cpu"
            )
        strays = common.strays(session, "CUDAExecutionProvider", _ARITHMETIC)
        if strays:
            raise BackendError(
                f"{len(strays)} layer(s) of {self._graph.name} would run on the CPU, {self.device} was asked "
                f"(first: {strays[0]}); use --device cpu"
            )
        return session

    def _session_options(self, strict: bool, key: tuple[tuple[int, ...], ...]) -> Any:
        options = common.session_options(self._library, self.threads)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # Strictly, the arithmetic of sizes is refused, too, which is none of the GPU's business.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(strict)))
        for name, size in sizes_by_name(self._inputs, key).items():
            options.add_free_dimension_override_by_name(name, size)
        return options

    def _no_wait(self, graph_id: int = -1) -> Any:
        options = self._library.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._options.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options

    def _key(self, shapes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        key = tuple(tuple(int(n) for n in shape) for shape in shapes)
        check_shapes(self._ports, key)
        return key

    def _for_shapes(self, key: tuple[tuple[int, ...], ...]) -> _Compiled:
        found = self._compiled.get(key)
        if found is None:
            while len(self._compiled) >= _SHAPES:
                self._forget(next(iter(self._compiled)))
            found = self._compiled[key] = _Compiled(self._create(key))
        self._compiled.move_to_end(key)
        return found

    def _forget(self, key: tuple[tuple[int, ...], ...]) -> None:
        """Gives back the provider session for these shapes, once it has nothing left to do."""
        self._stream.synchronize()
        for bound in [k for k in self._bindings if k[0] == key]:
            del self._bindings[bound]
        del self._compiled[key]

    def _shapes(self, key: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        known = self._for_shapes(key).outputs
        if known is None:
            with self._failures(key):
                known = self._first_run(key)
        return known

    def _first_run(self, key: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        """Runs on zeros, which says what the outputs are."""
        compiled, device = self._for_shapes(key), self._device_handle
        inputs = [device.empty(shape, port.dtype) for shape, port in zip(key, self._ports, strict=True)]
        for array in inputs:
            device.zero(array, self._stream)
        binding = compiled.session.io_binding()
        for port, array in zip(self._ports, inputs, strict=True):
            binding.bind_input(port.name, "cuda", device.index, port.dtype.type, array.shape, array.pointer)
        for port in self._out_ports:
            binding.bind_output(port.name, "cuda", device.index)
        free = device.memory()[0]
        compiled.session.run_with_iobinding(binding, self._run_options)
        self._stream.synchronize()
        compiled.arena_bytes = max(0, free - device.memory()[0])
        compiled.outputs = tuple(tuple(value.shape()) for value in binding.get_outputs())
        del binding
        for array in inputs:
            array.free()
        return compiled.outputs

    @contextlib.contextmanager
    def _failures(self, key: tuple[tuple[int, ...], ...]) -> Iterator[None]:
        """Errors of a run as ours. Where memory is short, the provider session gives back what it holds of it."""
        kinds: tuple[type[Exception], ...] = (DeviceMemoryError, *self._errors)
        try:
            yield
        except kinds as error:
            short = isinstance(error, DeviceMemoryError) or any(words in str(error) for words in _SHORT_OF_MEMORY)
            if short:
                self._stream.synchronize()
                traceback.clear_frames(error.__traceback__)  # whoever keeps the error would keep the session
                self._forget(key)
            if isinstance(error, DeviceMemoryError):  # of the arrays, which says what to do
                raise
            shapes = ", ".join(map(size_text, key))
            kind, way_out = (
                (DeviceMemoryError, "use a smaller --tile or --batch, or free what others hold")
                if short
                else (BackendError, "use --device cpu")
            )
            raise kind(f"ONNX Runtime fails on {self.device} on an input of {shapes}: {error}; {way_out}") from error

    def _enqueue(self, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> None:
        key = self._key([array.shape for array in inputs])
        addresses = (key, *(int(array.pointer) for array in (*inputs, *outputs)))
        if addresses not in self._bindings:
            self._check(key, inputs, outputs)
            while len(self._bindings) >= _BINDINGS:
                self._bindings.popitem(last=False)
            self._bindings[addresses] = self._bind(key, inputs, outputs)
        self._bindings.move_to_end(addresses)
        self._compiled.move_to_end(key)
        with self._failures(key):
            self._launch(self._bindings[addresses])

    def _bind(
        self, key: tuple[tuple[int, ...], ...], inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]
    ) -> _Binding:
        compiled, index = self._for_shapes(key), self._device_handle.index
        binding = compiled.session.io_binding()
        for port, array in zip(self._ports, inputs, strict=True):
            binding.bind_input(port.name, "cuda", index, port.dtype.type, tuple(array.shape), int(array.pointer))
        for port, array in zip(self._out_ports, outputs, strict=True):
            binding.bind_output(port.name, "cuda", index, port.dtype.type, tuple(array.shape), int(array.pointer))
        return _Binding(compiled, binding)

    def _launch(self, bound: _Binding) -> None:
        bound.runs += 1
        bound.compiled.session.run_with_iobinding(bound.binding, self._options_for(bound))

    def _options_for(self, bound: _Binding) -> Any:
        """Run options: with the number of a recording, where recordings are in use and the addresses have come to stay.

        The provider keeps recordings per thread; a set of addresses is recorded for the thread that used it first.
        """
        if not self._options.cuda_graph:
            return self._run_options
        if bound.graph is None and bound.runs > _RUNS_BEFORE_GRAPH and self._recordings < _GRAPHS:
            bound.compiled.graphs += 1
            bound.graph, bound.thread = self._no_wait(bound.compiled.graphs), threading.get_ident()
        return bound.graph if bound.graph is not None and bound.thread == threading.get_ident() else self._run_options

    @property
    def _recordings(self) -> int:
        """Of all provider sessions: one stays when its binding goes, so bindings are not what counts."""
        return sum(compiled.graphs for compiled in self._compiled.values())

    def _check(
        self, key: tuple[tuple[int, ...], ...], inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]
    ) -> None:
        """Arrays as the graph takes and gives them; asked once per set of addresses."""
        shapes = self._shapes(key)
        if len(outputs) != len(shapes):
            raise BackendError(f"{len(outputs)} output(s) given, the graph has {len(shapes)}; pass one array for each")
        wanted = [(port, shape) for port, shape in zip(self._ports, key, strict=True)]
        wanted += [(port, shape) for port, shape in zip(self._out_ports, shapes, strict=True)]
        for (port, shape), array in zip(wanted, (*inputs, *outputs), strict=True):
            if np.dtype(array.dtype) != port.dtype or tuple(array.shape) != shape:
                raise BackendError(
                    f"{port.name} is {size_text(array.shape)} {np.dtype(array.dtype)} on the GPU, the graph has "
                    f"{size_text(shape)} {port.dtype}; pass an array of that shape and dtype"
                )
            if not array.contiguous:
                raise BackendError(f"{port.name} is not contiguous on the GPU; pass a C-contiguous array")

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        arrays = arrays_for(self._ports, inputs)
        key = tuple(array.shape for array in arrays)
        device, stream = self._device_handle, self._stream
        with device.activate():
            shapes = self._shapes(key)
            given = [self._staged(("in", k), a.shape, a.dtype) for k, a in enumerate(arrays)]
            taken = [
                self._staged(("out", k), shape, port.dtype)
                for k, (shape, port) in enumerate(zip(shapes, self._out_ports, strict=True))
            ]
            for array, (pinned, target) in zip(arrays, given, strict=True):
                pinned[...] = array
                device.copy_in(target, pinned, stream)
            self._enqueue([target for _, target in given], [target for _, target in taken])
            for pinned, source in taken:
                device.copy_out(pinned, source, stream)
            stream.synchronize()
            return [pinned.copy() for pinned, _ in taken]

    def _staged(self, slot: tuple[str, int], shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Array, DeviceArray]:
        """Pinned and device memory for an array of :meth:`run`, kept for the next of its shape."""
        key = (slot, tuple(shape), dtype.str)
        found = self._staging.get(key)
        if found is None:
            while len(self._staging) >= 2 * _SHAPES * (len(self._ports) + len(self._out_ports)):
                self._stream.synchronize()
                _, (_, old) = self._staging.popitem(last=False)
                for bound in [k for k in self._bindings if int(old.pointer) in k[1:]]:
                    del self._bindings[bound]
                old.free()
            found = self._staging[key] = (
                self._device_handle.pinned(tuple(shape), dtype),
                self._device_handle.empty(tuple(shape), dtype),
            )
        self._staging.move_to_end(key)
        return found

    def _release(self) -> None:
        with self._device_handle.activate():
            self._drop_all()

    def _drop_all(self) -> None:
        self._stream.synchronize()
        self._bindings.clear()
        self._compiled.clear()
        for _, array in self._staging.values():
            array.free()
        self._staging.clear()


def sizes_by_name(inputs: Sequence[Named], key: Sequence[Sequence[int]]) -> dict[str, int]:
    """Free sizes of the inputs at shapes ``key``; none at all where one name would mean two sizes."""
    found: dict[str, int] = {}
    for value, shape in zip(inputs, key, strict=False):
        for name, size in zip(value.shape, shape, strict=True):
            if isinstance(name, str) and found.setdefault(name, size) != size:
                return {}
    return found


def _named(value: Any) -> Named:
    """An input or output as a provider session describes it."""
    port = common._port(value)
    return Named(port.name, tuple(n if isinstance(n, int | str) else None for n in value.shape), port.dtype.name)


@dataclass
class _Binding:
    """Addresses bound to a provider session; ``graph`` are the run options of their recording."""

    compiled: _Compiled
    binding: Any
    runs: int = 0
    graph: Any = None
    thread: int = 0


# Building -------------------------------------------------------------------------------------------------------------


def build(
    model: Path,
    graph: Path,
    *,
    precision: str,
    device: str,
    tiles: Sequence[Sequence[int]] = (),
    batches: Sequence[int] = (),
    islands: Sequence[str] = (),
) -> Record:
    """Writes ``graph`` in ``precision``, with the settings that the trial found fastest on ``device``.

    Args:
        model: The FP32 graph.
        graph: Where to write; one file, weights included.
        precision: ``"fp32"`` or ``"fp16"``.
        device: ``"cuda:N"``.
        tiles: Spatial sizes that will run, largest first; the trial uses the first, or about 512 px a side.
        batches: Batch sizes that will run; the trial uses the largest, or 1.
        islands: Nodes kept in float32.
    """
    import onnx

    from ..graph.passes.half import half
    from ..graph.passes.up_conv import up_conv

    shapes = trial_shapes(model, tiles, batches)
    proto = onnx.load(str(model))
    if precision == "fp16":
        half(proto, islands=islands)
    inputs, outputs = _name_sizes(proto)
    _record(proto, Record(input_shapes=shapes, inputs=inputs, outputs=outputs))
    variants = {False: graph.with_name(f"{graph.name}.plain")}
    try:
        onnx.save_model(proto, str(variants[False]))
        if up_conv(proto):
            variants[True] = graph.with_name(f"{graph.name}.rewritten")
            onnx.save_model(proto, str(variants[True]))
        record = replace(_search(variants, precision, device, shapes), inputs=inputs, outputs=outputs)
        if not record.options.up_conv:
            proto = onnx.load(str(variants[False]))
    finally:
        for path in variants.values():
            path.unlink(missing_ok=True)
    _record(proto, record)
    onnx.save_model(proto, str(graph))
    return record


def _record(proto: Any, record: Record) -> None:
    entry = next((p for p in proto.metadata_props if p.key == RECORD), None) or proto.metadata_props.add(key=RECORD)
    entry.value = json.dumps(record.to_json(), sort_keys=True)


def _name_sizes(proto: Any) -> tuple[tuple[Named, ...], tuple[Named, ...]]:
    """Gives every free size of an input a name of its own; returns inputs and outputs.

    Exporters call two sizes alike, or none. The names elsewhere go: ONNX Runtime infers them again.
    """
    import onnx

    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in stored]
    for value in inputs:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value <= 0:
                dim.Clear()
                dim.dim_param = f"{value.name}:{axis}"
    for value in proto.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value <= 0:
                dim.Clear()
    del proto.graph.value_info[:]

    def named(value: Any) -> Named:
        kind = value.type.tensor_type
        shape = (n.dim_value if n.dim_value > 0 else n.dim_param or None for n in kind.shape.dim)
        return Named(value.name, tuple(shape), onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name)

    return tuple(named(value) for value in inputs), tuple(named(value) for value in proto.graph.output)


def trial_shapes(model: Path, tiles: Sequence[Sequence[int]], batches: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Input shapes that settings are compared at."""
    from ..graph.report import inspect
    from ..tiling.grid import square_tile

    report = inspect(str(model))
    tile = tuple(tiles[0]) if tiles else square_tile(report.sizes, report.outputs, 512**2)
    batch = report.batch or max(batches, default=1)
    shapes = []
    for port in report.inputs:
        spatial = iter(tile)
        shape = []
        for axis, size in zip(port.axes, port.shape, strict=True):
            if axis == "N":
                shape.append(batch)
            elif axis == "C":
                shape.append(1 if size is None else size)
            else:
                shape.append(next(spatial))
        shapes.append(tuple(shape))
    return tuple(shapes)


def _search(variants: Mapping[bool, Path], precision: str, device: str, shapes: tuple[tuple[int, ...], ...]) -> Record:
    """Greedy: layout, bias and the form of up-convolutions first, then cuDNN's heuristics, then recording.

    Every stage times the best so far and its changes in turn, on the same input; a change whose result is not that of
    the first setting is left out.
    """
    begun = time.perf_counter()
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    fused = [{"prefer_nhwc": True, "fuse_conv_bias": True, "up_conv": True in variants}] if precision == "fp16" else []
    stages: list[list[dict[str, Any]]] = [
        [{}, {"prefer_nhwc": True}, *fused],
        [{"search": "EXHAUSTIVE"}, *([{"up_conv": True}] if True in variants else [])],
        [{"cuda_graph": True}],
    ]
    trials: list[Trial] = []
    best: tuple[Options, _Contender] | None = None
    expected: list[Array] | None = None
    for stage in stages:
        if not stage or (best is None and trials) or time.perf_counter() - begun > _TRIAL_S:
            continue
        running = {} if best is None else {best[0]: best[1]}
        try:
            for changes in stage:
                options = replace(Options() if best is None else best[0], **changes)
                if options in running:
                    continue
                try:
                    contender = _Contender(variants[options.up_conv], precision, device, options, inputs)
                except BackendError as error:
                    trials.append(Trial(options, note=str(error)))
                    continue
                running[options] = contender
                note, expected = _judge(contender, expected, precision)
                if note:
                    trials.append(Trial(options, note=note))
                    running.pop(options).close()
            timings = timing_module.interleave([c.run for c in running.values()], runs=15, seconds=4.0, rest_s=0.0)
        except BaseException:
            for contender in running.values():
                contender.close()
            raise
        times = {options: timing.median_s * 1e3 for options, timing in zip(running, timings, strict=True)}
        trials += [Trial(options, ms) for options, ms in times.items()]
        now = None if best is None else best[0]
        if times:
            fastest = min(times, key=times.__getitem__)
            if now is None or times[fastest] < times[now] * (1 - _GAIN):
                now = fastest
        for options, contender in running.items():
            if options != now:
                contender.close()
        best = None if now is None else (now, running[now])
    if best is None:
        raise BackendError(f"ONNX Runtime runs the graph with no setting on {device}: {trials[0].note}")
    best[1].close()
    for trial in trials:
        log.info("onnxruntime %s %s: %s", device, trial.options.text, trial.note or f"{trial.ms:.3f} ms")
    return Record(best[0], shapes, tuple(trials))


def _judge(contender: _Contender, expected: list[Array] | None, precision: str) -> tuple[str, list[Array] | None]:
    """Warms a setting up, and says what is wrong with its result ("" where nothing is)."""
    try:
        for _ in range(_RUNS_BEFORE_GRAPH + 3):  # plans, memory, and the recording, and a run of that
            contender.run()
        outputs = contender.outputs()
    except BackendError as error:
        return str(error), expected
    if expected is None:
        return "", outputs
    apart = max(_apart(a, b) for a, b in zip(expected, outputs, strict=True))
    allowed = 2.0**-5 if precision == "fp16" else 2.0**-14  # TF32 is off by 2^-11 or so
    return ("" if apart <= allowed else f"its result differs by {apart:.2g} of the range"), expected


def _apart(expected: Array, found: Array) -> float:
    """Largest difference over the range of the expected values; infinite where something is not finite."""
    a, b = expected.astype(np.float64), found.astype(np.float64)
    if not np.isfinite(b).all():
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))


class _Contender:
    """A session with fixed arrays on the device: what is timed is the run alone."""

    def __init__(self, graph: Path, precision: str, device: str, options: Options, inputs: Sequence[Array]) -> None:
        self.session = CudaSession(graph, precision, device, options=options)
        try:
            arrays = arrays_for(self.session.ports, inputs)
            handle, stream = self.session._device_handle, self.session.stream
            with handle.activate():
                self.inputs = [handle.empty(a.shape, a.dtype) for a in arrays]
                for array, target in zip(arrays, self.inputs, strict=True):
                    pinned = handle.pinned(array.shape, array.dtype)
                    pinned[...] = array
                    handle.copy_in(target, pinned, stream)
                    stream.synchronize()
            shapes = self.session.output_shapes([a.shape for a in arrays])
            with handle.activate():
                dtypes = self.session.output_dtypes
                self.targets = [handle.empty(s, d) for s, d in zip(shapes, dtypes, strict=True)]
        except BaseException:
            self.session.close()
            raise

    def run(self) -> None:
        self.session.run_device(self.inputs, self.targets)
        with self.session._device_handle.activate():
            self.session.stream.synchronize()

    def outputs(self) -> list[Array]:
        handle, stream = self.session._device_handle, self.session.stream
        found = []
        with handle.activate():
            for target in self.targets:
                pinned = handle.pinned(target.shape, np.dtype(target.dtype))
                handle.copy_out(pinned, target, stream)
                stream.synchronize()
                found.append(np.array(pinned))
        return found

    def close(self) -> None:
        self.session.close()
        with self.session._device_handle.activate():
            for array in (*self.inputs, *self.targets):
                array.free()
