"""Build, step 4: every backend in every precision is built, timed and judged; those that cannot be say why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..baseline.results import tile_of
from ..baseline.samples import Sample
from ..engine.engine import Engine
from ..engine.parity import Verdict
from ..engine.spec import Precision
from ..errors import BackendError, GraphError, ImageError, TileError, size_text
from .engines import Engines, batches_to_try
from .int8 import calibrated, check_int8, int8_mixtures, maker, return_layers
from .job import Job
from .measure import Judge, interleaved_times, quick_seconds, with_timing
from .quantiser import Mixture, Quantiser
from .report import Candidate, Key
from .tiling import Tiling


@dataclass(frozen=True)
class Measured:
    """What was tried.

    Attributes:
        candidates: The table: those that could not be built first, each of the others once per batch size.
        engines: Of the candidates that could be built.
        kept: Of every INT8 engine among them, the layers that stay in FP32.
        quantiser: What made them; None where INT8 was not tried.
    """

    candidates: tuple[Candidate, ...]
    engines: Mapping[Key, Engine]
    kept: Mapping[Engine, frozenset[str]]
    quantiser: Quantiser | None


def try_candidates(
    job: Job,
    tiling: Tiling,
    calibrating: Sequence[Sample],
    engines: Engines,
    judge: Judge,
    names: Sequence[str],
    precisions: Sequence[Precision],
    *,
    explicit: bool,
) -> Measured:
    """Builds, times and judges the backends ``names`` in every precision, at the tile of ``tiling``.

    Raises:
        BackendError, GraphError, TileError: None could be built, or none run; the one that was asked for (``explicit``)
            could not.
        ImageError: The one that was asked for is INT8, and there is nothing to calibrate it on.
    """
    tile, batches = tiling.spec.tile, batches_to_try(job.model, tiling.spec)
    floats, found, failed = dict[Key, Engine](), dict[str, list[Mixture]](), list[Candidate]()
    quantiser: Quantiser | None = None
    for precision in precisions:
        for name in names:
            job.remarks.say(f"building {name} {precision}")
            try:
                if precision == "int8":
                    check_int8(name, tiling.spec.device)
                    quantiser = quantiser or calibrated(job, tiling, calibrating)
                    make = maker(job, engines, quantiser, tile, batches, name)
                    found[name] = int8_mixtures(job, quantiser, make, engines.drop, judge.verdict)
                else:
                    floats[name, precision, ""] = engines.make(name, precision, tile, batches)
            except (BackendError, GraphError, TileError, ImageError) as error:  # the last: nothing to calibrate on
                alone = set(precisions) == {precision}
                if alone and (isinstance(error, ImageError) or (explicit and len(names) == 1)):
                    raise
                failed.append(Candidate(name, precision, tile, note=str(error)))
    built, kept, verdicts = dict(floats), dict[Engine, frozenset[str]](), dict[Key, Verdict]()
    if quantiser is not None:
        returned, verdicts = return_layers(
            job,
            quantiser,
            found,
            floats,
            make=partial(maker, job, engines, quantiser, tile, batches),
            drop=engines.drop,
            judge=judge.verdict,
            seconds=lambda engine: quick_seconds(engine, tile, tiling.results.samples[0], job.threads),
        )
        for name, mixture in returned.items():
            found[name].append(mixture)
    for name, mixtures in found.items():
        for mixture in mixtures:
            key: Key = (name, "int8", mixture.label)
            built[key], kept[mixture.engine], verdicts[key] = mixture.engine, mixture.keep, mixture.verdict
    if not built:
        raise BackendError("no candidate could be built: " + "; ".join(c.note for c in failed))
    candidates = [*failed, *_measure(job, tiling, judge, built, verdicts, batches)]
    if all(c.verdict is None for c in candidates):
        raise BackendError("no candidate could be run: " + "; ".join(c.note for c in candidates))
    return Measured(tuple(candidates), built, kept, quantiser)


def _measure(
    job: Job,
    tiling: Tiling,
    judge: Judge,
    engines: Mapping[Key, Engine],
    known: Mapping[Key, Verdict],
    batches: Sequence[int],
) -> list[Candidate]:
    """Speed and verdict of every engine, as candidates; one that cannot be run is a candidate with a note.

    ``known`` are verdicts that the search needed already.
    """
    sample, tile, say = tiling.results.samples[0], tiling.spec.tile, job.remarks.say
    x = tile_of(sample, tiling.spec, tile, job.threads)
    say(f"measuring {len(engines)} candidates at tile {size_text(tile)}")
    runs = [(key, batch) for key in engines for batch in batches]
    times = interleaved_times([(engines[key], tile, n) for key, n in runs], sample, job.threads)
    timings, verdicts = dict(zip(runs, times, strict=True)), dict[Key, Verdict]()
    for key, engine in engines.items():
        ran = [n for n in batches if not isinstance(timings[key, n], BackendError)]
        if not ran:
            continue
        say(f"parity of {' '.join(key).rstrip()}")
        try:
            verdicts[key] = judge.same_rows(engine, x, known.get(key) or judge.verdict(engine), ran, key)
        except BackendError as error:
            for n in ran:
                timings[key, n] = error
    candidates = list[Candidate]()
    for (key, batch), timing in timings.items():
        candidate = Candidate(key[0], key[1], tile, batch, variant=key[2])
        if isinstance(timing, BackendError):
            candidates.append(replace(candidate, note=str(timing)))
        else:
            candidates.append(with_timing(candidate, tile, timing, verdicts[key], tiling.spec))
    return candidates
