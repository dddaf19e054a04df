"""The distance that a network predicts beside its mask: what touching objects are split by."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..tiling.decision import decide
from .blocks import Block
from .compute import run_blocks
from .plan import Plan
from .store import ArrayStore, PackedStore, Readable
from .work import Array, Tally

ReadPlane = Callable[[int, Sequence[int], Sequence[int]], Array]  # (plane, start, stop) -> distances


@contextmanager
def distances(plan: Plan, output: int, folder: Path | None) -> Iterator[ReadPlane]:
    """Runs the network once more, for its distances.

    Args:
        plan: That of the mask.
        output: The output that holds them.
        folder: Keeps them block by block until the end, for a run that goes on after a kill; None: memory.
    """
    decision = decide(plan.engine.spec.contract_of(output), 1, "raw")
    wanted = replace(plan, output=output, decision=decision, first=decision, nodata=float("nan"))
    every = range(len(wanted.blocks))
    store: Readable
    if folder is None:
        store = ArrayStore(np.empty(wanted.array_shape, np.float32), wanted.place)
        run_blocks(wanted, every, store.keep)
    else:
        store = packed = PackedStore(folder, wanted.cuts)

        def keep(block: Block, values: Array, tally: Tally) -> None:
            packed.write(block, values)

        run_blocks(wanted, [n for n in every if not packed.holds(n)], keep)
    try:
        yield partial(_read, store)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _read(store: Readable, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
    values: Array = store.window(plane, start, stop)[0]
    return values
