"""Build, step 4: how long engines take for a tile, or for several at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from . import bench
from .baseline.results import tile_of
from .baseline.samples import Sample
from .baseline.tiles import kept_share
from .build_report import Candidate
from .engine.engine import Engine
from .engine.parity import Verdict
from .engine.spec import EngineSpec
from .errors import BackendError
from .system import timing as timing_module

Array = npt.NDArray[Any]


def interleaved_times(
    batches: Sequence[tuple[Engine, tuple[int, ...], int]], sample: Sample, threads: int, **options: Any
) -> list[timing_module.Timing | BackendError]:
    """Interleaved times of (engine, tile, batch); for one that cannot be run, what its backend says.

    Args:
        batches: What is run.
        sample: Where tiles are taken from.
        threads: Of the kernel that takes them.
        options: Of :func:`bench.interleave`.
    """
    with ExitStack() as stack:
        contenders = list[_Run]()
        for engine, tile, batch in batches:
            x = np.repeat(tile_of(sample, engine.spec, tile, threads), batch, axis=0)
            contenders.append(stack.enter_context(closing(_Run(engine, x))))
        if all(engine.device_session is not None for engine, _, _ in batches):
            options["rest_s"] = 0.0  # nothing spins on the host, and a GPU that rests lowers its clocks
        timings = timing_module.interleave(contenders, **options)
        return [run.error or run.of(timing) for run, timing in zip(contenders, timings, strict=True)]


def quick_seconds(engine: Engine, tile: tuple[int, ...], sample: Sample, threads: int) -> float:
    """Of one run, roughly: what is worth searching on with; candidates are compared by :func:`interleaved_times`."""
    (timing,) = interleaved_times([(engine, tile, 1)], sample, threads, runs=2, seconds=5.0)
    return float("inf") if isinstance(timing, BackendError) else timing.low_s


def with_timing(
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


class _Run:
    """One batch of an engine to be timed; once it has failed it keeps the error and does nothing more."""

    def __init__(self, engine: Engine, x: Array):
        self.error: BackendError | None = None
        self._engine, self._x = engine, x
        self._on_device: bench.DeviceRun | None = None
        if engine.device_session is not None:
            try:
                self._on_device = bench.DeviceRun(engine, x)
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
