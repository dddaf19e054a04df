"""The model line in one function: candidates are measured, held against FP32 on real pixels, and one becomes the engine.

The steps, in their order, each in a module that takes what the steps before it returned::

    build_samples.py     windows of the samples; some are set aside to calibrate INT8 on
    build_task.py        what the outputs mean; what the network makes of the first sample
    build_tiling.py      tile, halo or overlap; the baseline's results (build_baseline.py)
    build_candidates.py  every backend in every precision: made (build_engines.py, build_int8.py), timed
                         (build_timing.py), judged (build_judge.py)
    build_choice.py      the fastest inside the budget, and its tile
    build_record.py      spec, record of parity, exam: what goes into the folder

``build_job.py`` holds what all of them are given, ``build_report.py`` what the caller gets. This module decides about
engines that exist already, in the folder or in a cache, and calls the steps where there is none.
"""

from __future__ import annotations

import logging
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from .. import backends
from ..baseline.folds import open_models
from ..baseline.model import Model, baseline_engine, check_fp32
from ..baseline.tiles import untiled_spec
from ..contract.contract import Contract
from ..engine.budget import Budget
from ..engine.engine import Engine
from ..engine.folder import EngineFolder, read_folder
from ..engine.load import load
from ..engine.spec import Precision
from ..engine.write import check_target, write_folder
from ..errors import BackendError, ContractError, EngineError, OutputError
from ..system import limits
from ..tiling.stitch import Blend
from .cache import Asked, EngineCache, asked_first, asked_of, copy_folder, differs
from .candidates import try_candidates
from .choice import choose
from .engines import Engines
from .job import Deadline, Job, Remarks, Say, parity_seconds
from .measure import Judge
from .record import Outcome, engine_files, final_spec, report_of
from .report import BuildReport
from .samples import describe_first, read_samples, resolve_task, set_aside
from .tiling import choose_tiling

log = logging.getLogger("unet_rt")

SEARCH_MINUTES = 10.0


