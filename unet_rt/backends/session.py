"""What every backend offers: the protocols, and the checks of arrays on their way in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from unet_rt import machine
from unet_rt.errors import BackendError

Array = np.ndarray[Any, np.dtype[Any]]


class Session(Protocol):
    """A graph ready to run. Runs of one session are serialised; a resource: close it, or use it in ``with``."""

    @property
    def precision(self) -> str:
        """``"fp32"`` or ``"bf16"``, read back from the compiled engine where the library tells."""

    @property
    def device(self) -> str:
        """Where it runs: ``"cpu"`` or ``"cuda:0"``."""

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


class Backend(Protocol):
    """The functions of a module ``backends/<name>.py``."""

    def missing(self, device: str = "cpu") -> str | None:
        """None if usable on ``device``; else one sentence: what is missing and how to get it.

        A broken installation raises :class:`BackendError`.
        """

    def precisions(self, device: str = "cpu") -> tuple[str, ...]:
        """Precisions that this backend computes in on ``device`` of this machine, FP32 first."""

    def build(self, model: Path, graph: Path, *, precision: str, device: str = "cpu") -> None:
        """Write ``graph``, the form this backend runs, from the FP32 ONNX file ``model``."""

    def load(self, graph: Path, *, precision: str, device: str = "cpu", threads: int = 0) -> Session:
        """Session of a graph that ``build`` wrote; 0 threads: as many as affinity and quota allow."""


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
    return threads or machine.threads()


def arrays_for(ports: Sequence[Port], inputs: Sequence[Array]) -> list[Array]:
    """Inputs as the graph takes them: C-contiguous, of its shapes and dtypes.

    Float arrays are cast to the graph's float dtype (a float16 graph takes float32 tiles); anything else is cast only
    if no value changes.

    Raises:
        BackendError: Wrong number of inputs, wrong shape, or values that the graph's dtype cannot hold.
    """
    if len(inputs) != len(ports):
        names = ", ".join(port.name for port in ports)
        raise BackendError(
            f"{len(inputs)} input(s) given, the graph has {len(ports)} ({names}); pass one array for each"
        )
    return [_array_for(port, array) for port, array in zip(ports, inputs, strict=True)]


def _array_for(port: Port, array: Array) -> Array:
    fits = len(array.shape) == len(port.shape) and all(
        want is None or want == have for want, have in zip(port.shape, array.shape, strict=True)
    )
    if not fits:
        wanted = "x".join("?" if size is None else str(size) for size in port.shape)
        given = "x".join(str(size) for size in array.shape)
        raise BackendError(f"input {port.name} has shape {given}, the graph takes {wanted}; '?' sizes are free")
    if array.dtype == port.dtype:
        return np.ascontiguousarray(array)
    with np.errstate(invalid="ignore", over="ignore"):  # values that do not fit are found below
        cast = np.asarray(array, dtype=port.dtype, order="C")
    if array.dtype.kind == "f" and port.dtype.kind == "f":
        fits = port.dtype.itemsize >= array.dtype.itemsize or np.array_equal(np.isinf(cast), np.isinf(array))
    else:
        fits = np.array_equal(cast, array)
    if not fits:
        raise BackendError(
            f"input {port.name} is {array.dtype} with values that the graph's {port.dtype} cannot hold; "
            f"pass {port.dtype} values"
        )
    return cast
