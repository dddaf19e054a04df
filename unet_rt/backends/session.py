"""What every backend offers: the protocols, what sessions have in common, and the checks of arrays on their way in."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeGuard
from weakref import WeakSet

import numpy as np

from ..errors import BackendError, size_text
from ..system import limits

if TYPE_CHECKING:
    from ..kernels.memory import DeviceArray
    from ..kernels.stream import Stream


Array = np.ndarray[Any, np.dtype[Any]]
BackendSettings = Mapping[str, Any]  # a record in the words of the backend that wrote it


class Session(Protocol):
    """A graph ready to run. Runs of one session are serialised; a resource: close it, or use it in ``with``."""

    @property
    def precision(self) -> str:
        """``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"int8"``, read back from the compiled engine where the library tells."""

    @property
    def device(self) -> str:
        """Where it runs: ``"cpu"``, ``"cuda:0"`` or ``"vulkan:0"``."""

    @property
    def threads(self) -> int:
        """Threads it computes with."""

    @property
    def version(self) -> str:
        """Library and version, e.g. ``"onnxruntime 1.32.0"``."""

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Outputs in graph order for inputs in graph order; the caller owns the returned arrays."""

    def close(self) -> None:
        """Give memory and threads back. Closing twice is allowed, running afterwards is a :class:`BackendError`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class DeviceSession(Session, Protocol):
    """A session on a GPU, which also takes and fills arrays there. What :meth:`run` does stays: arrays of the host."""

    @property
    def stream(self) -> Stream:
        """Everything the session computes is enqueued here; whoever fills inputs or reads outputs uses it, too."""

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        """Of the inputs in graph order, as the graph has them: an FP16 engine takes float16."""

    @property
    def output_dtypes(self) -> tuple[np.dtype[Any], ...]:
        """Of the outputs in graph order."""

    def output_shapes(self, input_shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Shapes of the outputs for inputs of these shapes. May run the graph once per new set of shapes, and waits."""

    def run_device(self, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> None:
        """Enqueues one run on :attr:`stream`: C-contiguous arrays of the graph's dtypes, in graph order.

        Does not wait; allocates nothing after the first runs of a shape. Arrays that are kept and passed again may
        run faster (their addresses can be recorded); they must not be freed while work on the stream uses them.
        """

    @property
    def held_bytes(self) -> int:
        """Device memory that it holds for shapes that were run: their next run uses it, :meth:`give_back` frees it."""

    def give_back(self) -> None:
        """Waits, and frees :attr:`held_bytes`, where other shapes are short of it. Shapes may be run again, as new ones."""

    def at_close(self, release: Callable[[], None]) -> None:
        """Calls ``release`` when the session is closed, before its stream goes: for buffers kept beside it."""


class Backend(Protocol):
    """The functions of a module ``backends/<name>.py``, and what they have to say of it.

    Attributes:
        any_tile: Whether what ``build`` writes runs at any tile that the graph accepts; False: at those it was built for.
        variant: What tells its arithmetic above INT8 from others', for tables: "winograd"; "" for plain convolutions.
    """

    any_tile: bool
    variant: str

    def missing(self, device: str = "cpu") -> str | None:
        """None if usable on ``device``; else one sentence: what is missing and how to get it.

        A broken installation raises :class:`BackendError`.
        """

    def precisions(self, device: str = "cpu") -> tuple[str, ...]:
        """Precisions that this backend computes in on ``device`` of this machine, FP32 first."""

    def build(
        self,
        model: Path,
        graph: Path,
        *,
        precision: str,
        device: str = "cpu",
        blob: Path | None = None,
        tiles: Sequence[Sequence[int]] = (),
        batches: Sequence[int] = (),
    ) -> BackendSettings | None:
        """Write ``graph``, the form this backend runs, from the FP32 ONNX file ``model``.

        Args:
            model: The FP32 graph.
            graph: Where to write.
            precision: What it is to compute in.
            device: Where it is to run.
            blob: Where a backend writes what it compiled or converted ahead of time; the others write none.
            tiles: Spatial sizes that will be run, largest first. A plan takes these alone; a backend without plans
                measures its settings on the first, if at all, and is to take any size: the last are small ones to try.
            batches: Batch sizes that will be run, likewise.

        Returns:
            What was measured for ``graph`` here and :meth:`load` is to be given, as JSON has it; None: nothing.
        """

    def load(
        self,
        graph: Path,
        *,
        precision: str,
        device: str = "cpu",
        threads: int = 0,
        blob: Path | None = None,
        settings: BackendSettings | None = None,
    ) -> Session:
        """Session of what ``build`` wrote, with the settings that it returned; a :class:`DeviceSession` on a GPU.

        0 threads: by affinity and quota.
        """

    def stale(self, blob: Path, device: str = "cpu") -> str | None:
        """Why a plan is of no use on this machine, None if it is. Only backends that write plans have it."""


def on_device(session: Session) -> TypeGuard[DeviceSession]:
    """Whether a session takes arrays on a GPU."""
    return hasattr(session, "run_device")


class ManySession(Session, Protocol):
    """A session that runs tiles beside each other (:mod:`unet_rt.backends.beside`)."""

    def run_many(self, tiles: Sequence[Sequence[Array]]) -> list[list[Array]]:
        """Outputs for the inputs of every tile."""


def takes_many(session: Session) -> TypeGuard[ManySession]:
    """Whether a session runs tiles beside each other."""
    return hasattr(session, "run_many")


# Sessions of this process, and in a forked child those of its parent: a library that is freed there waits for its threads,
# which are not there, so that a child keeps what it cannot free.
_OPEN: WeakSet[SessionBase] = WeakSet()
_OF_PARENT: list[SessionBase] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _OF_PARENT.extend(_OPEN))


