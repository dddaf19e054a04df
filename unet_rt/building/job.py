"""What every step of a build is given: what is built and by which rules, who hears about it, how long it may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..baseline.model import Model
from ..engine.budget import Budget
from ..engine.engine import Engine
from ..engine.spec import Precision

# How the time for the search is dealt out: the windows that parity is judged on are chosen so that the verdicts of all
# candidates take PARITY_SHARE of it; INT8 ends when the second and third share are used up, tiles when nearly all is.
PARITY_SHARE = 0.4
INT8_ENDS = 0.6
PUT_BACK_ENDS = 0.75
TILES_END = 0.95
TILED_COST = 1.6  # of a verdict over the baseline's own run: tiles have halos
INT8_RUNS = 2.0  # that INT8 costs per backend, in runs of the baseline: plain, its ends, mixtures


@dataclass(frozen=True)
class Remarks:
    """What a build says. Steps add to the lists in the order in which they find things out.

    Attributes:
        say: Receives progress in sentences, at once.
        notes: Decisions, for the report.
        warnings: What should be looked at, for the report.
        left_out: What there was no time for.
    """

    say: Say
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What stays the same from the task on to the folder.

    Attributes:
        model: What is built.
        baseline: It in FP32 on the CPU; its spec follows what is decided of the engine's.
        work: Folder for graphs and plans, gone after the build.
        budget: What may differ from the baseline.
        threads: Of backend and kernels; 0: by affinity and quota.
        deadline: Of the whole search.
        parity_seconds: How long the baseline may run on the samples.
        remarks: Where steps say what they do.
    """

    model: Model
    baseline: Engine
    work: Path
    budget: Budget
    threads: int
    deadline: Deadline
    parity_seconds: float
    remarks: Remarks


def parity_seconds(deadline: Deadline, names: Sequence[str], precisions: Sequence[Precision]) -> float:
    """How long the baseline may run on samples, so that as many can be judged for every candidate."""
    floats = len(names) * sum(p != "int8" for p in precisions)
    runs = 1 + TILED_COST * floats + INT8_RUNS * len(names) * ("int8" in precisions)
    return PARITY_SHARE * deadline.seconds / runs


Say = Callable[[str], None]


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
