"""Runs tiles on the host or on the engine's device; smaller tiles where memory is short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from ..errors import DeviceMemoryError, TileMemoryError, size_text
from ..images.normalize import Affines, OnePlane
from ..tiling.decision import Decision
from ..tiling.grid import TileGrid
from .report import RunReport, Seen, class_share, together
from .work import Done, Progress, StageClock, Tally, Work, Write

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..images.source import Source


DEVICE_WORKS = 64  # that a GPU's pipeline is given at once,
DEVICE_HELD_BYTES = 2**25  # and what they may hold together: little beside what a process with a GPU takes anyway


def with_smaller_tiles(
    engine: Engine,
    grid: TileGrid,
    batch: int,
    attempt: Callable[[TileGrid, int], RunReport],
    *,
    asked: bool,
    aligned: bool = False,
) -> RunReport:
    """Runs tiles; where a GPU's memory does not hold them, fewer at once, and then smaller ones of the same result.

    A note of the report says what was run instead of what, and why.

    Args:
        engine: Runs the tiles.
        grid: The tiles.
        batch: Tiles per run.
        attempt: Runs the tiles of a grid, so many at once, from the start.
        asked: The user chose the tile, which is not changed: the error names the smaller one.
        aligned: Whether ``grid`` is aligned.

    Raises:
        TileMemoryError: There are no smaller tiles of the same result, or the tile was ``asked`` for.
    """
    tried, size, notes, why = grid, batch, list[str](), ""
    while True:
        try:
            report = attempt(tried, size)
        except TileMemoryError as error:
            fewer = engine.fewer(error.batch)
            if fewer < error.batch:
                size, notes = fewer, [f"{error}; {fewer} tiles per run instead of {error.batch}"]
                continue
            smaller = engine.spec.smaller_grid(tried, aligned=aligned)
            if smaller is None:
                raise
            if asked:
                raise TileMemoryError(
                    f"{error}; --tile {size_text(tried.tile)} was asked: use --tile {size_text(smaller.tile)}, or leave "
                    "--tile away",
                    error.batch,
                ) from error
            tried, size, notes, why = smaller, batch, [], why or str(error)
        else:
            if tried is not grid:
                text = f"tiles of {size_text(tried.tile)} px instead of {size_text(grid.tile)}, for the same result"
                notes.insert(0, f"{why}; {text}")
            report.notes[:0] = notes
            return report


def on_device(
    engine: Engine, source: Source, works: Iterable[Work], decision: Decision, write: Write, affines: Affines | OnePlane,
    *, output: int, batch: int, total: int, progress: Progress | None, done: Done | None,
) -> RunReport:  # fmt: skip
    """Runs works on the engine's device, some at a time: they are taken as they are needed."""
    from . import device as predict_device

    begun, reports = time.perf_counter(), list[RunReport]()
    seen = Seen(decision)
    for group in _groups(works):
        before = sum(report.tiles for report in reports)

        def told(now: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + now, total)

        def ended(work: Work, tally: Tally) -> None:
            seen.end(tally)
            if done is not None:
                done(work, tally)

        try:
            report = predict_device.run(
                engine, source, group, decision, write, affines,
                output=output, batch=batch, total=total, progress=told, done=ended,
            )  # fmt: skip
        except TileMemoryError as error:
            if not reports:
                raise
            raise DeviceMemoryError(str(error)) from error  # others took memory meanwhile, and tiles were run
        reports.append(report)
        batch = report.batch  # what memory did not hold is not tried again
    if not reports:
        return seen.report(engine.spec, source, output, batch, begun, StageClock())
    merged = together(reports)
    merged.seconds = time.perf_counter() - begun
    merged.class_share, merged.outside_range = (
        class_share(seen.tally, decision, engine.spec),
        seen.tally.outside_share(),
    )
    return merged


def _groups(works: Iterable[Work]) -> Iterator[list[Work]]:
    """Works, some at a time; those of a group are made when it is asked for."""
    group, held = list[Work](), 0
    for work in works:
        group.append(work)
        held += work.held_bytes
        if len(group) == DEVICE_WORKS or held >= DEVICE_HELD_BYTES:
            yield group
            group.clear()  # the caller is done with them, and knows them still
            held = 0
    if group:
        yield group
