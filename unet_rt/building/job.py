"""What every step of a build is given: what is built and by which rules, who hears about it, how long it may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..baseline.model import Model
from ..engine.budget import Budget
from ..engine.engine import Engine, EngineView
from ..engine.spec import EngineSpec, Precision
from ..tiling.axis import per_axis
from ..tiling.placement import Blend, PlacementRule

# How the time for the search is dealt out: the windows that parity is judged on are chosen so that the verdicts of all
# candidates take PARITY_SHARE of it; INT8 ends when the second and third share are used up, tiles when nearly all is.
PARITY_SHARE = 0.4
INT8_ENDS = 0.6
PUT_BACK_ENDS = 0.75
TILES_END = 0.95
TILED_COST = 1.6  # of a verdict over the baseline's own run: tiles have halos
INT8_RUNS = 2.0  # that INT8 costs per backend, in runs of the baseline: plain, its ends, mixtures


Equal = Literal["bits", "rounding"]
Say = Callable[[str], None]


def _keep_silent(text: str) -> None:
    """Where nobody listens."""


@dataclass(frozen=True)
class Deadline:
    """The time that a search has, from ``begun`` (of the monotonic clock) on; parts of it are named by their end."""

    begun: float
    seconds: float

    def left(self, share: float = 1.0) -> float:
        """Seconds until ``share`` of the time is used up; negative afterwards."""
        return self.begun + share * self.seconds - time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begun


@dataclass(frozen=True)
class Remarks:
    """What a build says. Steps add to the lists in the order in which they find things out.

    Attributes:
        say: Receives progress in sentences, at once.
        tell: Receives sentences that are worth keeping, at once: candidates as they are measured, what is missing.
        notes: Decisions, for the report.
        warnings: What should be looked at, for the report.
        left_out: What there was no time for.
    """

    say: Say
    tell: Say = _keep_silent
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BuildOptions:
    """What the caller of ``build`` asks of the engine, each as there; whatever stands here decides about it.

    Attributes:
        budget: What may differ from FP32.
        backend: ``auto`` or a backend's name.
        precision: ``auto`` or a precision.
        tile: Tile in pixels per axis; None: chosen.
        halo: ``auto``, ``exact``, ``measured``, or a number of samples.
        overlap: Pixels shared by blended tiles per axis; None: half a tile, of MONAI's placement a quarter.
        blend: Weights of blended tiles.
        placement: Where blended tiles lie, and whose weights they have.
        threads: Of backend and kernels; 0: by affinity and quota.
        keep_exam: Whether a few tiles travel with the engine.
        search_minutes: Time for the search.
        equal: How equal tiled results have to be: to the bit, or up to rounding.
    """

    budget: Budget
    backend: str
    precision: str
    tile: Sequence[int] | None
    halo: str | int
    overlap: Sequence[int] | None
    blend: Blend
    placement: PlacementRule
    threads: int
    keep_exam: bool
    search_minutes: float
    equal: Equal = "rounding"

    def along(self, spatial: int) -> BuildOptions:
        """The options with tile and overlap along each axis of a network, for which one number may stand."""
        tile, overlap = (size if size is None else per_axis(size, spatial) for size in (self.tile, self.overlap))
        return replace(self, tile=tile, overlap=overlap)

    @property
    def explicit(self) -> bool:
        """Whether backend or precision were asked for by name."""
        return self.backend != "auto" or self.precision != "auto"


@dataclass(frozen=True)
class Scope:
    """What is tried: every one of the backends in every one of the precisions, on one device.

    ``as_given``: the file's own precision, which nothing here makes.
    """

    device: str
    backends: tuple[str, ...]
    precisions: tuple[Precision, ...]
    as_given: bool = False


@dataclass(frozen=True)
class BuildJob:
    """What stays the same from the task on to the folder.

    Attributes:
        model: What is built.
        baseline: It in FP32 on the CPU, with what is decided of the engine's spec so far.
        work: Folder for graphs and plans, gone after the build.
        options: What was asked for.
        scope: What is tried.
        deadline: Of the whole search.
        parity_seconds: How long the baseline may run on the samples.
        remarks: Where steps say what they do.
    """

    model: Model
    baseline: Engine
    work: Path
    options: BuildOptions
    scope: Scope
    deadline: Deadline
    parity_seconds: float
    remarks: Remarks

    @property
    def budget(self) -> Budget:
        """What may differ from the baseline."""
        return self.options.budget

    @property
    def threads(self) -> int:
        """Of backend and kernels; 0: by affinity and quota."""
        return self.options.threads

    def decide(self, spec: EngineSpec) -> BuildJob:
        """The job with a baseline that is cut into tiles, and read, as engines of ``spec`` are."""
        spec = replace(spec, backend=self.baseline.spec.backend, precision="fp32", device="cpu")
        return replace(self, baseline=EngineView(self.baseline, spec))


def parity_seconds(deadline: Deadline, scope: Scope) -> float:
    """How long the baseline may run on samples, so that as many can be judged for every candidate."""
    floats = len(scope.backends) * sum(p != "int8" for p in scope.precisions)
    runs = 1 + TILED_COST * floats + INT8_RUNS * len(scope.backends) * ("int8" in scope.precisions)
    return PARITY_SHARE * deadline.seconds / runs
