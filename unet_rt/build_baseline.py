"""What the baseline makes of the samples: what every engine is compared with, as far as there is time for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from .baseline.results import raw_results
from .baseline.samples import Sample
from .baseline.tiles import whole_grid
from .build_job import Job
from .build_samples import Samples
from .calibration import reach
from .engine.spec import EngineSpec

Array = npt.NDArray[Any]

FEWEST_WINDOWS = 3


@dataclass(frozen=True)
class Results:
    """The baseline's results.

    Attributes:
        samples: The windows that there was time for; the first is always among them.
        values: Of each window, every output (K, *spatial), float32.
    """

    samples: tuple[Sample, ...]
    values: tuple[list[Array], ...]


def judging_results(job: Job, spec: EngineSpec, samples: Samples) -> Results:
    """The baseline on the windows that parity is judged on."""
    windows, values, spent = _farthest_first(samples.judging), list[list[Array]](), 0.0
    least = FEWEST_WINDOWS if samples.kind == "samples" else 1
    for k, sample in enumerate(windows, start=1):
        begun = time.perf_counter()
        values.append(_values(job, spec, sample))
        spent += time.perf_counter() - begun
        job.remarks.say(f"baseline {k}/{len(windows)}: {sample.name}")
        if k >= least and spent * (k + 1) / k > job.parity_seconds and k < len(windows):
            job.remarks.left_out.append(f"parity is judged on {k} of {len(windows)} sample windows")
            break
    return Results(windows[: len(values)], tuple(values))


def calibrating_results(job: Job, spec: EngineSpec, windows: Sequence[Sample]) -> Results:
    """The baseline on the windows that calibrated: they prove nothing for INT8, and may disprove it."""
    values, spent = list[list[Array]](), 0.0
    for k, sample in enumerate(windows, start=1):
        begun = time.perf_counter()
        values.append(_values(job, spec, sample))
        spent += time.perf_counter() - begun
        if spent > job.parity_seconds / 4 and k < len(windows):
            job.remarks.left_out.append(f"{len(windows) - k} windows that calibrated were not judged as well")
            break
    return Results(tuple(windows[: len(values)]), tuple(values))


def _farthest_first(windows: Sequence[Sample]) -> tuple[Sample, ...]:
    """The first window, which reports are about, then those whose values go farthest: where time is short, they judge."""
    return (*windows[:1], *sorted(windows[1:], key=lambda sample: -reach(sample)))


def _values(job: Job, spec: EngineSpec, sample: Sample) -> list[Array]:
    """Whole where there is a whole-image result, in the engine's tiles otherwise."""
    grid = whole_grid(spec, sample.shape) if spec.runs_whole else spec.grid(sample.shape, spec.tile)
    return raw_results(job.baseline, sample, grid, job.threads)
