"""The model line in one function: candidates are measured, held against FP32 on real pixels, and one becomes the engine.

The steps, in their order, each in a module that takes what the steps before it returned::

    samples.py     windows of the samples; some are set aside to calibrate INT8 on; what the outputs mean, and what the
                   network makes of the first window
    tiling.py      tile, halo or overlap; the baseline's results; a widened file is held against itself (own.py)
    candidates.py  every backend in every precision: made (engines.py, int8.py), timed and judged (measure.py)
    choice.py      the fastest inside the budget, and its tile
    record.py      spec, record of parity, exam: what goes into the folder

``job.py`` holds what all of them are given, ``report.py`` what the caller gets. This module decides about engines that
exist already, in the folder or in a cache (``cache.py``), and calls the steps where there is none.
"""

from __future__ import annotations

import logging
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from .. import backends
from ..baseline.model import Model, baseline_engine
from ..baseline.samples import ReadOptions
from ..baseline.tiles import untiled_spec
from ..contract.contract import Contract
from ..engine.budget import Budget
from ..engine.engine import Engine
from ..engine.folder import EngineFolder, FileKind, read_folder
from ..engine.load import load
from ..engine.spec import EngineSpec, Precision
from ..engine.write import check_target, write_folder
from ..errors import BackendError, ContractError, EngineError, GraphError, OutputError
from ..system.names import path_of
from ..tiling.axis import per_axis
from ..tiling.placement import Blend, PlacementRule
from .cache import Digests, EngineCache, copy_folder, digest_inputs, digest_request, list_differences
from .candidates import try_candidates
from .choice import choose
from .engines import Engines
from .job import BuildJob, BuildOptions, Deadline, Equal, Remarks, Say, Scope, parity_seconds
from .measure import Judge
from .missing import Inquiry
from .own import hold_to_file
from .record import Outcome, finish_spec, make_report, write_files
from .report import BuildReport
from .samples import Samples, describe_first, read_samples, set_aside, settle_contract
from .tiling import choose_tiling

log = logging.getLogger("unet_rt")

SEARCH_MINUTES = 10.0


