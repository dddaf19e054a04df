"""Build, step 4: engines are held against the baseline, window by window and in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .baseline.results import raw_results
from .baseline.samples import Sample
from .baseline.tiles import judged_tile
from .build_baseline import Results, calibrating_results
from .build_job import Job
from .build_report import Key
from .build_tiling import Tiling
from .engine import parity as parity_module
from .engine.engine import Engine
from .engine.parity import BatchParity, ImageParity, Verdict
from .tiling.grid import tile_grid

Array = npt.NDArray[Any]


class Judge:
    """Verdicts on engines, and what the record of parity says of them besides.

    Attributes:
        batches: Tiles per run that were judged.
        rows: Of every candidate, agreement of one tile per batch size and output.
    """

    def __init__(self, job: Job, tiling: Tiling, calibrating: Sequence[Sample]):
        self.batches = {1}
        self.rows: dict[Key, tuple[BatchParity, ...]] = {}
        self._job, self._tiling, self._calibrating = job, tiling, calibrating
        self._wanted_tile: list[Array] = []  # the baseline's outputs on the tile that rows are about
        self._grown: dict[tuple[str, tuple[int, ...]], list[Array]] = {}  # its results by window and canvas

    def verdict(self, engine: Engine, tile: tuple[int, ...] | None = None) -> Verdict:
        """Whether an engine holds its budget on all windows.

        Those that calibrated INT8 judge the other precisions like any. INT8 itself they may disprove and never prove:
        its numbers are of the others, unless it misses the budget there.

        Args:
            engine: The engine.
            tile: Tile that windows are cut into; None: the engine's own, or one that gives them seams.
        """
        precision = engine.spec.precision
        budget = self._job.budget.of(precision)
        images = self._compared(engine, self._tiling.results, tile)
        verdict = parity_module.judge(images, budget)
        if not self._calibrating or (precision == "int8" and not verdict.accepted):
            return verdict
        remark = " (it calibrated)" if precision == "int8" else ""
        more = parity_module.judge([*images, *self._compared(engine, self._calibrated, tile, remark)], budget)
        return verdict if precision == "int8" and more.accepted else more

    def same_rows(
        self, engine: Engine, x: Array, verdict: Verdict, batches: Sequence[int], key: Key | None = None
    ) -> Verdict:
        """The verdict, with a reason more where identical tiles of one batch, or one alone, give different answers.

        Some builds of some libraries do (silently, for batches above one); it needs no baseline to be seen. For the
        record of ``key`` the tile is compared with the baseline, too, at every batch size.

        Args:
            engine: The engine.
            x: (1, C, *tile), a tile as the network gets it; the same for all calls with a ``key``.
            verdict: What is known of the engine.
            batches: Tiles per run that it is for.
            key: Of the candidate.
        """
        spec, budget = self._tiling.spec, self._job.budget.of(engine.spec.precision)
        alone = [y[0] for y in engine.run(x)]
        found, reasons = {1: (alone, True)}, tuple[str, ...]()
        for n in sorted({2, *batches} - {1}):
            self.batches.add(n)
            rows = engine.run(np.repeat(x, n, axis=0))
            images = parity_module.compare_outputs(alone, [y[0] for y in rows], spec, f"a tile in a batch of {n}")
            reasons += parity_module.judge(images, budget).reasons
            found[n] = ([y[0] for y in rows], all(np.array_equal(y[0], row) for y in rows for row in y[1:]))
            if not found[n][1]:
                reasons += (f"identical tiles of one batch of {n} give different answers",)
        if key is not None:
            self._wanted_tile = self._wanted_tile or [y[0] for y in self._job.baseline.run(x)]
            self.rows[key] = tuple(
                BatchParity(n, same, one)
                for n, (row, same) in found.items()
                for one in parity_module.compare_outputs(self._wanted_tile, row, spec, f"a tile, batch {n}")
            )
        return replace(verdict, accepted=verdict.accepted and not reasons, reasons=(*verdict.reasons, *reasons))

    @cached_property
    def _calibrated(self) -> Results:
        return calibrating_results(self._job, self._tiling.spec, self._calibrating)

    def _compared(
        self, engine: Engine, wanted: Results, tile: tuple[int, ...] | None, remark: str = ""
    ) -> list[ImageParity]:
        """Agreement with the baseline on every window, in tiles that give it seams."""
        images: list[ImageParity] = []
        for sample, whole in zip(wanted.samples, wanted.values, strict=True):
            grid = engine.spec.grid(sample.shape, tile or judged_tile(engine.spec, sample.shape))
            got = raw_results(engine, sample, grid, self._job.threads)
            same = self._on_canvas_of(engine, sample, whole)
            images += parity_module.compare_outputs(same, got, self._tiling.spec, f"{sample.name}{remark}")
        return images

    def _on_canvas_of(self, engine: Engine, sample: Sample, whole: list[Array]) -> list[Array]:
        """The baseline's results on the canvas of the engine's: ``whole``, but for windows smaller than a plan's tile.

        Their canvas is grown to the tile, so that the network sees other pixels behind the window's ends.
        """
        spec, canvas = self._tiling.spec, engine.spec.canvas_shape(sample.shape)
        if not spec.runs_whole or canvas == spec.canvas_shape(sample.shape):
            return whole
        key = sample.sha256, canvas
        if key not in self._grown:
            grid = tile_grid(sample.shape, canvas, spec.sizes, spec.outputs, least=canvas)
            self._grown[key] = raw_results(self._job.baseline, sample, grid, self._job.threads)
        return self._grown[key]
