"""What a graph's outputs depend on: integers computed from the graph, needed to tile it exactly.

Frozen values only; no pixels, no ONNX. ``graph.py`` computes them, ``tiles.py`` uses them, ``engine.py`` stores them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ..system.json import OPTIONAL, Count, Record, Size

Pair = tuple[int, int]


@dataclass(frozen=True)
class Sides:
    """Samples before and after, per spatial axis."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class AxisField:
    """One output along one spatial axis.

    Attributes:
        stride: Total down-sampling S in input pixels. Tile origins are multiples of it.
        reach: Input pixels (before, after) a sample's place that the sample depends on.
        halo: Output samples (before, after) at an inner tile edge that the edge touches; they are discarded.
        shrink: Output samples (before, after) that unpadded convolutions take away:
            ``out = scale * tile - shrink[0] - shrink[1]``. Output sample ``j`` of a tile is the sample
            ``j + shrink[0]`` of a lattice whose sample 0 lies at the tile's input pixel 0.
            Negative where the network adds samples.
        scale: Output samples per input pixel.
    """

    stride: int
    reach: Pair
    halo: Pair
    shrink: Pair
    scale: Fraction

    def out_size(self, size: int) -> int:
        """Output samples of an input of ``size`` pixels."""
        n = size * self.scale - sum(self.shrink)
        if n.denominator != 1:
            raise ValueError(f"size {size} px x scale {self.scale} is not a whole number of samples")
        return int(n)


@dataclass(frozen=True)
class TileSizes:
    """Input sizes along one spatial axis that the graph accepts: ``remainder`` modulo ``stride``, at least ``minimum``.

    ``fixed`` is the only size where the graph's own size could not be made free. Above ``exact_up_to`` the network computes
    something else, and tiles do not equal the whole image any more.
    """

    stride: Count
    remainder: Size
    minimum: Size
    fixed: Count | None = None
    exact_up_to: Count | None = field(default=None, metadata=OPTIONAL)

    def accepts(self, size: int) -> bool:
        if self.fixed is not None:
            return size == self.fixed
        if self.exact_up_to is not None and size > self.exact_up_to:
            return False
        return size >= self.minimum and size % self.stride == self.remainder

    def at_least(self, size: int) -> int:
        """Smallest accepted size that is not below ``size``; ``fixed`` graphs have one size only."""
        if self.fixed is not None:
            return self.fixed
        size = max(size, self.minimum)
        return size + (self.remainder - size) % self.stride

    def at_most(self, size: int) -> int:
        """Largest accepted size not above ``size``; ``minimum`` if there is none."""
        if self.fixed is not None:
            return self.fixed
        size = size if self.exact_up_to is None else min(size, self.exact_up_to)
        return max(size - (size - self.remainder) % self.stride, self.at_least(self.minimum))


@dataclass(frozen=True)
class OutputField:
    """One output of a graph.

    Attributes:
        name: Name of the graph output.
        axes: Its axes, e.g. ``"NCYX"``.
        channels: Number of channels (1 where there is no channel axis).
        field: One :class:`AxisField` per spatial axis, in the order of ``axes``.
        exact: Whether tiles stitched from their cores equal whole-image inference.
        reasons: Why not: one sentence per node at fault (empty where exact).
        note: Bound of a residual rounding error where ``exact`` holds only up to float32 coordinates, else "".
    """

    name: str
    axes: str
    channels: int
    field: tuple[AxisField, ...]
    exact: bool
    reasons: tuple[str, ...] = ()
    note: str = ""

    @property
    def scale_text(self) -> str:
        """A sentence where results have another size than the image, "" where they have the image's."""
        if all(f.scale == 1 for f in self.field):
            return ""
        scales = " x ".join(str(f.scale) for f in self.field)
        return (
            f"output {self.name} has {scales} samples per pixel: its results are written at that size, not the image's"
        )

    def to_json(self) -> dict[str, Any]:
        f = self.field

        def sides(key: str) -> Sides:
            return Sides(tuple(getattr(a, key)[0] for a in f), tuple(getattr(a, key)[1] for a in f))

        return FieldRecord(
            self.name,
            self.axes,
            self.channels,
            tuple(a.stride for a in f),
            sides("reach"),
            sides("halo"),
            sides("shrink"),
            tuple(a.scale for a in f),
            self.exact,
            self.reasons,
            self.note,
        ).to_json()


@dataclass(frozen=True)
class FieldRecord(Record):
    """An :class:`OutputField` as it is written: axis by axis in every entry."""

    name: str
    axes: str
    channels: Count
    stride: tuple[Count, ...]
    reach: Sides
    halo: Sides
    shrink: Sides
    scale: tuple[Fraction, ...]
    exact: bool
    reasons: tuple[str, ...]
    note: str

    def __post_init__(self) -> None:
        lengths = {len(self.stride), len(self.scale)}
        lengths |= {len(side) for sides in (self.reach, self.halo, self.shrink) for side in (sides.before, sides.after)}
        if len(lengths) > 1:
            raise ValueError("stride, reach, halo, shrink and scale differ in their number of axes")
        if any(n < 0 for n in (*self.halo.before, *self.halo.after)):
            raise ValueError(f"halo {self.halo.before}, {self.halo.after} must not be negative")
        if any(scale <= 0 for scale in self.scale):
            raise ValueError(f"scale {', '.join(map(str, self.scale))} must be above 0")

    @property
    def output(self) -> OutputField:
        """The value that was written."""
        sides = [zip(s.before, s.after, strict=True) for s in (self.reach, self.halo, self.shrink)]
        axes = zip(self.stride, *sides, self.scale, strict=True)
        field = tuple(AxisField(*axis) for axis in axes)
        return OutputField(self.name, self.axes, self.channels, field, self.exact, self.reasons, self.note)