@dataclass(frozen=True)
class Target:
    """Where an engine goes, and where the same one may be already.

    Attributes:
        folder: The engine folder.
        overwrite: Whether an engine there is replaced, whatever it was built from.
        cache: Engines that are kept; None: nowhere.
        say: Receives what was found.
    """

    folder: Path
    overwrite: bool
    cache: EngineCache | None
    say: Say


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
    tile: int | Sequence[int] | None = None,
    halo: str | int = "auto",
    overlap: int | Sequence[int] | None = None,
    blend: Blend = "gaussian",
    placement: PlacementRule = "even",
    threads: int = 0,
    axes: str | None = None,
    channels: Sequence[int] | str | None = None,
    series: int | str | None = None,
    nodata: float | None = None,
    keep_exam: bool = True,
    overwrite: bool = False,
    cache: str | Path | None = None,
    search_minutes: float = SEARCH_MINUTES,
    equal: Equal = "rounding",
    say: Say | None = None,
    tell: Say | None = None,
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
        device: ``auto``, ``cpu``, ``cuda:N`` or ``vulkan:N``.
        precision: ``auto``, ``fp32``, ``fp16`` (GPUs), ``bf16`` or ``int8`` (with layers in FP32 where the budget needs it).
        tile: Tile in pixels per axis, a number for all axes; None: measured (exact networks), trained tile (others).
        halo: ``auto``, ``exact``, ``measured``, or a number of samples.
        overlap: Pixels shared by blended tiles per axis, a number for all axes; default half a tile (``monai``: a quarter).
            Not for exact networks.
        blend: Weights of blended tiles.
        placement: Where blended tiles lie, and whose weights they have: ``even``, or as ``monai`` or ``nnunet`` place them.
        threads: Of backend and kernels; 0: by affinity and quota.
        axes, channels, series, nodata: How samples are to be read.
        keep_exam: Whether a few tiles travel with the engine.
        overwrite: Replace an existing engine, whatever it was built from.
        cache: Folder that keeps engines by everything that decided them (see :mod:`unet_rt.building.cache`).
        search_minutes: Time for the search; one candidate is judged in any case, the report says what was left out.
        equal: ``bits``: only engines whose tiles equal the whole image to the bit; ``rounding``: up to the order of sums.
        say: Receives progress in sentences.
        tell: Receives sentences that are worth keeping as soon as they are known: every candidate as it is measured, and
            what the contract leaves open where there are no samples.
        report: Receives the :class:`BuildReport`; not called where nothing was built.

    Raises:
        ParityError: No candidate is inside the budget.
        IncompleteContractError: The contract lacks what decides the result: all of it, before any image is read in full.
        GraphError, ContractError, TileError, ImageError, BackendError, OutputError: see their messages.
    """
    deadline = Deadline(time.monotonic(), 60 * search_minutes)
    if not 0 < search_minutes < float("inf"):
        raise ContractError(f"search_minutes={search_minutes} is not a time; pass minutes above 0")
    say, tell = _add_time(say or log.info, deadline), _add_time(tell or log.info, deadline)
    paths = [path_of(one, GraphError) for one in ([model] if isinstance(model, str | Path) else model)]
    if not paths:
        raise ContractError("no model is given; pass an ONNX file, or several of them")
    name = paths[0].name if len(paths) == 1 else "ensemble.onnx"
    folder = path_of(out, OutputError) if out is not None else Path(name).with_suffix(".urt")
    target = Target(folder, overwrite, EngineCache(cache) if cache is not None else None, say)
    scope = _choose_scope(backend, device, precision)
    tile, overlap = (None if size is None else per_axis(size, 1) for size in (tile, overlap))
    options = BuildOptions(
        budget or Budget(),
        backend,
        precision,
        tile,
        halo,
        overlap,
        blend,
        placement,
        threads,
        keep_exam,
        search_minutes,
        equal,
    )
    digests = digest_request(options, scope.backends, scope.device)
    same = _find_same(target, digests)
    with tempfile.TemporaryDirectory(prefix="unet-rt-build-") as work, ExitStack() as resources:
        remarks, read = Remarks(say, tell), ReadOptions(axes, channels, series, nodata)
        opened = _open(paths, Path(work), contract, Inquiry(name, samples, read, tile, remarks))
        scope = _limit_to_file(scope, opened, backend, device, precision)
        scope = _limit_to_samples(scope, samples, precision)
        remarks.notes.extend(_notes_on(opened))
        spec = replace(untiled_spec(opened), device=scope.device)
        baseline = resources.enter_context(baseline_engine(opened, spec, threads=threads))
        opened, drawn = read_samples(opened, samples, read, remarks)
        digests = {**digests, **digest_inputs(opened.given, opened.contract, drawn.judging)}
        if _reuse(target, same, digests):
            return load(folder, threads=threads or None)

        drawn, scope = set_aside(drawn, scope, remarks, explicit=precision != "auto")
        seconds = parity_seconds(deadline, scope)
        job = BuildJob(opened, baseline, Path(work), options.along(opened.spatial), scope, deadline, seconds, remarks)
        outcome = _search(job, spec, drawn, resources)
        spec = finish_spec(outcome, digests)
        files = write_files(outcome, spec)
        resources.close()
        if not _write(target, spec, files, digests):
            return load(folder, threads=threads or None)
        _keep(target, digests)
    if report is not None:
        advice = _advice(paths, folder) if drawn.kind == "synthetic" and not scope.as_given else ""
        report(make_report(outcome, folder, spec, advice))
    return load(folder, threads=threads or None)


def _search(job: BuildJob, spec: EngineSpec, samples: Samples, resources: ExitStack) -> Outcome:
    """The steps from the task to the engine that was chosen; ``resources`` close the engines that are open then."""
    reached = {"samples": job.deadline.spent}
    spec = replace(spec, contract=settle_contract(job, spec, samples))
    tiling = choose_tiling(job.decide(spec), spec, samples)
    job = job.decide(tiling.spec)
    hold_to_file(job, tiling)
    reached["tiling"] = job.deadline.spent
    sample, raw = tiling.results.samples[0], tiling.results.values[0][0]
    first = describe_first(sample, raw, tiling.spec.contract_of(0), job.remarks)
    engines = resources.enter_context(closing(Engines(job, tiling, samples.kind)))
    judge = Judge(job, tiling, samples.calibrating)
    trials = try_candidates(job, tiling, samples.calibrating, engines, judge)
    reached["candidates"] = job.deadline.spent
    winner = choose(job, tiling, trials, engines, judge)
    reached["choice"] = job.deadline.spent
    return Outcome(job, samples, first, tiling, trials, winner, judge, engines, reached)


def _open(paths: Sequence[Path], work: Path, contract: Contract | str | Path | None, look: Inquiry) -> Model:
    """The model of one file or of several, under the contract that was passed."""
    from ..baseline.folds import open_models

    if isinstance(contract, str | Path):
        return open_models(paths, work, contract=Path(contract), look=look)
    return open_models(paths, work, options=contract, look=look)


def _limit_to_file(scope: Scope, model: Model, backend: str, device: str, precision: str) -> Scope:
    """What can be tried with this file: one that is quantised already runs as given, in ONNX Runtime.

    Raises:
        ContractError: Something else was asked for.
    """
    if not model.quantised:
        return scope
    asked = {"--backend": backend, "--precision": precision, "--device": device.partition(":")[0]}
    given = {"--backend": "onnxruntime", "--precision": "int8", "--device": "cpu"}
    other = next((option for option in given if asked[option] not in ("auto", given[option])), None)
    if other is not None:
        raise ContractError(
            f"{model.given.name} is quantised already, and runs as given: INT8 in ONNX Runtime on the CPU; leave {other} "
            f"{asked[other]} away, or give the FP32 graph that it was made from, and build lowers its precision"
        )
    return Scope("cpu", ("onnxruntime",), ("int8",), as_given=True)


def _limit_to_samples(scope: Scope, samples: Any, precision: str) -> Scope:
    """What can be tried with these samples: without any, FP32 alone.

    Raises:
        ContractError: There are none, and another precision was asked for.
    """
    if samples is not None or scope.as_given:
        return scope
    if "fp32" not in scope.precisions:
        what = "to calibrate and to prove parity on" if "int8" in scope.precisions else "to prove parity on"
        raise ContractError(f"precision {precision} needs samples {what}; pass --samples IMAGES")
    return replace(scope, precisions=("fp32",))


def _notes_on(model: Model) -> list[str]:
    """What opening a model came to, in sentences."""
    notes = list[str]()
    if model.members:
        what = "value" if model.contract.task == "regression" else "probability"
        notes.append(f"the mean {what} of {len(model.members)} networks: {', '.join(model.members)}")
    notes += model.rewritten
    if model.quantised:
        notes.append("the file is quantised already: it runs as given, and is held against itself")
    notes += [f"{what} made free: the graph allows any accepted size there" for what in model.freed]
    notes += [f"size stays fixed: {why}" for why in model.fixed]
    notes += [text for output in model.report.outputs if (text := output.scale_text)]
    notes += [f"exact along {limit}; larger images are refused" for limit in model.report.limits]
    return [*notes, *model.left_out]


def _advice(paths: Sequence[Path], folder: Path) -> str:
    """The command that builds the same from images of the user's."""
    command = ["unet-rt", "build", *map(str, paths), "--samples", "YOUR_IMAGES", "--out", str(folder), "--overwrite"]
    return shlex.join(command)


