"""Build, step 5: the candidate that keeps most per second inside the budget, and the tile at which it does.

A plan, which takes no other shapes than its own, gets a smaller tile beside that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor, prod

from ..baseline.results import tile_of
from ..baseline.tiles import kept_share
from ..engine import parity as parity_module
from ..engine.budget import Budget
from ..engine.engine import Engine
from ..engine.equality import Equality
from ..engine.parity import Verdict
from ..errors import BackendError, GraphError, ParityError, TileError, size_text
from ..prediction.plan import MEMORY_SHARE
from ..system import facts, limits
from ..tiling.axis import smaller_tile
from .candidates import Trials
from .engines import Engines, fits
from .job import TILES_END, BuildJob
from .measure import Judge, add_timing, interleaved_times
from .report import Candidate
from .streams import try_streams
from .tiling import Tiling, tried_tiles

LARGEST_RUN_S = 60.0  # a tile that is expected to take longer is not tried
SLOW_RUN_S = 8.0  # a tile that is expected to take longer runs once, without warm-up: its first run is 5 % slower
WORTH_WAITING = 1.1  # a tile that keeps so many times the share of the one before it is tried when time is up, too
AS_FAST = 0.95  # of the fastest speed: about the spread of measurements
NEARLY_AS_FAST = 0.9  # of INT8's speed, at which a higher precision is taken instead


@dataclass(frozen=True)
class Winner:
    """The candidate that becomes the engine, and the tile at which it does.

    Attributes:
        candidates: The table, with the tiles that were tried.
        best: The candidate that was chosen.
        engine: It, loaded.
        kept: Its layers in FP32 where it is an INT8 engine, else None.
        bytes_per_px: Memory that running it takes per tile pixel.
        equal: How equal its tiles are to the whole image; None where nothing is promised, or could be measured.
        smaller: Verdict on the smaller tile of its plan; None where it has none.
    """

    candidates: tuple[Candidate, ...]
    best: Candidate
    engine: Engine
    kept: frozenset[str] | None
    bytes_per_px: float
    equal: Equality | None = None
    smaller: Verdict | None = None

    @property
    def chosen(self) -> int:
        """Index of ``best`` in the table."""
        return self.candidates.index(self.best)


def choose(job: BuildJob, tiling: Tiling, trials: Trials, engines: Engines, judge: Judge) -> Winner:
    """The fastest candidate inside the budget; where the tile is not fixed and does not change the answer, at its best.

    Raises:
        ParityError: No candidate is inside the budget.
    """
    remarks = job.remarks
    accepted = [c for c in trials.candidates if c.verdict is not None and c.verdict.accepted]
    if not accepted:
        raise _refuse_all(job, tiling, trials.candidates)
    best = _pick_equal(job, trials, accepted, judge)
    engine = trials.engines[best.key]
    px = best.batch * prod(best.tile)
    bytes_per_px = max((best.peak_mb or 0.0) * 1e6, job.model.report.activation_bytes(best.tile, best.batch)) / px
    winner = Winner(trials.candidates, best, engine, trials.kept.get(engine), bytes_per_px, judge.equality(engine))
    if job.options.tile is None and tiling.spec.runs_whole:
        winner = _choose_tile(job, tiling, winner, engines, judge)
    if winner.engine.spec.batches and tiling.spec.overlap is None:
        winner = _add_smaller_tile(job, tiling, winner, engines, judge)
    winner = _add_streams(job, tiling, winner, engines)
    best = winner.best
    among = f"{len(accepted)} candidate{'s' * (len(accepted) > 1)} inside the budget"
    if all(c.precision != "fp32" for c in accepted):
        among += " (none of them FP32)"
    batch = f", {best.batch} per run" if best.batch > 1 else ""
    remarks.notes.append(
        f"chosen: {best.title}, tile {size_text(best.tile)} px{batch}: "
        f"{best.kept_mpx_per_s or 0:.3g} kept Mpx/s, the most of {among}"
    )
    if remarks.left_out:
        remarks.notes.append(
            f"the search kept to {job.deadline.seconds / 60:g} minutes, and left out: {'; '.join(remarks.left_out)}; "
            "--search-minutes allows more"
        )
    return winner


def _add_streams(job: BuildJob, tiling: Tiling, winner: Winner, engines: Engines) -> Winner:
    """The winner with several tiles beside each other, where that keeps more per second."""
    engine, rows = try_streams(job, tiling, winner.best, winner.engine, engines, winner.bytes_per_px)
    candidates = (*winner.candidates, *rows)
    if engine is winner.engine:
        return replace(winner, candidates=candidates)
    return replace(winner, candidates=candidates, best=rows[-1], engine=engine)


def _pick_equal(job: BuildJob, trials: Trials, accepted: Sequence[Candidate], judge: Judge) -> Candidate:
    """The fastest candidate whose tiles are as equal to the whole image as was asked.

    Raises:
        ParityError: There is none.
    """
    first = pick_closest(accepted, max(accepted, key=lambda c: c.kept_mpx_per_s or 0.0), job.budget)
    order = [first, *sorted((c for c in accepted if c is not first), key=lambda c: -(c.kept_mpx_per_s or 0.0))]
    reasons = list[str]()
    for candidate in order:
        equal = judge.equality(trials.engines[candidate.key])
        reason = "" if equal is None else equal.excess(job.budget.of(candidate.precision), candidate.precision)
        if not reason and job.options.equal == "bits" and (equal is None or equal.kind != "bits"):
            reason = equal.text if equal is not None else "nothing is known of how equal its tiles are"
        if not reason:
            if equal is not None and equal.kind == "rounding":
                job.remarks.notes.append(_explain_rounding(trials, order, candidate, equal, judge))
            return candidate
        reasons.append(f"{candidate.title}: {reason}")
        if job.options.equal == "rounding":
            job.remarks.notes.append(f"left: {reasons[-1]}")
    ways = "pass --equal rounding" if job.options.equal == "bits" else "allow more with --budget rounding=..."
    raise ParityError(f"no candidate's tiles are equal enough to the whole image: {'; '.join(reasons)}; {ways}")


def _explain_rounding(
    trials: Trials, order: Sequence[Candidate], chosen: Candidate, equal: Equality, judge: Judge
) -> str:
    """What the fastest engine gives up that is equal up to rounding alone, and what one equal to the bit would cost."""
    for other in order[order.index(chosen) + 1 :]:
        found = judge.equality(trials.engines[other.key])
        if found is not None and found.kind == "bits":
            share = (other.kept_mpx_per_s or 0.0) / (chosen.kept_mpx_per_s or 1.0)
            return (
                f"tiles of {chosen.title} are {equal.text}; the fastest that is equal to the bit is {other.title}, "
                f"{other.kept_mpx_per_s or 0:.3g} kept Mpx/s ({share:.2f} of it): --equal bits takes that"
            )
    return f"tiles of {chosen.title} are {equal.text}; no candidate inside the budget is equal to the bit"


def pick_closest(accepted: Sequence[Candidate], fastest: Candidate, budget: Budget) -> Candidate:
    """Where the fastest computes in INT8: of the mixtures as fast as it, and of higher precisions nearly as fast, the one
    that changes least."""
    if fastest.precision != "int8":
        return fastest
    best = fastest.kept_mpx_per_s or 0.0
    higher = [c for c in accepted if c.precision != "int8" and (c.kept_mpx_per_s or 0.0) >= NEARLY_AS_FAST * best]
    alike = [
        c
        for c in accepted
        if (c.backend, c.precision, c.batch) == (fastest.backend, fastest.precision, fastest.batch)
        and (c.kept_mpx_per_s or 0.0) >= AS_FAST * best
    ]
    return min(higher or alike, key=lambda c: _changed(c, budget))


def _changed(candidate: Candidate, budget: Budget) -> float:
    """What a candidate changes, by one measure for all precisions: labels, or the share of its budget."""
    change = None if candidate.verdict is None else candidate.verdict.label_change
    return _budget_share(candidate, budget) if change is None else change


def _budget_share(candidate: Candidate, budget: Budget) -> float:
    """The share of its budget that a candidate uses, on the output that uses most."""
    if candidate.verdict is None:
        return float("inf")
    return max(parity_module.budget_shares(candidate.verdict, budget.of(candidate.precision)).values())


def _refuse_all(job: BuildJob, tiling: Tiling, candidates: Sequence[Candidate]) -> ParityError:
    """What no candidate inside the budget is answered with: by how much the closest misses it, and the ways out."""
    tried = [c for c in candidates if c.verdict is not None]
    reasons = "; ".join(f"{c.title}: {c.verdict.reasons[0]}" for c in tried if c.verdict)
    nearest = min(tried, key=lambda c: _budget_share(c, job.budget))
    wider = _widen(nearest.verdict, job.budget.of(nearest.precision)) if nearest.verdict else ""
    ways = [f"allow more with --budget {wider}"] if wider else []
    ways += ["use --halo exact"] if _seams_miss(job, tiling, tried) else []
    ways += ["pass --precision fp32"] if all(c.precision != "fp32" for c in tried) else []
    ways = ways or ["use another --backend"]  # rows of a batch that differ are no matter of budgets
    left_out, warnings = job.remarks.left_out, job.remarks.warnings
    late = f" (no time was left for: {'; '.join(left_out)})" if left_out else ""
    doubts = f"; but look at this first: {'; '.join(warnings)}" if warnings else ""
    return ParityError(f"no candidate is inside the budget: {reasons}{late}; {', or '.join(ways)}{doubts}")


def _seams_miss(job: BuildJob, tiling: Tiling, tried: Sequence[Candidate]) -> bool:
    """Whether the halo is not exact and may be what misses the budget: its seams alone do, or FP32 does, too."""
    limit = tiling.spec.halo_limit
    if limit is None:
        return False
    seam = tiling.seams.get(limit, 0.0)
    bound = min(
        job.budget.of(c.precision).labels if tiling.spec.contract.has_labels else job.budget.error for c in tried
    )
    return seam > bound or any(c.precision == "fp32" for c in tried)


def _widen(verdict: Verdict, budget: Budget) -> str:
    """The bounds that a verdict misses, as wide as it needs them, in the words of --budget; "" where there are none."""
    parts = list[str]()
    if verdict.label_change is not None and verdict.label_change > budget.labels:
        parts.append(f"label_change={min(1.05 * verdict.label_change, 1.0):.1e}")  # two digits, never below
    if verdict.dice is not None and verdict.dice < budget.dice:
        parts.append(f"dice={floor(1e3 * verdict.dice) / 1e3:g}")
    if verdict.error is not None and budget.error < verdict.error < float("inf"):
        parts.append(f"error={1.05 * verdict.error:.1e}")
    return " ".join(parts)


# --- the tile -------------------------------------------------------------------------------------------------------


def _choose_tile(job: BuildJob, tiling: Tiling, first: Winner, engines: Engines, judge: Judge) -> Winner:
    """The tile that keeps most per second, among that of the comparison and larger ones of as many pixels per run.

    Times of all of them are from the same run, so that they are compared on equal terms.
    """
    best, engine, notes, sample = first.best, first.engine, job.remarks.notes, tiling.results.samples[0]
    runs = [(engine, best.tile, best.batch)]
    for larger in _larger_tiles(job, tiling, first):
        fixed = bool(tiling.spec.batch_sizes)  # which the graph takes, and no other
        batch = best.batch if fixed else max(1, best.batch * prod(best.tile) // prod(larger))
        try:
            at = engine
            if engine.spec.batches:  # a plan for one tile
                graph = engines.files[engine].graph if best.precision == "int8" else None  # calibrated once
                at = engines.make(best.backend, best.precision, larger, (batch,), graph)
            runs.append((at, larger, batch))
        except BackendError as error:
            notes.append(f"tile {size_text(larger)} px was not tried: {error}")
    if len(runs) < 2:
        return first
    job.remarks.say("measuring tiles " + ", ".join(size_text(tile) for _, tile, _ in runs))
    slow = _seconds_of(best, runs[-1][1]) > SLOW_RUN_S or job.deadline.left(TILES_END) < 4 * sum(
        batch * _seconds_of(best, tile) for _, tile, batch in runs
    )
    timings = interleaved_times(runs, sample, job.threads, runs=1 if slow else 3, warm_up=0 if slow else 1)
    again = best
    if not isinstance(timings[0], BackendError):  # its memory is allocated by now
        again = replace(add_timing(best, best.tile, timings[0], best.verdict, tiling.spec), peak_mb=best.peak_mb)
    candidates = [again if c is best else c for c in first.candidates]
    tried, bytes_per_px = [(again, engine)], first.bytes_per_px
    for (other, larger, batch), timing in zip(runs[1:], timings[1:], strict=True):
        try:
            if isinstance(timing, BackendError):
                raise timing
            verdict = best.verdict if other is engine else judge.verdict(other)
            if verdict is not None and tiling.spec.device != "cpu":  # libraries choose kernels by shape there
                x = tile_of(sample, tiling.spec, larger, job.threads)
                verdict = judge.same_rows(other, x, verdict, (batch,))
        except BackendError as error:
            notes.append(f"tile {size_text(larger)} px was tried and left: {error}")
            continue
        tried.append((add_timing(replace(best, batch=batch), larger, timing, verdict, tiling.spec), other))
        candidates.append(tried[-1][0])
        job.remarks.tell(tried[-1][0].sentence)
        bytes_per_px = max(bytes_per_px, timing.peak_bytes / prod(larger) / batch)
    tried = [(c, e) for c, e in tried if c.verdict is not None and c.verdict.accepted]
    fastest, chosen = max(tried, key=lambda pair: pair[0].kept_mpx_per_s or 0.0)
    for other in {id(e): e for e, _, _ in runs}.values():
        if other not in (chosen, engine):
            other.close()
    return replace(first, candidates=tuple(candidates), best=fastest, engine=chosen, bytes_per_px=bytes_per_px)


def _seconds_of(candidate: Candidate, tile: Sequence[int]) -> float:
    """What a run of one tile is expected to take, by the one that was trials."""
    return (candidate.latency_ms or 0.0) / 1e3 / prod(candidate.tile) / candidate.batch * prod(tile)


def _larger_tiles(job: BuildJob, tiling: Tiling, first: Winner) -> list[tuple[int, ...]]:
    """Tiles above the one that candidates were compared at, as far as time and memory allow to try them.

    Where the halo takes half of a tile, a larger one is worth more than all else that was searched for: those that keep a
    tenth more of what they compute are tried with no time left, too.
    """
    best, device, remarks = first.best, tiling.spec.device, job.remarks
    left = job.deadline.left(TILES_END) - _seconds_of(best, best.tile)
    tiles: list[tuple[int, ...]] = []
    for tile in tried_tiles(tiling.spec):
        if prod(tile) <= prod(best.tile):
            continue
        before = tiles[-1] if tiles else best.tile
        last = size_text(before)
        seconds = _seconds_of(best, tile)
        if seconds > LARGEST_RUN_S:
            remarks.notes.append(f"tiles above {last} px were not tried: the next would take {seconds:.0f} s")
            break
        left -= seconds
        if left < 0 and kept_share(tiling.spec, tile) < WORTH_WAITING * kept_share(tiling.spec, before):
            remarks.left_out.append(f"tiles above {last} px were not tried")
            break
        if not facts.is_cuda(device):
            enough = first.bytes_per_px * best.batch * prod(tile) <= MEMORY_SHARE * limits.memory_bytes()
        else:
            session = first.engine.gpu_session
            enough = fits(job.model, device, tile, 1, held=0 if session is None else session.held_bytes)
        if not enough:
            remarks.notes.append(f"tiles above {last} px were not tried: too little memory is free")
            break
        tiles.append(tile)
    return tiles


def _add_smaller_tile(job: BuildJob, tiling: Tiling, winner: Winner, engines: Engines, judge: Judge) -> Winner:
    """The winner with a plan for a smaller tile as well, for memory that does not hold the chosen one.

    It is another plan, so that both tiles are held to the budget as one was, and it is timed again. Where it cannot be
    had, the plan for one tile stays.
    """
    best, spec, remarks = winner.best, winner.engine.spec, job.remarks
    if spec.halo != "exact":
        remarks.notes.append("the plan takes one tile: as the halo is not exact, another would change the result")
        return winner
    smaller = smaller_tile(best.tile, tiling.spec.sizes, tiling.spec.used_outputs())
    if smaller is None:
        remarks.notes.append(f"the plan takes no smaller tile than {size_text(best.tile)} px: the halo leaves none")
        return winner
    remarks.say(f"building {best.title} for tiles of {size_text(smaller)} px as well")
    graph = engines.files[winner.engine].graph if best.precision == "int8" else None  # calibrated once
    sample, verdicts = tiling.results.samples[0], list[Verdict]()
    try:
        engine = engines.make(best.backend, best.precision, best.tile, spec.batches, graph, smaller)
        for tile in engine.spec.tiles:
            x = tile_of(sample, tiling.spec, tile, job.threads)
            verdicts.append(judge.same_rows(engine, x, judge.verdict(engine, tile), spec.batches))
            if not verdicts[-1].accepted:
                raise BackendError(f"at {size_text(tile)} px, {verdicts[-1].reasons[0]}")
        (timing,) = interleaved_times([(engine, best.tile, best.batch)], sample, job.threads, runs=3)
        if isinstance(timing, BackendError):
            raise timing
    except (BackendError, GraphError, TileError) as error:
        remarks.notes.append(f"the plan takes no smaller tile: {size_text(smaller)} px was tried and left: {error}")
        return winner
    again = add_timing(best, best.tile, timing, verdicts[0], tiling.spec)
    if (again.kept_mpx_per_s or 0.0) < AS_FAST * (best.kept_mpx_per_s or 0.0):
        remarks.notes.append(
            f"with {size_text(smaller)} px in its plan, too, a run takes {again.latency_ms:.3g} ms instead of "
            f"{best.latency_ms:.3g} ms"
        )
    remarks.notes.append(f"tiles of {size_text(smaller)} px are in the plan, too, for memory that is short")
    winner.engine.close()
    candidates = tuple(again if c is best else c for c in winner.candidates)
    return replace(winner, candidates=candidates, best=again, engine=engine, smaller=verdicts[1])