def build(
    model: str | Path | Sequence[str | Path],
    *,
    samples: Any = None,
    out: str | Path | None = None,
    budget: Budget | None = None,
    contract: Contract | str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    tile: Sequence[int] | None = None,
    halo: str | int = "auto",
    overlap: Sequence[int] | None = None,
    blend: Blend = "gaussian",
    threads: int = 0,
    axes: str | None = None,
    channels: Sequence[int] | None = None,
    keep_exam: bool = True,
    overwrite: bool = False,
    cache: str | Path | None = None,
    search_minutes: float = SEARCH_MINUTES,
    say: Say | None = None,
    report: Callable[[BuildReport], None] | None = None,
) -> Engine:
    """Builds an engine folder and returns the loaded engine.

    Where ``out`` already holds the engine that the same model, samples and options made on this machine, or ``cache``
    does, that one is loaded and nothing is built.

    Args:
        model: ONNX file, bioimage.io package or ``rdf.yaml``; several (folds) become one engine of their mean probability.
        samples: A path, several paths, or arrays: images like those the network will see. None: generated ones, which
            prove FP32 only.
        out: The folder; default: the model's name with ``.urt``, ``ensemble.urt`` for several.
        budget: What may differ from FP32.
        contract: A :class:`Contract` (wins over the model's metadata), or the path of its JSON.
        backend: ``auto`` or a backend's name.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        precision: ``auto``, ``fp32``, ``fp16`` (GPUs), ``bf16`` or ``int8`` (with layers in FP32 where the budget needs it).
        tile: Tile in pixels per axis; None: measured (exact networks), trained tile (others).
        halo: ``auto``, ``exact``, ``measured``, or a number of samples.
        overlap: Pixels shared by blended tiles per axis; default half a tile. Not for exact networks.
        blend: Weights of blended tiles.
        threads: Of backend and kernels; 0: by affinity and quota.
        axes, channels: How samples are to be read.
        keep_exam: Whether a few tiles travel with the engine.
        overwrite: Replace an existing engine, whatever it was built from.
        cache: Folder that keeps engines by everything that decided them (see :mod:`unet_rt.cache`).
        search_minutes: Time for the search; what there is no time for is said in the report. At least one verdict per
            candidate is reached in any case.
        say: Receives progress in sentences.
        report: Receives the :class:`BuildReport`; not called where nothing was built.

    Raises:
        ParityError: No candidate is inside the budget.
        GraphError, ContractError, TileError, ImageError, BackendError, OutputError: see their messages.
    """
    deadline = Deadline(time.monotonic(), 60 * search_minutes)
    if not 0 < search_minutes < float("inf"):
        raise ContractError(f"search_minutes={search_minutes} is not a time; pass minutes above 0")
    say = _timed(say or log.info, deadline)
    paths = [Path(model)] if isinstance(model, str | Path) else [Path(one) for one in model]
    if not paths:
        raise ContractError("no model is given; pass an ONNX file, or several of them")
    path = paths[0] if len(paths) == 1 else Path("ensemble.onnx")
    folder = Path(out) if out is not None else Path(path.name).with_suffix(".urt")
    where, names = _backends(backend, device)
    precisions = _precisions(precision, where)
    budget = budget or Budget()
    asked = asked_first(
        {
            "budget": vars(budget),
            "backends": names,
            "precision": precision,
            "tile": tile,
            "halo": halo,
            "overlap": overlap,
            "blend": blend,
            "threads": threads or limits.threads(),
            "exam": keep_exam,
            "minutes": search_minutes,
        },
        where,
    )
    same = None if overwrite else _same_engine(folder, asked)
    if same is None:
        check_target(folder, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="unet-rt-build-") as temporary, ExitStack() as engines_to_close:
        work = Path(temporary)
        options = contract if isinstance(contract, Contract) else None
        file = Path(contract) if isinstance(contract, str | Path) else None
        opened = open_models(paths, work, options=options, contract=file)
        check_fp32(opened.graph, path.name)
        if samples is None and "fp32" not in precisions:
            what = "to calibrate and to prove parity on" if "int8" in precisions else "to prove parity on"
            raise ContractError(f"precision {precision} needs samples {what}; pass --samples IMAGES")
        if samples is None:
            precisions = ("fp32",)
        remarks = Remarks(say, notes=_notes_on(opened))
        spec = replace(untiled_spec(opened), device=where)
        baseline = engines_to_close.enter_context(baseline_engine(opened, spec, threads=threads))
        opened, drawn = read_samples(opened, samples, axes, channels, remarks)
        asked = {**asked, **asked_of(opened.given, opened.contract, drawn.judging)}
        kept = EngineCache(cache) if cache is not None else None
        if _reused(folder, same, kept, asked, overwrite=overwrite, say=say):
            return load(folder, threads=threads or None)

        drawn, precisions = set_aside(drawn, names, precisions, where, remarks, explicit=precision != "auto")
        seconds = parity_seconds(deadline, names, precisions)
        job = Job(opened, baseline, work, budget, threads, deadline, seconds, remarks)
        reached = {"samples": deadline.spent}
        spec = replace(spec, contract=resolve_task(job, spec, drawn))
        baseline.spec = replace(baseline.spec, contract=spec.contract)
        tiling = choose_tiling(job, spec, drawn, tile=tile, halo=halo, overlap=overlap, blend=blend)
        reached["tiling"] = deadline.spent
        sample, raw = tiling.results.samples[0], tiling.results.values[0][0]
        first = describe_first(sample, raw, tiling.spec.contract_of(0), remarks)
        engines = engines_to_close.enter_context(closing(Engines(job, tiling, drawn.kind)))
        judge = Judge(job, tiling, drawn.calibrating)
        explicit = backend != "auto" or precision != "auto"
        measured = try_candidates(job, tiling, drawn.calibrating, engines, judge, names, precisions, explicit=explicit)
        reached["candidates"] = deadline.spent
        choice = choose(job, tiling, measured, engines, judge, fixed_tile=tile is not None)
        reached["choice"] = deadline.spent
        outcome = Outcome(job, drawn, first, tiling, measured, choice, judge, engines)
        spec = final_spec(outcome, asked)
        files = engine_files(outcome, spec, keep_exam=keep_exam)
        engines_to_close.close()
        try:
            write_folder(folder, spec, files, overwrite=overwrite)
        except OutputError:
            if overwrite or not _holds(folder, asked):
                raise
            say(f"{folder} was built by another process meanwhile")  # from the same: either engine is what was asked
            return load(folder, threads=threads or None)
        _keep(kept, folder, asked, say)
    if report is not None:
        advice = _advice(paths, folder) if drawn.kind == "synthetic" else ""
        report(report_of(outcome, folder, spec, advice, reached))
    return load(folder, threads=threads or None)