class SessionBase(ABC):
    """What the sessions of all backends do alike: what they say of themselves, one run at a time, closing."""

    title = ""  # the library's name in messages

    def __init__(self, precision: str, device: str, threads: int) -> None:
        self._precision, self._device, self._threads = precision, device, thread_count(threads)
        self._lock = threading.RLock()
        self._closed, self._process = False, os.getpid()
        self._at_close: list[Callable[[], None]] = []
        _OPEN.add(self)

    @property
    def precision(self) -> str:
        """The precision it was loaded for; ``build`` and ``load`` have checked it."""
        return self._precision

    @property
    def device(self) -> str:
        return self._device

    @property
    def threads(self) -> int:
        return self._threads

    @property
    @abstractmethod
    def version(self) -> str: ...

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Outputs for ``inputs``, both in graph order; the caller owns what is returned."""
        self._require_process()  # before the lock, which another thread may have held when the process was forked
        with self._lock:
            self._require_open()
            return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        """:meth:`run` of an open session, one at a time."""

    @abstractmethod
    def _release(self) -> None:
        """Gives memory and threads back; called once."""

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError(f"this {self.title} session is closed; load it again")

    def _require_process(self) -> None:
        if os.getpid() != self._process:
            raise BackendError(
                f"this {self.title} session was loaded before the process was forked, and its threads are not in this one; "
                "load the engine in each process, after the fork"
            )

    def at_close(self, release: Callable[[], None]) -> None:
        """Calls ``release`` when the session is closed, before its own memory and threads go."""
        self._at_close.append(release)

    def close(self) -> None:
        if os.getpid() != self._process:
            return  # it is the parent's: its threads cannot be ended here
        with self._lock:
            if not self._closed:
                self._closed = True
                try:
                    while self._at_close:
                        self._at_close.pop()()
                finally:
                    self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FunctionSession(SessionBase):
    """A library used directly, in the form of a session: a function of the graph's inputs, in graph order."""

    def __init__(self, run: Callable[[Sequence[Array]], list[Array]], title: str, threads: int) -> None:
        super().__init__("fp32", "cpu", threads)
        self.title = title
        self._call = run

    @property
    def version(self) -> str:
        return self.title

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        return self._call(inputs)

    def _release(self) -> None:
        del self._call  # and with it what the function holds


@dataclass(frozen=True)
class Port:
    """An input of a graph: name, shape with None for free sizes, dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


MOST_THREADS = 1024  # libraries start what is asked, and 100,000 threads take minutes to start and gigabytes of stacks


def thread_count(threads: int) -> int:
    """Threads to compute with: what is asked, or what affinity and quota allow for 0."""
    if threads < 0:
        raise BackendError(f"{threads} threads asked; pass 1 or more, or 0 for as many as this process may use")
    if threads > MOST_THREADS:
        raise BackendError(
            f"{threads} threads asked, more than {MOST_THREADS}; pass 0 for as many as this process may use"
        )
    return threads or limits.threads()


def arrays_for(ports: Sequence[Port], inputs: Sequence[Array]) -> list[Array]:
    """Inputs as the graph takes them: C-contiguous, of its shapes and dtypes.

    Float arrays are cast to the graph's float dtype (a float16 graph takes float32 tiles); anything else is cast only
    if no value changes.

    Raises:
        BackendError: Wrong number of inputs, wrong shape, or values that the graph's dtype cannot hold.
    """
    check_shapes(ports, [array.shape for array in inputs])
    return [_array_for(port, array) for port, array in zip(ports, inputs, strict=True)]


def check_shapes(ports: Sequence[Port], shapes: Sequence[Sequence[int]]) -> None:
    """BackendError where there are more or fewer inputs than ports, or one has another shape than its port."""
    if len(shapes) != len(ports):
        names = ", ".join(port.name for port in ports)
        raise BackendError(
            f"{len(shapes)} input(s) given, the graph has {len(ports)} ({names}); pass one array for each"
        )
    for port, shape in zip(ports, shapes, strict=True):
        fits = len(shape) == len(port.shape) and all(
            want is None or want == have for want, have in zip(port.shape, shape, strict=True)
        )
        if not fits:
            raise BackendError(
                f"input {port.name} has shape {size_text(shape)}, the graph takes {size_text(port.shape)}; "
                "'?' sizes are free"
            )


def _array_for(port: Port, array: Array) -> Array:
    if array.dtype == port.dtype:
        return np.ascontiguousarray(array)
    with np.errstate(invalid="ignore", over="ignore"):  # values that do not fit are found below
        cast = np.asarray(array, dtype=port.dtype, order="C")
    if array.dtype.kind == "f" and port.dtype.kind == "f":
        fits = port.dtype.itemsize >= array.dtype.itemsize or np.array_equal(np.isinf(cast), np.isinf(array))
    else:
        fits = np.array_equal(cast, array)
    if not fits:
        way_out = f"pass {port.dtype} values"
        if port.dtype.kind in "iu" and array.size:
            limits = np.iinfo(port.dtype)
            way_out = (
                f"give grey levels as they are, whole numbers from {limits.min} to {limits.max} (--normalize none)"
            )
        raise BackendError(
            f"input {port.name} is {array.dtype} with values that the graph's {port.dtype} cannot hold; {way_out}"
        )
    return cast
