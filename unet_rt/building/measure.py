"""Build, step 4: how long engines take for a tile, or for several at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property, partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..baseline.results import raw_results, tile_of
from ..baseline.samples import SampleWindow
from ..baseline.tiles import judged_tile, kept_share
from ..engine import parity as parity_module
from ..engine.engine import Engine
from ..engine.equality import Equality
from ..engine.parity import BatchParity, ImageParity, Verdict
from ..engine.spec import EngineSpec
from ..errors import BackendError
from ..system import facts
from ..system import timing as timing_module
from ..tiling.grid import tile_grid
from .equality import measure_equality
from .job import BuildJob
from .report import Candidate, CandidateKey
from .tiling import BaselineResults, Tiling, calibrating_results


def interleaved_times(
    batches: Sequence[tuple[Engine, tuple[int, ...], int]],
    sample: SampleWindow,
    threads: int,
    *,
    runs: int = 5,
    seconds: float = 30.0,
    warm_up: int = 1,
) -> list[timing_module.Timing | BackendError]:
    """Interleaved times of (engine, tile, batch); for one that cannot be run, what its backend says.

    Args:
        batches: What is run.
        sample: Where tiles are taken from.
        threads: Of the kernel that takes them.
        runs, seconds, warm_up: As for :func:`unet_rt.system.timing.interleave`.
    """
    with ExitStack() as stack:
        contenders = list[_TimedBatch]()
        for engine, tile, batch in batches:
            x = np.repeat(tile_of(sample, engine.spec, tile, threads), batch, axis=0)
            contenders.append(stack.enter_context(closing(_TimedBatch(engine, x))))
        interleave = partial(timing_module.interleave, contenders, runs=runs, seconds=seconds, warm_up=warm_up)
        if all(engine.device_session is not None for engine, _, _ in batches):
            timings = interleave(rest_s=0.0)  # nothing spins on the host, and a GPU that rests lowers its clocks
        else:
            timings = interleave()
        return [run.error or run.of(timing) for run, timing in zip(contenders, timings, strict=True)]


def estimate_seconds(engine: Engine, tile: tuple[int, ...], sample: SampleWindow, threads: int) -> float:
    """Of one run, roughly: what is worth searching on with; candidates are compared by :func:`interleaved_times`."""
    (timing,) = interleaved_times([(engine, tile, 1)], sample, threads, runs=2, seconds=5.0)
    return float("inf") if isinstance(timing, BackendError) else timing.low_s


def add_timing(
    candidate: Candidate, tile: tuple[int, ...], timing: timing_module.Timing, verdict: Verdict | None, spec: EngineSpec
) -> Candidate:
    """The candidate with its numbers at a tile; what of the tile is kept follows from the halo or overlap of ``spec``."""
    return replace(
        candidate,
        tile=tile,
        latency_ms=timing.median_s * 1e3,
        spread_ms=(timing.low_s * 1e3, timing.high_s * 1e3),
        kept_mpx_per_s=candidate.batch * prod(tile) * kept_share(spec, tile) / timing.median_s / 1e6,
        peak_mb=timing.peak_bytes / 1e6,
        verdict=verdict,
    )


class _TimedBatch:
    """One batch of an engine to be timed; once it has failed it keeps the error and does nothing more."""

    def __init__(self, engine: Engine, x: Array):
        self.error: BackendError | None = None
        self._engine, self._x = engine, x
        self._on_device: DeviceRun | None = None
        if engine.device_session is not None:
            try:
                self._on_device = DeviceRun(engine, x)
            except BackendError as error:
                self.error = error

    def __call__(self) -> None:
        if self.error is not None:
            return
        try:
            if self._on_device is not None:
                self._on_device()
            else:
                self._engine.run(self._x)
        except BackendError as error:
            self.error = error

    def of(self, timing: timing_module.Timing) -> timing_module.Timing:
        """Its timing, with the device's memory where it runs on one."""
        return timing if self._on_device is None else replace(timing, peak_bytes=self._on_device.grown)

    def close(self) -> None:
        if self._on_device is not None:
            self._on_device.close()


