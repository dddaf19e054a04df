"""A plan ready to run: one execution context per profile, one block of scratch memory for all, one stream.

The block is as large as the profiles that were used take: where memory does not hold what a large tile or batch needs, the
others run.

What is enqueued often is recorded: the second run on the same arrays is captured as a CUDA graph, the third replays it.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BackendError, DeviceMemoryError, EngineError, TileError, size_text
from ..session import Array, Port, SessionBase, arrays_for
from .build import failure, logger, remedy, title
from .plan import PlanHeader
from .recording import Recordings
from .runtime import deserialize, runtime_config

if TYPE_CHECKING:
    from ...kernels.device import Device
    from ...kernels.memory import DeviceArray
    from ...kernels.stream import Stream


_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool"
}  # fmt: skip


_OPEN: weakref.WeakSet[TensorRtSession] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    """What is still open when the interpreter ends is closed before the device is (which was opened before)."""
    atexit.register(_close_all)


def _close_all() -> None:
    for session in list(_OPEN):
        session.close()


class TensorRtSession(SessionBase):
    """A plan in TensorRT or TensorRT-RTX, on one GPU."""

    title = "TensorRT"

    def __init__(
        self, trt: Any, header: PlanHeader, plan: bytes, kernels: bytes, device: Device, name: str, threads: int
    ) -> None:
        super().__init__(header.precision, name, threads)
        self.header = header
        self._trt, self._device_ = trt, device
        self._contexts: dict[int, _Context] = {}
        self._staged: tuple[int, _Staging] | None = None
        with device.activate():
            self._engine, self._runtime = deserialize(trt, plan)
            self._inputs, self._outputs = header.inputs, header.outputs  # an engine has an order of its own
            held = {self._engine.get_tensor_name(k) for k in range(self._engine.num_io_tensors)}
            if held != {*self._inputs, *self._outputs}:
                raise EngineError(
                    f"the plan takes and fills {sorted(held)}, which is not what its header says; build again"
                )
            self._input_dtypes = tuple(self._dtype(n) for n in self._inputs)
            self._output_dtypes = tuple(self._dtype(n) for n in self._outputs)
            self._config, self._cache = runtime_config(trt, self._engine, kernels)
            self._stream = device.stream()
        self._recordings = Recordings(self._stream, self.version)
        self._scratch: DeviceArray | None = None
        _OPEN.add(self)
        _close_at_exit()

    def _dtype(self, name: str) -> np.dtype[Any]:
        found = self._engine.get_tensor_dtype(name).name
        if found not in _DTYPES:
            raise BackendError(f"tensor {name} of the plan is {found}, which NumPy cannot hold; cast it in the graph")
        return np.dtype(_DTYPES[found])

    def _scratch_for(self, index: int) -> DeviceArray:
        """Memory for runs of a profile: one block for all of them, as runs of one stream follow each other."""
        size = max(int(self._engine.get_device_memory_size_for_profile_v2(index)), 256)
        if self._scratch is not None and self._scratch.nbytes >= size:
            return self._scratch
        free = self._device_.memory()[0] + self.scratch_bytes
        if size > free:
            raise DeviceMemoryError(
                f"{self.header.profiles[index]} needs {size / 1e6:.0f} MB of device memory beside the weights, "
                f"{free / 1e6:.0f} MB are free on {self.device}; use a smaller --tile or --batch, or free the GPU"
            )
        self._drop_scratch()
        self._scratch = self._device_.empty((size,), np.dtype(np.uint8))
        return self._scratch

    def _drop_scratch(self) -> None:
        """Frees the scratch memory, with the contexts and recordings that use it."""
        self._stream.synchronize()
        self._recordings.clear()
        self._contexts.clear()
        if self._scratch is not None:
            self._scratch.free()
            self._scratch = None

    @property
    def version(self) -> str:
        return f"{self._trt.__name__} {self._trt.__version__}"

    @property
    def stream(self) -> Stream:
        return self._stream

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        return self._input_dtypes

    @property
    def output_dtypes(self) -> tuple[np.dtype[Any], ...]:
        return self._output_dtypes

    @property
    def scratch_bytes(self) -> int:
        """Device memory that runs share, beside weights and arrays."""
        return 0 if self._scratch is None else int(self._scratch.nbytes)

    @property
    def held_bytes(self) -> int:
        """Device memory that runs use again: what they share, and the arrays that host arrays go through."""
        staged = [] if self._staged is None else [*self._staged[1].inputs, *self._staged[1].outputs]
        return self.scratch_bytes + sum(int(array.nbytes) for array in staged)

    def give_back(self) -> None:
        """Frees :attr:`held_bytes`; the next run takes what it needs."""
        with self._lock, self._device_.activate():
            self._drop_staging()
            self._drop_scratch()

    @property
    def opened(self) -> Device:
        """The GPU that it runs on."""
        return self._device_

    def inspect(self) -> str:
        """What the engine tells of its layers, as JSON."""
        with self._lock, self._device_.activate():
            self._require_open()
            inspector = self._engine.create_engine_inspector()
            return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def forget(self, arrays: Sequence[DeviceArray]) -> None:
        """Drops the recordings of runs on ``arrays``, which are about to be freed. Waits for the stream."""
        with self._lock, self._device_.activate():
            gone = {int(array.pointer) for array in arrays}
            self._stream.synchronize()
            self._recordings.forget(gone)
            for context in self._contexts.values():
                context.addresses = ()

    def kernels(self) -> bytes:
        """What TensorRT-RTX compiled so far, to be stored with the plan; ``b""`` for TensorRT."""
        with self._lock, self._device_.activate():
            return b"" if self._cache is None else bytes(self._cache.serialize())

    def output_shapes(self, input_shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Shapes of the outputs for inputs of these shapes.

        Raises:
            TileError: Shapes that the plan does not take.
        """
        with self._lock, self._device_.activate():
            self._require_open()
            return list(self._context(self._profile(input_shapes)).output_shapes)

    def run_device(self, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> None:
        """Enqueues one run on :attr:`stream`: C-contiguous arrays of the plan's dtypes, in graph order. Does not wait.

        Raises:
            TileError: Shapes that the plan does not take.
            BackendError: Other arrays than the plan's, or a launch that fails.
        """
        with self._lock, self._device_.activate():
            self._require_open()
            index = self._profile([array.shape for array in inputs])
            context = self._context(index)
            self._check(inputs, outputs, context)
            addresses = [int(array.pointer) for array in (*inputs, *outputs)]
            self._enqueue(context, (index, *addresses), addresses)

    def _profile(self, shapes: Sequence[Sequence[int]]) -> int:
        index = self.header.profile_of(shapes)
        if index is None:
            given = ", ".join(map(size_text, shapes))
            raise TileError(
                f"an input of {given} asked, the plan was built for {self.header.taken()} and no shape is built at run "
                "time; use one of these, or build again with --tile"
            )
        return index

    def _check(self, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray], context: _Context) -> None:
        given = [(tuple(a.shape), np.dtype(a.dtype)) for a in (*inputs, *outputs)]
        shapes = [*self.header.profiles[context.profile].inputs, *context.output_shapes]
        wanted = list(zip(shapes, (*self._input_dtypes, *self._output_dtypes), strict=True))
        if given != wanted:
            raise BackendError(
                f"arrays of {_listed(given)} given, the plan takes and fills {_listed(wanted)}; allocate them by "
                "output_shapes, input_dtypes and output_dtypes"
            )

    def _context(self, index: int) -> _Context:
        """The execution context of a profile, made at its first use."""
        found = self._contexts.get(index)
        if found is None:
            found = self._contexts[index] = self._new_context(index)
        return found

    def _new_context(self, index: int) -> _Context:
        trt, messages = self._trt, logger(self._trt)[1]
        scratch = self._scratch_for(index)
        messages.take()
        if self._config is not None:
            native = self._engine.create_execution_context(self._config)
        else:
            native = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if native is None:
            text = messages.take()
            raise failure(f"{title(trt)} makes no execution context: {text or 'no reason given'}; {remedy(text)}", text)
        if index and not native.set_optimization_profile_async(index, self._stream.handle):
            raise BackendError(f"profile {self.header.profiles[index]} cannot be set: {messages.take()}; build again")
        for name, shape in zip(self._inputs, self.header.profiles[index].inputs, strict=True):
            if not native.set_input_shape(name, shape):
                raise BackendError(f"input {name} cannot be {shape}: {messages.take()}; build the engine again")
        native.set_device_memory(int(scratch.pointer), int(scratch.nbytes))
        self._stream.synchronize()  # what setting the profile copied
        shapes = [tuple(int(n) for n in native.get_tensor_shape(name)) for name in self._outputs]
        if any(n < 0 for shape in shapes for n in shape):
            raise BackendError(
                f"an output's size depends on pixels, not on the tile ({shapes}); such graphs have no tiles"
            )
        return _Context(index, native, shapes)

    def _enqueue(self, context: _Context, key: tuple[int, ...], addresses: Sequence[int]) -> None:
        # TensorRT-RTX tells whether it can be recorded.
        possible = getattr(context.native, "is_stream_capturable", lambda stream: True)
        self._recordings.run(key, lambda: self._execute(context, addresses), possible)

    def _execute(self, context: _Context, addresses: Sequence[int]) -> None:
        native = context.native
        if context.addresses != tuple(addresses):
            for name, address in zip((*self._inputs, *self._outputs), addresses, strict=True):
                native.set_tensor_address(name, address)
            context.addresses = tuple(addresses)
        if not native.execute_async_v3(self._stream.handle):
            context.addresses = ()
            text = logger(self._trt)[1].take()
            raise failure(
                f"{title(self._trt)} fails to run {self.header.profiles[context.profile]}: "
                f"{text or 'no reason given'}; {remedy(text)}",
                text,
            )

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        """Runs arrays of the host; a batch that the plan does not take is padded with its last tile, or cut."""
        ranks = [len(shape) for shape in self.header.profiles[0].inputs]
        ports = [
            Port(name, (None,) * rank, dtype)
            for name, rank, dtype in zip(self._inputs, ranks, self._input_dtypes, strict=True)
        ]
        arrays = arrays_for(ports, inputs)
        shapes = [a.shape for a in arrays]
        size = self._batch_for(shapes)
        if self.header.profile_of(shapes) is not None or size is None:
            return self._run_shape(arrays)
        parts = []
        for start in range(0, len(arrays[0]), size):
            part = [a[start : start + size] for a in arrays]
            short = size - len(part[0])
            if short:
                part = [np.concatenate([a, np.repeat(a[-1:], short, axis=0)]) for a in part]
            parts.append([y[: size - short] for y in self._run_shape(part)])
        return [np.concatenate(ys) for ys in zip(*parts, strict=True)]

    def _batch_for(self, shapes: Sequence[Sequence[int]]) -> int | None:
        """The smallest batch of this tile that holds these inputs, else the largest; None: not a tile of the plan."""
        tile = [tuple(shape[1:]) for shape in shapes]
        batches = [
            profile.batch
            for profile in self.header.profiles
            if [shape[1:] for shape in profile.inputs] == tile
            and all(len(shape) >= len(profile.tile) + 2 for shape in profile.inputs)
        ]
        rows = shapes[0][0]
        return min((n for n in batches if n >= rows), default=max(batches, default=None))

    def _run_shape(self, arrays: Sequence[Array]) -> list[Array]:
        device, stream = self._device_, self._stream
        index = self._profile([a.shape for a in arrays])
        with device.activate():
            staging = self._staging(index)
            for pinned, target, array in zip(staging.host_inputs, staging.inputs, arrays, strict=True):
                np.copyto(pinned, array)
                device.copy_in(target, pinned, stream)
            self.run_device(staging.inputs, staging.outputs)
            for pinned, source in zip(staging.host_outputs, staging.outputs, strict=True):
                device.copy_out(pinned, source, stream)
            stream.synchronize()
            return [pinned.copy() for pinned in staging.host_outputs]

    def _staging(self, index: int) -> _Staging:
        """Arrays that runs of host arrays go through: those of the last profile are kept."""
        if self._staged is not None and self._staged[0] == index:
            return self._staged[1]
        self._drop_staging()
        shapes = self._context(index).output_shapes
        device = self._device_
        inputs = list(zip(self.header.profiles[index].inputs, self._input_dtypes, strict=True))
        outputs = list(zip(shapes, self._output_dtypes, strict=True))
        staging = _Staging(
            [device.empty(*spec) for spec in inputs],
            [device.empty(*spec) for spec in outputs],
            [device.pinned(*spec) for spec in inputs],
            [device.pinned(*spec) for spec in outputs],
        )
        self._staged = index, staging
        return staging

    def _drop_staging(self) -> None:
        if self._staged is None:
            return
        staging = self._staged[1]
        self.forget([*staging.inputs, *staging.outputs])
        for array in (*staging.inputs, *staging.outputs):
            array.free()
        self._staged = None

    def _release(self) -> None:
        with self._device_.activate():
            self._stream.synchronize()
            self._drop_staging()
            self._drop_scratch()  # and contexts, which go before the engine, as the engine before its runtime
            self._config = self._cache = None
            self._engine = None
            self._runtime = None


class _Context:
    """An execution context of one profile, and the addresses that were set last."""

    def __init__(self, profile: int, native: Any, output_shapes: list[tuple[int, ...]]) -> None:
        self.profile, self.native, self.output_shapes = profile, native, output_shapes
        self.addresses: tuple[int, ...] = ()


class _Staging:
    """Device and pinned host arrays of one profile."""

    def __init__(
        self,
        inputs: list[DeviceArray],
        outputs: list[DeviceArray],
        host_inputs: list[Array],
        host_outputs: list[Array],
    ) -> None:
        self.inputs, self.outputs, self.host_inputs, self.host_outputs = inputs, outputs, host_inputs, host_outputs


def _listed(arrays: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return ", ".join(f"{size_text(shape)} {dtype}" for shape, dtype in arrays)
