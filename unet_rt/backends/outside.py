"""Backends of other packages: found by their entry points, held to the protocol at every call.

A package offers one under the group ``unet_rt.backends``; the name is what ``--backend`` takes, the object a module (or
anything) with the functions of :class:`~unet_rt.backends.session.Backend`::

    [project.entry-points."unet_rt.backends"]
    npu = "acme_npu.backend"

Whatever its code raises becomes a :class:`BackendError` that names the package, so that a build goes on with the others.
What it returns is checked for form here; whether the numbers are right is what parity and the exam find out, as for every
backend. Its sessions take and return arrays of the host; where they compute is their own matter.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from ..errors import BackendError, UnetRtError
from ..system import facts
from .session import Array, Backend, BackendSettings, Session, SessionBase

log = logging.getLogger("unet_rt")
T = TypeVar("T")

_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_FUNCTIONS = ("missing", "precisions", "build", "load")


@functools.cache
def outside_names(reserved: frozenset[str]) -> tuple[str, ...]:
    """Names that other packages offer backends under, sorted; those of this package's own, ``reserved``, are not theirs."""
    found = {entry.name for entry in facts.backend_entry_points()}
    for name in sorted(found & reserved):
        log.warning("a package offers a backend %r, which is this package's own name; it is left out", name)
    return tuple(sorted(found - reserved))


@functools.cache
def outside_backend(name: str) -> Backend:
    """The backend that another package offers under a name, held to the protocol.

    Raises:
        BackendError: None offers it.
    """
    entries = tuple(entry for entry in facts.backend_entry_points() if entry.name == name)
    if not entries:
        raise BackendError(f"no installed package offers a backend {name!r}")
    return cast(Backend, OutsideBackend(name, entries))


class OutsideBackend:
    """A backend of another package, with the checks that this package's own do not need."""

    def __init__(self, name: str, entries: Sequence[EntryPoint]) -> None:
        self.name, self._entries = name, tuple(entries)
        self._loaded: Any = None

    @property
    def _package(self) -> str:
        return " and ".join(sorted({facts.package_of(entry) for entry in self._entries}))

    @property
    def _module(self) -> Any:
        """What the entry point names."""
        if self._loaded is None:
            if len(self._entries) > 1:
                raise BackendError(f"{self._package} both offer a backend {self.name!r}; uninstall one of them")
            found = self.call("be imported", self._entries[0].load)
            absent = [function for function in _FUNCTIONS if not callable(getattr(found, function, None))]
            if absent:
                raise self.wrong(f"lacks {' and '.join(absent)}")
            self._loaded = found
        return self._loaded

    @property
    def any_tile(self) -> bool:
        """Whether its graphs run at any tile; where it does not tell, they do."""
        return bool(getattr(self._module, "any_tile", True))

    @property
    def variant(self) -> str:
        """What tells its arithmetic from others', for tables; "" where it does not tell."""
        return str(getattr(self._module, "variant", ""))

    def wrong(self, what: str) -> BackendError:
        return BackendError(f"backend {self.name} of {self._package} {what}; ask who made it, or use another --backend")

    def call(self, action: str, function: Callable[[], T]) -> T:
        """What a function of the other package returns; whatever it raises as a BackendError."""
        try:
            return function()
        except UnetRtError:
            raise
        except Exception as error:
            raise self.wrong(f"cannot {action} ({type(error).__name__}: {error})") from error

    def missing(self, device: str = "cpu") -> str | None:
        """None if usable on ``device``; else why not. A package that is broken is one that cannot be used."""
        try:
            said: Any = self.call("say whether it is usable", lambda: self._module.missing(device))
            if said is None:
                self.precisions(device)
            elif not isinstance(said, str):
                raise self.wrong(f"says {said!r} when asked what is missing")
        except BackendError as error:
            return str(error)
        return said if said is None else str(said)

    def precisions(self, device: str = "cpu") -> tuple[str, ...]:
        """Precisions that it says it computes in."""
        said = self.call("name its precisions", lambda: tuple(self._module.precisions(device)))
        if not said or not all(precision in _PRECISIONS for precision in said):
            raise self.wrong(f"names the precisions {said}, of which {', '.join(_PRECISIONS)} are known")
        return said

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
        """As the protocol has it; refuses one that wrote no graph, or returned settings that no file can hold."""
        if precision not in self.precisions(device):
            raise BackendError(f"{self.name} has no {precision} on {device}; use another --precision or --backend")
        settings = self.call(
            f"build {model.name} in {precision}",
            lambda: self._module.build(
                model, graph, precision=precision, device=device, blob=blob, tiles=tiles, batches=batches
            ),
        )
        if not graph.is_file():
            raise self.wrong(f"wrote no {graph.name}")
        if settings is None:
            return None
        try:
            kept = json.loads(json.dumps(settings, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise self.wrong(f"returned settings that are no JSON ({error})") from error
        if not isinstance(settings, Mapping):
            raise self.wrong(f"returned {type(settings).__name__} for settings, not a mapping")
        return dict(kept)

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
        """Its session, every run of which is checked."""
        session = self.call(
            f"load {graph.name}",
            lambda: self._module.load(
                graph, precision=precision, device=device, threads=threads, blob=blob, settings=settings
            ),
        )
        return OutsideSession(self, session, precision, device, threads)

    def stale(self, blob: Path, device: str = "cpu") -> str | None:
        """Why its plan is of no use here; None where it is, or where it does not tell."""
        tell = getattr(self._module, "stale", None)
        return None if tell is None else self.call("say whether its plan is usable", lambda: tell(blob, device))


class OutsideSession(SessionBase):
    """A session of another package's: inputs it may not change, outputs that are the caller's own."""

    def __init__(self, backend: OutsideBackend, session: Any, precision: str, device: str, threads: int) -> None:
        super().__init__(precision, device, threads)
        self.title = backend.name
        self._backend, self._session = backend, session
        said = {name: getattr(session, name, None) for name in ("precision", "device", "version")}
        wrong = [name for name, value in said.items() if not isinstance(value, str)]
        wrong += [name for name in ("run", "close") if not callable(getattr(session, name, None))]
        if wrong:
            raise backend.wrong(f"returned a session without {' and '.join(wrong)}")
        if (said["precision"], said["device"]) != (precision, device):
            close = getattr(session, "close")  # noqa: B009 - checked above
            backend.call("close its session", close)
            raise backend.wrong(
                f"was asked for {precision} on {device} and loaded {said['precision']} on {said['device']}"
            )

    @property
    def version(self) -> str:
        return str(self._session.version)

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        given = [array.view() for array in inputs]
        for view in given:
            view.flags.writeable = False
        outputs = self._backend.call("run", lambda: self._session.run(given))
        if not isinstance(outputs, list | tuple) or not all(isinstance(y, np.ndarray) for y in outputs):
            raise self._backend.wrong(f"returned {type(outputs).__name__} from a run, not a list of arrays")
        for y in outputs:
            if y.dtype not in (np.dtype("f2"), np.dtype("f4")):
                raise self._backend.wrong(f"returned an output of {y.dtype}, not float32 or float16")
        return [y.copy() for y in outputs]  # one may be a buffer of its own, filled anew by the next run

    def _release(self) -> None:
        self._backend.call("close its session", self._session.close)