class DeviceRun:
    """One batch on a GPU, ready to be timed: arrays stay on the device, and a call returns when the run has ended.

    Attributes:
        grown: Device memory that the arrays and the first runs took, in bytes.
    """

    def __init__(self, engine: Engine, batch: npt.NDArray[Any]):
        """``batch`` (N, C, *tile), normalised pixels; runs it twice. One that the engine does not take is padded."""
        from ..kernels.device import Device

        session = engine.device_session
        if session is None:
            raise BackendError(f"{engine.spec.backend} runs on {engine.spec.device}, not on a GPU")
        device = Device.open(facts.cuda_index(engine.spec.device))
        free = device.memory()[0]
        short = engine.batch_for(len(batch)) - len(batch)
        arrays = engine.graph_inputs(np.concatenate([batch, np.repeat(batch[-1:], max(0, short), axis=0)]))
        self._session, self._inputs, self._outputs = session, list[Any](), list[Any]()
        try:
            for array, dtype in zip(arrays, session.input_dtypes, strict=True):
                pinned = device.pinned(array.shape, dtype)
                np.copyto(pinned, array, casting="unsafe")
                self._inputs.append(device.empty(array.shape, dtype))
                device.copy_in(self._inputs[-1], pinned, session.stream)
                session.stream.synchronize()
            shapes = session.output_shapes([array.shape for array in arrays])
            for shape, dtype in zip(shapes, session.output_dtypes, strict=True):
                self._outputs.append(device.empty(shape, dtype))
            for _ in range(2):
                self()
        except BaseException:
            self.close()
            raise
        self.grown = max(0, free - device.memory()[0])

    def __call__(self) -> None:
        self._session.run_device(self._inputs, self._outputs)
        self._session.stream.synchronize()

    def close(self) -> None:
        """Gives the arrays back."""
        for array in (*self._inputs, *self._outputs):
            array.free()


Array = npt.NDArray[Any]


class Judge:
    """Verdicts on engines, and what the record of parity says of them besides.

    Attributes:
        batches: Tiles per run that were judged.
        rows: Of every candidate, agreement of one tile per batch size and output.
    """

    def __init__(self, job: BuildJob, tiling: Tiling, calibrating: Sequence[SampleWindow]):
        self.batches = {1}
        self.rows: dict[CandidateKey, tuple[BatchParity, ...]] = {}
        self._job, self._tiling, self._calibrating = job, tiling, calibrating
        self._wanted_tile: list[Array] = []  # the baseline's outputs on the tile that rows are about
        self._equal = dict[Engine, Equality | None]()
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

    def equality(self, engine: Engine) -> Equality | None:
        """How equal tiles of an engine are to its whole image; measured once."""
        if engine not in self._equal:
            self._job.remarks.say(f"tiles of {engine.spec.backend} {engine.spec.precision} against the whole image")
            self._equal[engine] = measure_equality(engine, self._tiling.results.samples[0], self._job.threads)
        return self._equal[engine]

    def same_rows(
        self, engine: Engine, x: Array, verdict: Verdict, batches: Sequence[int], key: CandidateKey | None = None
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
    def _calibrated(self) -> BaselineResults:
        return calibrating_results(self._job, self._tiling.spec, self._calibrating)

    def _compared(
        self, engine: Engine, wanted: BaselineResults, tile: tuple[int, ...] | None, remark: str = ""
    ) -> list[ImageParity]:
        """Agreement with the baseline on every window, in tiles that give it seams; on the first where time is up.

        The windows after the first come farthest values first, so that what is left out would have said least.
        """
        precision = engine.spec.precision
        images: list[ImageParity] = []
        for k, (sample, whole) in enumerate(zip(wanted.samples, wanted.values, strict=True)):
            if k and self._job.deadline.left() < 0:
                self._job.remarks.left_out.append(
                    f"{engine.spec.backend} {precision} was judged on {k} of {len(wanted.samples)} sample windows"
                )
                break
            grid = engine.spec.grid(sample.shape, tile or judged_tile(engine.spec, sample.shape))
            got = raw_results(engine, sample, grid, self._job.threads)
            same = self._on_canvas_of(engine, sample, whole)
            images += parity_module.compare_outputs(same, got, self._tiling.spec, f"{sample.name}{remark}")
        return images

    def _on_canvas_of(self, engine: Engine, sample: SampleWindow, whole: list[Array]) -> list[Array]:
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
