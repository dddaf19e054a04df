"""Build, step 5: whether tiles beside each other, on fewer threads each, keep more per second than one after another."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from ..baseline.results import tile_of
from ..engine.engine import Engine
from ..errors import BackendError
from ..prediction.plan import MEMORY_SHARE
from ..system import limits
from .engines import Engines
from .job import TILES_END, BuildJob
from .measure import add_timing, interleaved_times
from .report import Candidate
from .tiling import Tiling

WORTH = 1.03  # times the speed of one tile at a time, for the memory of several
RUNS = 5


def try_streams(
    job: BuildJob, tiling: Tiling, best: Candidate, engine: Engine, engines: Engines, bytes_per_px: float
) -> tuple[Engine, list[Candidate]]:
    """Measures an engine with two tiles at once, and with one per thread, against one at a time.

    Args:
        job, tiling, engines: Of the build.
        best: The candidate that was chosen, and its tile.
        engine: It.
        bytes_per_px: Memory that running it takes per tile pixel.

    Returns:
        The engine that is fastest, and the candidates that were measured: the last belongs to it, if it is another one.
    """
    spec, threads = engine.spec, job.threads or limits.threads()
    fits = bytes_per_px * prod(best.tile) * 2 <= MEMORY_SHARE * limits.memory_bytes()
    seconds = (best.latency_ms or 0.0) / 1e3 * 2 * (RUNS + 1)
    if spec.device != "cpu" or threads < 2 or (spec.batch or 1) != 1 or best.batch != 1 or not fits:
        return engine, []
    if job.deadline.left(TILES_END) < 2 * seconds:
        job.remarks.left_out.append("tiles beside each other were not tried")
        return engine, []
    job.remarks.say("measuring tiles beside each other")
    sample = tiling.results.samples[0]
    x = tile_of(sample, tiling.spec, best.tile, job.threads)
    alone, tried = engine.run(x), list[tuple[int, Engine]]()
    for streams in sorted({2, threads}):
        if bytes_per_px * prod(best.tile) * streams > MEMORY_SHARE * limits.memory_bytes():
            continue
        many = engines.with_streams(engine, streams)
        try:
            rows = many.run(np.repeat(x, streams, axis=0))
        except BackendError as error:
            job.remarks.notes.append(f"{streams} tiles beside each other were tried and left: {error}")
            many.close()
            continue
        if all(np.array_equal(one[0], row) for one, of_all in zip(alone, rows, strict=True) for row in of_all):
            tried.append((streams, many))
        else:
            job.remarks.notes.append(f"{streams} tiles beside each other were left: other threads give other bits")
            many.close()
    timings = interleaved_times(
        [(engine, best.tile, 1), *((many, best.tile, streams) for streams, many in tried)],
        sample,
        job.threads,
        runs=RUNS,
    )
    winner, rows_out, most = engine, list[Candidate](), 0.0
    if not isinstance(timings[0], BackendError):
        most = WORTH / timings[0].median_s
    for (streams, many), timing in zip(tried, timings[1:], strict=True):
        if isinstance(timing, BackendError):
            continue
        row = replace(best, batch=streams, variant=", ".join(p for p in (best.variant, "tiles beside each other") if p))
        row = add_timing(row, best.tile, timing, best.verdict, tiling.spec)
        job.remarks.tell(row.sentence)
        if streams / timing.median_s > most:
            most, winner = streams / timing.median_s, many
            rows_out.append(row)
        else:
            rows_out.insert(0, row)
    for _, many in tried:
        if many is not winner:
            many.close()
    return winner, rows_out
