"""Runs tiles on the host or on the engine's device, whichever serves; smaller tiles where a GPU's memory is short."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from ..engine.engine import Engine
from ..errors import DeviceMemoryError, TileMemoryError, size_text
from ..tiling.grid import TileGrid
from . import host
from .report import RunReport, Seen, class_share, merge_reports
from .work import UNSEEN, Computation, Done, Observer, Progress, StageClock, Tally, Work, Write

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


def run(
    computation: Computation,
    works: Iterable[Work],
    write: Write | None,
    *,
    done: Done | None = None,
    observer: Observer = UNSEEN,
    total: int | None = None,
    stop: threading.Event | None = None,
    beside: Sequence[tuple[Computation, Write]] = (),
) -> RunReport:
    """Runs works on the engine's GPU from end to end where its kernels can fill its tiles, else with tiles from the host.

    Args:
        computation, works, done, observer, total, stop, beside: As for :func:`unet_rt.prediction.host.run`; on a GPU
            nothing is traced.
        write: As there. None: nothing is copied to the host, and labels are not counted (``computation.target``).
    """
    if computation.engine.device_session is not None:
        from . import device

        if device.serves(computation.engine, computation.output):
            works = list(works) if beside or total is None else works
            total = sum(work.grid.count for work in works) if isinstance(works, list) else total or 0
            report = _on_device(computation, works, write, done=done, progress=observer.progress, total=total)
            for other, receive in beside:
                _on_device(other, works, receive, done=None, progress=None, total=total)
            return report
    assert write is not None  # noqa: S101 - results that stay on a device are made there
    return host.run(
        computation, works, write, done=done, observer=observer, total=total, stop=stop, beside=beside,
    )  # fmt: skip


def _on_device(
    computation: Computation,
    works: Iterable[Work],
    write: Write | None,
    *,
    done: Done | None,
    progress: Progress | None,
    total: int,
) -> RunReport:
    """Runs works on the engine's device, some at a time: they are taken as they are needed."""
    from . import device

    seen, reports = Seen(computation), list[RunReport]()
    for group in _groups(works):
        before = sum(report.tiles for report in reports)

        def tell(now: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + now, total)

        def end(work: Work, tally: Tally) -> None:
            seen.end(tally)
            if done is not None:
                done(work, tally)

        try:
            report = device.run(computation, group, write, done=end, progress=tell, total=total)
        except TileMemoryError as error:
            if not reports:
                raise
            raise DeviceMemoryError(str(error)) from error  # others took memory meanwhile, and tiles were run
        reports.append(report)
        computation = replace(computation, batch=report.batch)  # what memory did not hold is not tried again
    if not reports:
        return seen.report(StageClock(), computation.batch)
    merged = merge_reports(reports)
    merged.seconds = time.perf_counter() - seen.begun
    contract = computation.spec.contract_of(computation.output)
    merged.class_share = class_share(seen.tally, computation.decision, contract)
    merged.outside_range = seen.tally.outside_share()
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