def _add_time(say: Say, deadline: Deadline) -> Say:
    """Sentences beside the time that was used and that is left."""
    return lambda text: say(f"{deadline.spent:.0f} s, {max(0.0, deadline.left()):.0f} s left: {text}")


# --- the engine that is there already -------------------------------------------------------------------------------


def _find_same(target: Target, digests: Digests) -> EngineFolder | None:
    """The engine in the folder that may be what was asked, as far as that is known yet; None where it is to be built.

    Raises:
        OutputError: There is another one, or something else.
    """
    if not target.overwrite:
        try:
            found = read_folder(target.folder)
        except EngineError:
            pass
        else:
            _refuse_another(target, found, digests)
            return found
    check_target(target.folder, overwrite=target.overwrite)
    return None


def _refuse_another(target: Target, found: EngineFolder, digests: Digests) -> None:
    """Raises OutputError where the engine in the folder was built from something else."""
    other = list_differences(found, digests)
    if other:
        raise OutputError(
            f"{target.folder} exists, and was built from another {', '.join(other)}; pass --overwrite to replace it, or "
            "choose another --out"
        )


def _reuse(target: Target, same: EngineFolder | None, digests: Digests) -> bool:
    """Whether the folder holds what was asked: since an earlier build, or from the cache."""
    if same is not None:
        _refuse_another(target, same, digests)
        target.say(f"{target.folder} is up to date")
        _keep(target, digests)
        return True
    found = None if target.cache is None else target.cache.get(digests)
    if found is None:
        return False
    try:
        copy_folder(found, target.folder, overwrite=target.overwrite)
    except (EngineError, OutputError) as error:
        target.say(f"not taken from the cache: {error}")
        return False
    target.say(f"{target.folder} comes from the cache")
    return True


def _write(target: Target, spec: EngineSpec, files: Mapping[FileKind, Path], digests: Digests) -> bool:
    """Writes the folder; False where another process wrote the same engine meanwhile: either is what was asked."""
    try:
        write_folder(target.folder, spec, files, overwrite=target.overwrite)
    except OutputError:
        if target.overwrite or not _holds_same(target, digests):
            raise
        target.say(f"{target.folder} was built by another process meanwhile")
        return False
    return True


def _holds_same(target: Target, digests: Digests) -> bool:
    """Whether the folder holds the engine that was asked for."""
    try:
        return not list_differences(read_folder(target.folder), digests)
    except EngineError:
        return False


def _keep(target: Target, digests: Digests) -> None:
    """Puts a finished engine into the cache; what stands in the way of that does not take the engine back."""
    if target.cache is None:
        return
    try:
        target.cache.put(read_folder(target.folder), digests)
    except (EngineError, OutputError, OSError) as error:
        target.say(f"not kept in the cache: {error}")


# --- what is tried --------------------------------------------------------------------------------------------------


def _choose_scope(backend: str, device: str, precision: str) -> Scope:
    """The device, the backends to try on it and the precisions, as far as options and this machine decide."""
    where, names = _choose_backends(backend, device)
    return Scope(where, tuple(names), _choose_precisions(precision, where))


def _choose_backends(backend: str, device: str) -> tuple[str, list[str]]:
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


def _choose_precisions(precision: str, device: str) -> tuple[Precision, ...]:
    """The precision that was asked for, or those that are tried on a device."""
    if precision == "auto":
        return ("fp32", "bf16", "int8") if device == "cpu" else ("fp32", "fp16")
    for known in get_args(Precision):
        if precision == known:
            return (known,)
    raise ContractError(f"precision {precision!r} is not one of auto, {', '.join(get_args(Precision))}")
