"""What a build reports: the table of candidates that were measured, and what was decided from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..engine.parity import ImageParity, Verdict
from ..engine.spec import EngineSpec, Precision
from ..errors import size_text
from ..system.json import Record
from .quantiser import LayerCost

CandidateKey = tuple[str, Precision, str]  # of a candidate: backend, precision, variant
Kind = Literal["samples", "synthetic"]  # of windows: the user's, or generated ones, which prove FP32 only


@dataclass(frozen=True)
class Candidate(Record):
    """One measured way to run the model; ``verdict`` is None and ``note`` says why where it could not be tried.

    ``latency_ms`` is that of a run of ``batch`` tiles; ``variant`` says what is not INT8 in an INT8 graph.
    """

    backend: str
    precision: Precision
    tile: tuple[int, ...]
    batch: int = 1
    latency_ms: float | None = None
    spread_ms: tuple[float, float] | None = None
    kept_mpx_per_s: float | None = None
    peak_mb: float | None = None
    verdict: Verdict | None = None
    note: str = ""
    variant: str = ""

    @property
    def key(self) -> CandidateKey:
        """What tells it from other candidates at the same tile and batch."""
        return self.backend, self.precision, self.variant

    @property
    def title(self) -> str:
        """Backend, precision and variant, for messages."""
        variant = f" ({self.variant})" if self.variant else ""
        return f"{self.backend} {self.precision}{variant}"

    @property
    def sentence(self) -> str:
        """What was measured of it, or why nothing was."""
        if self.verdict is None or self.latency_ms is None:
            return f"{self.title}: not tried: {self.note}"
        runs = f"{self.batch} tiles" if self.batch > 1 else "a tile"
        change = [] if self.verdict.label_change is None else [f"{self.verdict.label_change:.4%} of labels change"]
        change += [] if self.verdict.error is None else [f"largest error {self.verdict.error:.1e} of the range"]
        where = "inside the budget" if self.verdict.accepted else "outside the budget"
        return (
            f"{self.title}: {self.latency_ms:.3g} ms for {runs} of {size_text(self.tile)} px, "
            f"{self.kept_mpx_per_s or 0:.3g} kept Mpx/s; {', '.join([*change, where])}"
        )


@dataclass(frozen=True)
class BuildReport(Record):
    """What ``build`` measured, what it chose and why.

    Attributes:
        folder: The engine folder.
        spec: Its spec.
        candidates: The measured table; ``chosen`` is the index of the engine in it.
        samples: How many windows parity was judged on; ``kind`` is ``samples`` or ``synthetic``.
        first: What the first sample looks like to the network: range, mean, deviation after normalisation, class shares.
        seams: Seam error per halo that was tried, where the halo was measured.
        whole_mismatch: For networks that cannot be tiled exactly: the difference to the whole image (reported, not judged).
        notes: Decisions, in sentences.
        warnings: What should be looked at.
        advice: The command that would make it faster or safer, without the options that were given (the command line
            puts its own in); "" where there is none.
        layers: Where plain INT8 missed the budget: what returning each layer to FP32 won and cost.
        reached: Seconds from the beginning to the end of each step: ``samples`` read, ``tiling`` and the baseline's
            results, ``candidates`` made and judged, the ``choice`` with its tile.
    """

    folder: Path
    spec: EngineSpec
    candidates: tuple[Candidate, ...]
    chosen: int
    kind: Kind
    samples: int
    first: dict[str, Any]
    seams: dict[int, float] = field(default_factory=dict)
    whole_mismatch: ImageParity | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    advice: str = ""
    layers: tuple[LayerCost, ...] = ()
    reached: dict[str, float] = field(default_factory=dict)
