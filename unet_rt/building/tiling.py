"""Build, step 3: tile, halo or overlap, and what the baseline makes of the samples under them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from ..baseline.promise import broken_promise, promised
from ..baseline.results import raw_results
from ..baseline.samples import SampleWindow
from ..baseline.tiles import blended_spec, keeps, kept_share, largest_halo, seam_tile, whole_grid
from ..engine import parity as parity_module
from ..engine.parity import ImageParity
from ..engine.spec import EngineSpec
from ..errors import ContractError, ImageError, ParityError, TileError, size_text
from ..tiling.grid import TileGrid, square_tile, tile_grid
from ..tiling.placement import TOOLS
from .calibration import farthest_value
from .job import BuildJob
from .samples import Samples

PROBE_PX = 512 * 512  # tile area at which backends and precisions are compared
TILE_AREAS = (512**2, 1024**2, 1536**2, 2048**2)  # tile areas tried with the winner
EXACT_COST = 1.5  # computed over kept pixels up to which the exact halo is the default
HALO_STEP = 8  # samples: halos are measured in steps of it
FEWEST_WINDOWS = 3  # that the baseline runs on, whatever the time

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BaselineResults:
    """What the baseline says of windows: what every engine is compared with on them.

    Attributes:
        samples: The windows that there was time for; the first is always among them.
        values: Of each window, every output (K, *spatial), float32.
        seconds: That it took.
    """

    samples: tuple[SampleWindow, ...]
    values: tuple[list[Array], ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Tiling:
    """How images are tiled, and what every engine that does so is compared with.

    Attributes:
        spec: Halo or overlap decided; its tile is the one that candidates are compared at.
        results: The baseline's, on the windows that parity is judged on.
        seams: Seam error per halo that was tried.
        mismatch: For networks that cannot be tiled exactly: the difference to the whole image.
    """

    spec: EngineSpec
    results: BaselineResults
    seams: Mapping[int, float] = field(default_factory=dict)
    mismatch: ImageParity | None = None


@dataclass(frozen=True)
class _Halo:
    """A spec whose halo is decided; what was measured on the way, if anything was."""

    spec: EngineSpec
    results: BaselineResults | None = None
    seams: Mapping[int, float] = field(default_factory=dict)


def choose_tiling(job: BuildJob, spec: EngineSpec, samples: Samples) -> Tiling:
    """Tile and halo of a network that can be tiled exactly, tile and overlap of one that cannot.

    Raises:
        TileError: An option that is for the other kind of network, or that the graph does not accept.
        ContractError, ImageError: The halo is to be measured, and there is nothing to measure it on.
        ParityError: Tiles of the FP32 graph are not its whole-image result, though it was judged exact.
    """
    options = job.options
    tile, halo, overlap = options.tile, options.halo, options.overlap
    blend, placement = options.blend, options.placement
    if job.model.exact:
        if overlap is not None:
            raise TileError("--overlap is for networks that cannot be tiled exactly; this one needs none")
        if placement != "even":
            raise TileError(
                f"--placement {placement} is for networks that cannot be tiled exactly; tiles of this one equal its "
                "whole-image result, wherever they lie: leave it away"
            )
        spec = replace(spec, contract=replace(spec.contract, border=spec.contract.border or "mirror"))
        probe = tuple(tile) if tile is not None else square_tile(spec.sizes, spec.outputs, PROBE_PX)
        _check_tile(spec, probe)
        chosen = _choose_halo(job, replace(spec, tile=probe), samples, halo, fixed_tile=tile is not None)
    else:
        reason = job.model.reasons[0]
        if halo != "auto":
            raise TileError(f"--halo {halo}: this network cannot be tiled exactly ({reason}); its tiles are blended")
        chosen = _Halo(blended_spec(spec, tile, job.model.given, blend=blend, overlap=overlap, placement=placement))
        job.remarks.notes.append(
            f"not exact: {reason}; tile {size_text(chosen.spec.tile)} px is part of the model, "
            f"blended ({blend}) with overlap {size_text(chosen.spec.overlap or ())} px"
            + (f", placed as {TOOLS[placement]} does" if placement in TOOLS else "")
        )
    spec = chosen.spec
    job = job.decide(spec)
    results = chosen.results or judging_results(job, spec, samples)
    _hold_promise(job, spec, results)
    return Tiling(spec, results, chosen.seams, _compare_to_whole(job, spec, results))


def tried_tiles(spec: EngineSpec) -> list[tuple[int, ...]]:
    """The tiles that may be tried with the winner, ascending."""
    return [square_tile(spec.sizes, spec.used_outputs(), area) for area in TILE_AREAS]


def _hold_promise(job: BuildJob, spec: EngineSpec, results: BaselineResults) -> None:
    """ParityError where a graph that was judged exact is not, on the first sample that shows a seam."""
    for sample, whole in zip(results.samples, results.values, strict=True) if promised(spec) else ():
        grid = spec.grid(sample.shape, seam_tile(spec, sample.shape))
        if grid.count > 1:
            if text := broken_promise(job.baseline, job.model, sample, whole, grid, job.threads):
                raise ParityError(text)
            return


def _check_tile(spec: EngineSpec, tile: Sequence[int]) -> None:
    spec.grid((1,) * spec.spatial, tile)
    tile_grid(tile, tile, spec.sizes, spec.outputs)  # raises for sizes that the graph does not accept


def _compare_to_whole(job: BuildJob, spec: EngineSpec, results: BaselineResults) -> ImageParity | None:
    """What tiling changes on the first sample, of a network that cannot be tiled exactly and runs on whole images.

    Of several outputs that are judged, the one that uses most of its budget.
    """
    if spec.exact or not spec.free_size:
        return None
    sample = results.samples[0]
    grid = whole_grid(replace(spec, overlap=None), sample.shape)
    untiled = raw_results(job.baseline, sample, grid, job.threads)
    found = parity_module.compare_outputs(untiled, results.values[0], spec, sample.name)
    budget = job.budget.of("fp32")
    return max((one for one in found if one.judged), key=lambda one: parity_module.budget_share(one, budget))


# --- the baseline's results ------------------------------------------------------------------------------------------


def judging_results(job: BuildJob, spec: EngineSpec, samples: Samples) -> BaselineResults:
    """The baseline on the windows that parity is judged on."""
    windows = _farthest_first(samples.judging)
    least = FEWEST_WINDOWS if samples.kind == "samples" else 1
    values, spent = list[list[Array]](), 0.0
    for k, (done, spent) in enumerate(_run_baseline(job, spec, windows), start=1):
        values.append(done)
        job.remarks.say(f"baseline {k}/{len(windows)}: {windows[k - 1].name}")
        if k >= least and spent * (k + 1) / k > job.parity_seconds and k < len(windows):
            job.remarks.left_out.append(f"parity is judged on {k} of {len(windows)} sample windows")
            break
    return BaselineResults(windows[: len(values)], tuple(values), spent)


def calibrating_results(job: BuildJob, spec: EngineSpec, windows: Sequence[SampleWindow]) -> BaselineResults:
    """The baseline on the windows that calibrated: they prove nothing for INT8, and may disprove it."""
    values = list[list[Array]]()
    for k, (done, spent) in enumerate(_run_baseline(job, spec, windows), start=1):
        values.append(done)
        if spent > job.parity_seconds / 4 and k < len(windows):
            job.remarks.left_out.append(f"{len(windows) - k} windows that calibrated were not judged as well")
            break
    return BaselineResults(tuple(windows[: len(values)]), tuple(values))


def _run_baseline(
    job: BuildJob, spec: EngineSpec, windows: Sequence[SampleWindow]
) -> Iterator[tuple[list[Array], float]]:
    """The baseline's results of one window after the other, and the seconds that it has run so far.

    Whole where there is a whole-image result, in the engine's tiles otherwise.
    """
    spent = 0.0
    for sample in windows:
        begun = time.perf_counter()
        grid = whole_grid(spec, sample.shape) if spec.runs_whole else spec.grid(sample.shape, spec.tile)
        values = raw_results(job.baseline, sample, grid, job.threads)
        spent += time.perf_counter() - begun
        yield values, spent


def _farthest_first(windows: Sequence[SampleWindow]) -> tuple[SampleWindow, ...]:
    """The first window, which reports are about, then those whose values go farthest: where time is short, they judge."""
    return (*windows[:1], *sorted(windows[1:], key=lambda sample: -farthest_value(sample)))


# --- the halo -------------------------------------------------------------------------------------------------------


def _choose_halo(job: BuildJob, spec: EngineSpec, samples: Samples, halo: str | int, *, fixed_tile: bool) -> _Halo:
    """The halo that was asked for; a tile of ``spec`` that keeps nothing beside it is replaced, unless it was, too."""
    if isinstance(halo, int) or halo.isdigit():
        chosen = _take_halo(job, spec, samples, int(halo))
    elif halo == "measured":
        chosen = _measure_halo(job, spec, samples)
    elif halo in ("auto", "exact"):
        chosen = _prefer_exact_halo(job, spec, samples, forced=halo == "exact", fixed_tile=fixed_tile)
    else:
        raise TileError(f"--halo {halo!r} is not exact, measured or a number of samples")
    spec = chosen.spec
    if keeps(spec, spec.tile):
        return chosen
    tile = square_tile(spec.sizes, spec.used_outputs(), PROBE_PX)
    if fixed_tile:
        raise TileError(
            f"a tile of {size_text(spec.tile)} px keeps nothing beside its halo; "
            f"use {size_text(tile)} or more, or --halo measured"
        )
    return replace(chosen, spec=replace(spec, tile=tile))


def _take_halo(job: BuildJob, spec: EngineSpec, samples: Samples, limit: int) -> _Halo:
    """A halo of so many samples; what its seams change is said, where samples show it."""
    exact = largest_halo(spec)
    if limit < 0:
        raise TileError(f"halo {limit} is negative; use 0 or more samples, exact or measured")
    note = f"halo {min(limit, exact)} samples as given; {exact} would be exact"
    chosen = _Halo(spec)
    if limit < exact:
        limited = replace(spec, halo="given", halo_limit=limit)
        chosen = _Halo(limited)
        if samples.kind == "samples" and spec.free_size and _seams_can_be_seen(spec, samples.judging, limit):
            results = judging_results(job, spec, samples)
            error = _measure_seam(job, spec, results, limit)
            note += f"; {_seam_text(spec, error)}"
            chosen = _Halo(limited, results, {limit: error})
    job.remarks.notes.append(note)
    return chosen


def _prefer_exact_halo(job: BuildJob, spec: EngineSpec, samples: Samples, *, forced: bool, fixed_tile: bool) -> _Halo:
    """The exact halo where it is ``forced`` or cheap, or nothing can be measured; else a measured one."""
    exact = largest_halo(spec)
    largest = spec.tile if fixed_tile or not spec.free_size else tried_tiles(spec)[-1]
    share = kept_share(spec, largest)
    cost = f"{1 / share:.2f} times the work" if share else "more than such a tile holds"
    if forced or (share and 1 / share <= EXACT_COST):
        job.remarks.notes.append(f"exact halo ({exact} samples): {cost} at tiles of {size_text(largest)} px")
        return _Halo(spec)
    if samples.kind == "synthetic" or not _seams_can_be_seen(spec, samples.judging):
        job.remarks.notes.append(
            f"exact halo ({exact} samples) costs {cost} at tiles of {size_text(largest)} px; "
            "with --samples larger than a tile a smaller one is measured"
        )
        return _Halo(spec)
    job.remarks.notes.append(
        f"the exact halo ({exact} samples) costs {cost} at tiles of {size_text(largest)} px, so it was measured"
    )
    return _measure_halo(job, spec, samples)


def _measure_halo(job: BuildJob, spec: EngineSpec, samples: Samples) -> _Halo:
    """The smallest halo, in steps of 8 samples, whose seams change no more labels than the seam budget allows."""
    if samples.kind == "synthetic":
        raise ContractError("--halo measured needs images to measure on; pass --samples IMAGES")
    if not _seams_can_be_seen(spec, samples.judging):
        raise ImageError("the samples are no larger than one tile, so seams cannot be measured; pass larger ones")
    results = judging_results(job, spec, samples)  # which may leave samples out, to keep the search short
    budget, seams = job.budget.seam, dict[int, float]()
    exact = largest_halo(spec)
    steps = -(-exact // HALO_STEP)  # the exact halo is the end of the range
    visible = (k for k in reversed(range(steps)) if _seams_can_be_seen(spec, results.samples, HALO_STEP * k))
    seen = next(visible, -1)
    job.remarks.say(f"measuring the halo on {len(results.samples)} samples")
    low, high = 0, seen + 1
    while low < high:
        middle = (low + high) // 2
        limit = middle * HALO_STEP
        seams[limit] = _measure_seam(job, spec, results, limit)
        if seams[limit] <= budget:
            high = middle
        else:
            low = middle + 1
    if high > seen:
        note = f"no halo below the exact {exact} samples is inside the seam budget {budget:g}: exact it is"
        if seen + 1 < steps:
            note = (
                f"no halo up to {HALO_STEP * max(seen, 0)} samples is inside the seam budget {budget:g}, and the "
                f"samples are too small to see the seams of larger ones: the exact {exact} it is; larger samples may "
                "allow less"
            )
        job.remarks.notes.append(note)
        return _Halo(spec, results, seams)
    limit = high * HALO_STEP
    job.remarks.notes.append(
        f"measured halo {limit} samples (exact: {exact}): {_seam_text(spec, seams[limit])}, budget {budget:g}"
    )
    return _Halo(replace(spec, halo="measured", halo_limit=limit), results, seams)


def _seam_grids(spec: EngineSpec, sample: SampleWindow, limit: int) -> list[TileGrid]:
    """Up to three arrangements of tiles small enough for a sample to have seams, where the halo allows it.

    More than one, because what a seam changes depends on where it runs: objects may lie beside all seams of one.
    """
    spec = replace(spec, halo="measured", halo_limit=limit)
    outputs = spec.used_outputs()
    first = seam_tile(spec, sample.shape)
    tiles = {first}
    for share in (0.6, 0.8):
        tile = tuple(s.at_most(int(t * share)) for t, s in zip(first, spec.sizes, strict=True))
        if spec.free_size and keeps(spec, tile):
            tiles.add(tile)
    return [tile_grid(sample.shape, tile, spec.sizes, outputs) for tile in sorted(tiles)]


def _seams_can_be_seen(spec: EngineSpec, windows: Iterable[SampleWindow], limit: int = HALO_STEP) -> bool:
    """Whether tiles with a halo of ``limit`` samples cut at least one window: what no seam shows is not measured."""
    return any(grid.count > 1 for sample in windows for grid in _seam_grids(spec, sample, limit))


def _measure_seam(job: BuildJob, spec: EngineSpec, results: BaselineResults, limit: int) -> float:
    """What the seams of a halo of ``limit`` samples change on the worst sample."""
    error = 0.0
    for sample, whole in zip(results.samples, results.values, strict=True):
        for grid in _seam_grids(spec, sample, limit):
            tiled = raw_results(job.baseline, sample, grid, job.threads)
            found = parity_module.compare_outputs(whole, tiled, spec, sample.name)
            error = max(error, *(one.changed for one in found if one.judged))
    return error


def _seam_text(spec: EngineSpec, error: float) -> str:
    what = "the output by {:.2e} of its range" if not spec.contract.has_labels else "{:.2e} of labels"
    return f"seams change {what.format(error)} on the worst sample"
