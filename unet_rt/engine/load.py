"""Engines from folders: the exam is sat again where the machine is another."""

from __future__ import annotations

import copyreg
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineError
from ..system import facts
from .engine import Engine, LoadOptions, log
from .folder import EngineFolder, read_folder
from .spec import EngineSpec

if TYPE_CHECKING:
    from ..backends.session import Session


def load(
    folder: str | Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    accept_unverified: bool = False,
) -> Engine:
    """Loads an engine folder.

    A plan that another GPU, driver or library version cannot run is made again from ``graph.onnx``, which takes as long
    as building it did, and one line says so.

    The record of parity must be there, belong to these bytes, and be inside the budget it names. On another processor or
    library version than recorded the engine sits its exam again first; it is never assumed that parity has travelled.

    Args:
        folder: The engine folder; may be read-only.
        device: ``"cpu"`` or ``"cuda:N"``; None: the one it was built for.
        threads: Threads of the backend; None: as many as affinity and quota allow.
        accept_unverified: Load although the record is missing or cannot be renewed here.

    Raises:
        EngineError: Damaged, foreign or unproven engines, and precisions that the backend did not keep.
        BackendError: The backend or device is missing.
        ParityError: The exam was failed on this machine.
    """
    from .. import backends
    from . import exam

    opened = read_folder(folder)
    spec = opened.spec
    if device is not None and device != spec.device:
        if not facts.is_cuda(spec.device) or device == "cpu" or device.startswith("vulkan"):
            raise EngineError(f"{folder} was built for {spec.device}, not {device}; build again with --device {device}")
        spec = replace(
            spec, device=backends.device(device)
        )  # another GPU of this machine: its fingerprint tells whether it is alike
    if not accept_unverified:
        exam.check_record(opened)
    session, made_again = _session(opened, spec, threads or 0)
    engine = Engine(spec, session, opened, LoadOptions(device, accept_unverified))
    try:
        if session.precision != spec.precision:
            raise EngineError(
                f"{folder} is {spec.precision}, but {spec.backend} runs it in {session.precision} on this machine; "
                "build again here"
            )
        if not accept_unverified:
            exam.sit_if_elsewhere(engine, made_again=made_again)
    except BaseException:
        engine.close()
        raise
    return engine


def _by_path(engine: Engine) -> tuple[Any, ...]:
    """Another process loads the same folder anew: what a library has in memory does not travel."""
    if engine.folder is None:
        raise EngineError("an engine that lies in no folder cannot go to another process; build it with out=")
    return _load_again, (str(engine.folder.path.resolve()), engine.options)


def _load_again(folder: str, options: LoadOptions) -> Engine:
    return load(folder, device=options.device, accept_unverified=options.accept_unverified)


copyreg.pickle(Engine, _by_path)


def _session(opened: EngineFolder, spec: EngineSpec, threads: int) -> tuple[Session, bool]:
    """The session of a folder; and whether its plan was of no use here and is made again: another one, and unproven."""
    from .. import backends
    from ..backends.beside import run_beside

    backend = backends.get(spec.backend)
    graph = opened.file("graph")
    blob = opened.file("engine") if "engine" in opened.files else None
    stale = None if blob is None else backend.stale(blob, spec.device)
    if stale is None:

        def load_threads(count: int) -> Session:
            return backend.load(
                graph,
                precision=spec.precision,
                device=spec.device,
                threads=count,
                blob=blob,
                settings=spec.settings,
            )

        return run_beside(load_threads, spec.streams, threads), False
    log.warning("%s: its plan is of no use here (%s); it is made again from its graph", opened.path, stale)
    with tempfile.TemporaryDirectory(prefix="unet-rt-rebuild-") as work:
        anew = Path(work) / "engine.bin"
        settings = backend.build(
            graph,  # which holds the precision, quantised ranges and FP32 islands included; the model does not
            Path(work) / "built.onnx",
            precision=spec.precision,
            device=spec.device,
            blob=anew,
            tiles=spec.tiles or (spec.tile,),
            batches=spec.batches or (spec.run_batch,),
        )
        session = backend.load(
            Path(work) / "built.onnx",
            precision=spec.precision,
            device=spec.device,
            threads=threads,
            blob=anew,
            settings=settings,
        )
        return session, True