def _notes_on(model: Model) -> list[str]:
    """What opening a model came to, in sentences."""
    notes = list[str]()
    if model.members:
        what = "value" if model.contract.task == "regression" else "probability"
        notes.append(f"the mean {what} of {len(model.members)} networks: {', '.join(model.members)}")
    notes += [f"{what} made free: the graph allows any accepted size there" for what in model.freed]
    notes += [f"size stays fixed: {why}" for why in model.fixed]
    return [*notes, *model.left_out]


def _advice(paths: Sequence[Path], folder: Path) -> str:
    """The command that builds the same from images of the user's."""
    command = ["unet-rt", "build", *map(str, paths), "--samples", "YOUR_IMAGES", "--out", str(folder), "--overwrite"]
    return shlex.join(command)


def _timed(say: Say, deadline: Deadline) -> Say:
    """Progress beside the time that it took and may take."""
    return lambda text: say(f"{deadline.spent:.0f} of {deadline.seconds:.0f} s: {text}")


def _same_engine(folder: Path, asked: Asked) -> EngineFolder | None:
    """The engine in ``folder`` that may be what was asked, as far as that is known yet.

    Raises:
        OutputError: It is another one.
    """
    try:
        found = read_folder(folder)
    except EngineError:
        return None
    other = differs(found, asked)
    if other:
        raise OutputError(_another(folder, other))
    return found


def _holds(folder: Path, asked: Asked) -> bool:
    """Whether a folder holds the engine that was asked for."""
    try:
        return not differs(read_folder(folder), asked)
    except EngineError:
        return False


def _another(folder: Path, other: Sequence[str]) -> str:
    return (
        f"{folder} exists, and was built from another {', '.join(other)}; pass --overwrite to replace it, or choose "
        "another --out"
    )


def _reused(
    folder: Path, same: EngineFolder | None, kept: EngineCache | None, asked: Asked, *, overwrite: bool, say: Say
) -> bool:
    """Whether ``folder`` holds what was asked: since an earlier build, or from the cache."""
    if same is not None:
        other = differs(same, asked)
        if other:
            raise OutputError(_another(folder, other))
        say(f"{folder} is up to date")
        _keep(kept, folder, asked, say)
        return True
    found = None if kept is None else kept.get(asked)
    if found is None:
        return False
    try:
        copy_folder(found, folder, overwrite=overwrite)
    except (EngineError, OutputError) as error:
        say(f"not taken from the cache: {error}")
        return False
    say(f"{folder} comes from the cache")
    return True


def _keep(kept: EngineCache | None, folder: Path, asked: Asked, say: Say) -> None:
    """Puts a finished engine into the cache; what stands in the way of that does not take the engine back."""
    if kept is None:
        return
    try:
        kept.put(read_folder(folder), asked)
    except (EngineError, OutputError, OSError) as error:
        say(f"not kept in the cache: {error}")


def _backends(backend: str, device: str) -> tuple[str, list[str]]:
    """The device, and the backends to try on it."""
    where = backends.device(device)
    if backend == "auto":
        return where, backends.require(where)
    module = backends.get(backend)
    if device == "auto" and where != "cpu" and module.missing(where) is not None and module.missing() is None:
        where = "cpu"  # a backend for CPUs was asked by name on a machine with a GPU
    missing = module.missing(where)
    if missing is not None:
        raise BackendError(missing)
    return where, [backend]


def _precisions(precision: str, device: str) -> tuple[Precision, ...]:
    if precision == "auto":
        return ("fp32", "bf16", "int8") if device == "cpu" else ("fp32", "fp16")
    for known in get_args(Precision):
        if precision == known:
            return (known,)
    raise ContractError(f"precision {precision!r} is not one of auto, {', '.join(get_args(Precision))}")
