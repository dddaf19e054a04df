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
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BackendError, DeviceMemoryError, size_text
from ...system import facts
from ..session import Array, Port, SessionBase, arrays_for, check_shapes
from . import library
from .provider import Provider, graph_port, preload, sizes_by_name
from .settings import PROVIDERS_OWN, CudaOptions, Settings

if TYPE_CHECKING:
    from ...kernels.memory import DeviceArray
    from ...kernels.stream import Stream


_SHAPES = 4  # provider sessions that are kept, one per shape, each with its weights, arena and plans
_BINDINGS = 64  # sets of addresses whose bindings are kept
_GRAPHS = 16  # sets of addresses whose launches are recorded; a recording goes with its provider session, not before
RUNS_BEFORE_GRAPH = 2  # runs of a set of addresses before it is taken for one that stays

# The text is all there is: no status code of ONNX Runtime means short memory, and so no exception of its Python module
# does. What the arena and the CUDA calls report arrives as Fail, RuntimeException or EPFail, like any other failure of a
# run. These are the words of the arena, and the number or name that CUDA's calls fail with.
_SHORT_OF_MEMORY = (
    "Failed to allocate memory for requested buffer of size",
    "CUDA failure 2:",  # cudaErrorMemoryAllocation
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass
class _ShapeSession:
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
        settings: What it is run with; the provider's defaults where nothing was tried.
    """

    title = "ONNX Runtime"

    def __init__(
        self, graph: Path, precision: str, device: str, threads: int = 0, settings: Settings = PROVIDERS_OWN
    ) -> None:
        super().__init__(precision, device, threads)
        reason = library.missing(device)
        if reason is not None:
            raise BackendError(reason)
        from ...kernels.device import Device

        self._library = library.import_library()
        self._errors = library.errors(self._library)
        self._options = settings.options
        preload(self._library)
        self.gpu: Device = Device.open(facts.cuda_index(device))
        self._stream: Stream = self.gpu.stream()
        options = settings.options.provider(self.gpu.index, precision, self._stream.handle)
        self._provider = Provider(self._library, graph, options, self.gpu, device, self.threads)
        self._compiled: OrderedDict[tuple[tuple[int, ...], ...], _ShapeSession] = OrderedDict()
        self._bindings: OrderedDict[Any, _Binding] = OrderedDict()
        self._staging: OrderedDict[Any, tuple[Array, DeviceArray]] = OrderedDict()
        self._inputs = settings.inputs
        with self.gpu.activate():
            # What can be refused is refused now. The shape of the trial is most likely the one that will run.
            first = self._create(settings.input_shapes)
        if not settings.inputs:
            self._inputs = tuple(graph_port(value) for value in first.get_inputs())
        outputs = settings.outputs or tuple(graph_port(value) for value in first.get_outputs())
        self._ports = tuple(value.port for value in self._inputs)
        self._out_ports = tuple(value.port for value in outputs)
        known = settings.input_shapes or tuple(tuple(n or 0 for n in port.shape) for port in self._ports)
        if all(size for shape in known for size in shape):
            self._compiled[known] = _ShapeSession(first)
        self._run_options = self._no_wait()

    @property
    def version(self) -> str:
        return f"onnxruntime {self._library.__version__}"

    @property
    def options(self) -> CudaOptions:
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
        with self._lock, self.gpu.activate():
            self._require_open()
            return list(self._shapes(self._key(input_shapes)))

    def run_device(self, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> None:
        """Enqueues one run on :attr:`stream`: C-contiguous arrays of the graph's dtypes, in graph order."""
        with self._lock, self.gpu.activate():
            self._require_open()
            self._enqueue(inputs, outputs)

    @property
    def held_bytes(self) -> int:
        """Device memory that runs use again: of the arenas, and of arrays that host arrays go through."""
        staged = sum(array.nbytes for _, array in self._staging.values())
        return staged + sum(compiled.arena_bytes for compiled in self._compiled.values())

    def give_back(self) -> None:
        """Frees :attr:`held_bytes`, with the provider sessions; shapes that are run again get new ones."""
        with self._lock, self.gpu.activate():
            self._drop_all()

    # ------------------------------------------------------------------------------------------------------------------

    def _create(self, key: tuple[tuple[int, ...], ...]) -> Any:
        """A provider session for these input shapes. Sizes that have no names of their own stay free."""
        return self._provider.session(sizes_by_name(self._inputs, key))

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

    def _for_shapes(self, key: tuple[tuple[int, ...], ...]) -> _ShapeSession:
        found = self._compiled.get(key)
        if found is None:
            while len(self._compiled) >= _SHAPES:
                self._forget(next(iter(self._compiled)))
            found = self._compiled[key] = _ShapeSession(self._create(key))
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
        compiled, device = self._for_shapes(key), self.gpu
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
        compiled, index = self._for_shapes(key), self.gpu.index
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
        if bound.graph is None and bound.runs > RUNS_BEFORE_GRAPH and self._recordings < _GRAPHS:
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
        device, stream = self.gpu, self._stream
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
                self.gpu.pinned(tuple(shape), dtype),
                self.gpu.empty(tuple(shape), dtype),
            )
        self._staging.move_to_end(key)
        return found

    def _release(self) -> None:
        with self.gpu.activate():
            self._drop_all()

    def _drop_all(self) -> None:
        self._stream.synchronize()
        self._bindings.clear()
        self._compiled.clear()
        for _, array in self._staging.values():
            array.free()
        self._staging.clear()


@dataclass
class _Binding:
    """Addresses bound to a provider session; ``graph`` are the run options of their recording."""

    compiled: _ShapeSession
    binding: Any
    runs: int = 0
    graph: Any = None
    thread: int = 0
