"""Build, step 4: every backend in every precision is built, timed and judged; those that cannot be say why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from .. import backends
from ..baseline.results import tile_of
from ..baseline.samples import SampleWindow
from ..engine.engine import Engine
from ..engine.parity import Verdict
from ..errors import BackendError, GraphError, ImageError, TileError, size_text
from .engines import Engines, batches_to_try
from .int8 import calibrate_model, check_int8, int8_maker, make_mixtures, return_layers
from .job import INT8_ENDS, INT8_RUNS, BuildJob
from .measure import Judge, add_timing, estimate_seconds, interleaved_times
from .quantiser import Mixture, Quantiser
from .report import Candidate, CandidateKey
from .tiling import Tiling

TIMED_S = 30.0  # of timing all candidates at one tile, at most
TIMED_SHARE = 0.3  # of what is left of the search, at most


@dataclass(frozen=True)
class Trials:
    """What was tried, and how it did.

    Attributes:
        candidates: The table: those that could not be built first, each of the others once per batch size.
        engines: Of the candidates that could be built.
        kept: Of every INT8 engine among them, the layers that stay in FP32.
        quantiser: What made them; None where INT8 was not tried.
    """

    candidates: tuple[Candidate, ...]
    engines: Mapping[CandidateKey, Engine]
    kept: Mapping[Engine, frozenset[str]]
    quantiser: Quantiser | None


@dataclass(frozen=True)
class _Built:
    """The engines of every backend and precision that could be built, and what says why others could not.

    Attributes:
        floats: Of the precisions above INT8.
        mixtures: Of INT8, per backend; plain first.
        failed: Those that could not be built.
        quantiser: What made the mixtures; None where INT8 was not tried.
    """

    floats: Mapping[CandidateKey, Engine]
    mixtures: Mapping[str, Sequence[Mixture]]
    failed: tuple[Candidate, ...]
    quantiser: Quantiser | None


def try_candidates(
    job: BuildJob, tiling: Tiling, calibrating: Sequence[SampleWindow], engines: Engines, judge: Judge
) -> Trials:
    """Builds, times and judges every backend in every precision of the job, at the tile of ``tiling``.

    Raises:
        BackendError, GraphError, TileError: None could be built, or none run; the one that was asked for by name could
            not.
        ImageError: The one that was asked for is INT8, and there is nothing to calibrate it on.
    """
    built = _build_all(job, tiling, calibrating, engines, judge)
    quantiser, verdicts = built.quantiser, dict[CandidateKey, Verdict]()
    mixtures = {name: list(found) for name, found in built.mixtures.items()}
    if quantiser is not None:
        tile, batches = tiling.spec.tile, batches_to_try(job.model, tiling.spec)
        returned, verdicts = return_layers(
            job,
            quantiser,
            mixtures,
            built.floats,
            make=partial(int8_maker, job, engines, quantiser, tile, batches),
            drop=engines.drop,
            judge=judge.verdict,
            seconds=lambda engine: estimate_seconds(engine, tile, tiling.results.samples[0], job.threads),
        )
        for name, mixture in returned.items():
            mixtures[name].append(mixture)
    found, kept = dict(built.floats), dict[Engine, frozenset[str]]()
    for name, mixture in ((name, mixture) for name, some in mixtures.items() for mixture in some):
        key: CandidateKey = (name, "int8", mixture.label)
        found[key], kept[mixture.engine], verdicts[key] = mixture.engine, mixture.keep, mixture.verdict
    if not found:
        raise BackendError("no candidate could be built: " + "; ".join(c.note for c in built.failed))
    candidates = (*built.failed, *_measure_all(job, tiling, judge, found, verdicts))
    if all(c.verdict is None for c in candidates):
        raise BackendError("no candidate could be run: " + "; ".join(c.note for c in candidates))
    return Trials(candidates, found, kept, quantiser)


def _build_all(
    job: BuildJob, tiling: Tiling, calibrating: Sequence[SampleWindow], engines: Engines, judge: Judge
) -> _Built:
    """Every backend in every precision, as far as it can be built; INT8 as plain and as with its ends in FP32."""
    tile, batches, scope = tiling.spec.tile, batches_to_try(job.model, tiling.spec), job.scope
    floats, mixtures, failed = dict[CandidateKey, Engine](), dict[str, list[Mixture]](), list[Candidate]()
    quantiser: Quantiser | None = None
    for precision in scope.precisions:
        for name in scope.backends:
            late = job.deadline.left(INT8_ENDS) < INT8_RUNS * tiling.results.seconds
            if floats and (late if precision == "int8" else job.deadline.left() < 0):
                job.remarks.left_out.append(f"{name} {precision} was not tried")
                continue
            job.remarks.say(f"building {name} {precision}")
            try:
                if precision == "int8" and not scope.as_given:
                    check_int8(name, scope.device)
                    quantiser = quantiser or calibrate_model(job, tiling, calibrating)
                    make = int8_maker(job, engines, quantiser, tile, batches, name)
                    mixtures[name] = make_mixtures(job, quantiser, make, engines.drop, judge.verdict)
                else:
                    floats[name, precision, backends.get(name).variant] = engines.make(name, precision, tile, batches)
            except (BackendError, GraphError, TileError, ImageError) as error:  # the last: nothing to calibrate on
                alone = set(scope.precisions) == {precision}
                if alone and (isinstance(error, ImageError) or (job.options.explicit and len(scope.backends) == 1)):
                    raise
                failed.append(Candidate(name, precision, tile, note=str(error)))
                job.remarks.tell(failed[-1].sentence)
    return _Built(floats, mixtures, tuple(failed), quantiser)


def _measure_all(
    job: BuildJob,
    tiling: Tiling,
    judge: Judge,
    engines: Mapping[CandidateKey, Engine],
    known: Mapping[CandidateKey, Verdict],
) -> list[Candidate]:
    """Speed and verdict of every engine, as candidates; one that cannot be run is a candidate with a note.

    ``known`` are verdicts that the search needed already.
    """
    sample, tile, say = tiling.results.samples[0], tiling.spec.tile, job.remarks.say
    batches = batches_to_try(job.model, tiling.spec)
    x = tile_of(sample, tiling.spec, tile, job.threads)
    say(f"measuring {len(engines)} candidates at tile {size_text(tile)}")
    runs = [(key, batch) for key in engines for batch in batches]
    seconds = min(TIMED_S, TIMED_SHARE * max(0.0, job.deadline.left()))
    times = interleaved_times([(engines[key], tile, n) for key, n in runs], sample, job.threads, seconds=seconds)
    timings, candidates = dict(zip(runs, times, strict=True)), list[Candidate]()
    for key, engine in engines.items():
        verdict: Verdict | None = None
        ran = [n for n in batches if not isinstance(timings[key, n], BackendError)]
        if ran:
            say(f"parity of {' '.join(key).rstrip()}")
            try:
                verdict = judge.same_rows(engine, x, known.get(key) or judge.verdict(engine), ran, key)
            except BackendError as error:
                timings |= {(key, n): error for n in ran}
        for n in batches:
            candidate, timing = Candidate(key[0], key[1], tile, n, variant=key[2]), timings[key, n]
            if isinstance(timing, BackendError):
                candidate = replace(candidate, note=str(timing))
            else:
                candidate = add_timing(candidate, tile, timing, verdict, tiling.spec)
            candidates.append(candidate)
            job.remarks.tell(candidate.sentence)
    return candidates
