"""Predictions in blocks, in a stage or in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..engine.engine import Engine
from ..images.source import Source
from .blocks import Block
from .compute import run_blocks
from .finish import check_target, clear, draw_overlay, write_instances, write_output
from .plan import Prepared, close, prepare
from .report import RunReport, class_share
from .request import Array, Request, Tables, check_tables, checked
from .stage import stage_folder
from .staged import Compute, in_stage
from .store import MemoryStore, Store
from .work import Progress, Spans, Tally


def predict(
    engine: Engine,
    source: Source,
    asked: Request,
    out: Path | None,
    *,
    staged: bool,
    overwrite: bool = False,
    restart: bool = False,
    compute: Compute | None = None,
    overlay: Path | None = None,
    tables: Tables | None = None,
    progress: Progress | None = None,
    trace: Spans | None = None,
) -> tuple[RunReport, Any]:
    """A prediction in blocks: its report, and the path written or the array, as :func:`unet_rt.prediction.predict.predict` has them."""
    tables = checked(engine, source, asked, tables)

    def check() -> None:
        """What an earlier run of the same command has not written may not be there."""
        if out is not None:
            check_target(out, overwrite=overwrite)
        check_tables(tables, overwrite=overwrite)

    if out is None or not (staged and stage_folder(out).exists()):
        check()
    ids: list[Array] = []

    def make(made: Prepared, store: Store, again: bool = False) -> None:
        if overlay is not None:
            draw_overlay(made, store, overlay)
        if asked.output == "instances":
            ids.append(write_instances(made, store, out, tables, overwrite=again or overwrite))
        elif out is not None:
            write_output(made, store, out, overwrite=again or overwrite)

    if staged and out is not None:
        report = in_stage(
            engine, source, asked, out, make, check,
            restart=restart, compute=compute, progress=progress, trace=trace,
        )  # fmt: skip
        return report, out
    store, report, made = in_memory(engine, source, asked, progress=progress, trace=trace)
    make(made, store)
    if out is not None:
        clear(out)
        return report, out
    result = ids[0] if ids else store.array
    return report, result.reshape(*source.plane_shape, *result.shape[1:])


# --- computing ------------------------------------------------------------------------------------------------------


def in_memory(
    engine: Engine, source: Source, asked: Request, *, progress: Progress | None = None, trace: Spans | None = None
) -> tuple[MemoryStore, RunReport, Prepared]:
    """The result as an array (planes, [K,] *spatial)."""
    made = prepare(engine, source, asked)
    try:
        lead = (made.decision.channels,) if made.decision.channels else ()
        store = MemoryStore(np.empty((source.planes, *lead, *made.shape), made.decision.dtype), made.place)
        total = Tally(made.decision.channels)

        def put(block: Block, values: Array, tally: Tally) -> None:
            store.write(block, values)
            total.add(tally)

        report = run_blocks(made, range(len(made.plan)), put, progress=progress, trace=trace)
    finally:
        close(made)
    report.class_share = class_share(total, made.decision, engine.spec)
    return store, report, made
