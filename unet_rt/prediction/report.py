"""What a prediction did: tiles, times, memory, shares of classes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from ..engine.parity import class_name
from ..system import limits
from ..system.json import Record
from ..tiling.decision import Decision
from ..tiling.grid import TileGrid
from .work import Computation, StageClock, Tally, Work

if TYPE_CHECKING:
    from ..contract.contract import Contract
    from ..engine.spec import EngineSpec
    from ..outputs.tables import Summary


OUTSIDE_LOUD = 0.2  # share of pixels outside the range seen at build from which on a result may mean nothing


@dataclass
class RunReport(Record):
    """What one prediction did.

    Attributes:
        image: Name of the image.
        reading: How it was read, in a sentence.
        backend, precision, device: Where it ran.
        tile, halo: Tile in pixels and the halo used, in samples (before, after) per axis.
        tiles: Tiles computed.
        batch: Tiles per run, at most; fewer than asked where a GPU's memory did not hold them.
        mpx: Megapixels of the image, all planes.
        seconds: Wall time; ``stages`` are seconds busy per stage (they overlap): read, gather, infer, stitch, write.
        peak_rss_bytes: Peak resident memory of the process so far.
        class_share: Share of pixels per label (masks only); for a multi-label task per class, which may overlap.
        outside_range: Share of pixels that lie outside the range seen at build as the network gets them, normalised:
            grey levels say little where an image is normalised by its own statistics. None where build saw no samples.
        found: Of numbered objects: how many, and how large.
        notes: What else is worth saying.
    """

    image: str
    reading: str
    backend: str
    precision: str
    device: str
    tile: tuple[int, ...] = ()
    halo: tuple[tuple[int, int], ...] | None = None
    tiles: int = 0
    batch: int = 1
    mpx: float = 0.0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    class_share: dict[str, float] = field(default_factory=dict)
    outside_range: float | None = None
    found: Summary | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def mpx_per_s(self) -> float:
        return self.mpx / self.seconds if self.seconds else 0.0

    @property
    def range_warning(self) -> str:
        """What is to be said before the result where many pixels are unlike those of build; else empty."""
        if self.outside_range is None or self.outside_range <= OUTSIDE_LOUD:
            return ""
        return (
            f"{self.image}: {self.outside_range:.0%} of pixels, normalised, lie outside the range seen at build: the result "
            "may mean nothing; check bit depth, --normalize and --channels"
        )

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "mpx_per_s": self.mpx_per_s}


def merge_reports(reports: Sequence[RunReport]) -> RunReport:
    """One report of several runs on one image: sums of their work and stages; the first one's everything else."""
    first = reports[0]
    return replace(
        first,
        tiles=sum(r.tiles for r in reports),
        batch=min(r.batch for r in reports),
        mpx=sum(r.mpx for r in reports),
        seconds=sum(r.seconds for r in reports),
        stages={name: round(sum(r.stages.get(name, 0.0) for r in reports), 4) for name in first.stages},
        peak_rss_bytes=max(r.peak_rss_bytes for r in reports),
        notes=list(dict.fromkeys(note for r in reports for note in r.notes)),
    )


class Seen:
    """What a run has done so far, for its report."""

    def __init__(self, computation: Computation, *, read: bool = True) -> None:
        """``read``: whether anybody reads the report; the peak of memory takes a fifth of a millisecond to look up."""
        self._computation, self._read = computation, read
        self.begun = time.perf_counter()
        self.tally = Tally(computation.decision.channels)
        self.tiles = self.px = 0
        self.grid: TileGrid | None = None

    def begin(self, work: Work) -> Tally:
        """The tally of a new work."""
        self.grid = self.grid or work.grid
        self.tiles += work.grid.count
        self.px += prod(stop - start for start, stop in (axis.wanted for axis in work.grid.axes))
        return Tally(self._computation.decision.channels)

    def end(self, tally: Tally) -> None:
        self.tally.add(tally)

    def report(self, clock: StageClock, batch: int) -> RunReport:
        """The report of the run, which is over."""
        made, grid, spec = self._computation, self.grid, self._computation.spec
        exact = grid is not None and not grid.blended
        return RunReport(
            image=made.source.name,
            reading=made.source.reading,
            backend=spec.backend,
            precision=spec.precision,
            device=spec.device,
            tile=() if grid is None else grid.tile,
            halo=tuple(f.halo for f in grid.outputs[made.output].field) if grid is not None and exact else None,
            tiles=self.tiles,
            batch=batch,
            mpx=self.px / 1e6,
            seconds=time.perf_counter() - self.begun,
            stages={name: round(s, 4) for name, s in clock.seconds.items()},
            peak_rss_bytes=limits.peak_rss_bytes() if self._read else 0,
            class_share=class_share(self.tally, made.decision, spec.contract_of(made.output)),
            outside_range=self.tally.outside_share(),
            notes=[] if grid is None else _seam_notes(spec, grid),
        )


def class_share(tally: Tally, decision: Decision, contract: Contract) -> dict[str, float]:
    """Share of the counted pixels per class name; of a multi-label mask per class, which may overlap."""
    shares = tally.labels
    total = int(shares[0].sum())
    if not total:
        return {}
    values = decision.values
    if decision.channels:  # multi-label: a mask per class
        return {class_name(contract, k): float(counts[values[1]] / total) for k, counts in enumerate(shares)}
    return {name: float(shares[0, value] / total) for value, name in label_names(decision, contract).items()}


def label_names(decision: Decision, contract: Contract) -> dict[int, str]:
    """What each value of a mask of one channel means; where several classes share a value, the first of them."""
    names: dict[int, str] = {}
    sides = ("off", *contract.classes)[-2:] if contract.classes else ("off", "on")  # of the threshold of one channel
    for k, value in enumerate(decision.values):
        names.setdefault(value, class_name(contract, k) if decision.op == "argmax" else sides[k])
    return names


def _seam_notes(spec: EngineSpec, grid: TileGrid) -> list[str]:
    """Where the halo is not exact, smaller tiles have more seams than those it was judged on."""
    if spec.halo_limit is None or all(
        a.tile >= min(t, a.canvas.size) for a, t in zip(grid.axes, spec.tile, strict=True)
    ):
        return []
    return ["the tile is smaller than the built one, and the halo is not exact: there are more seams than were judged"]
