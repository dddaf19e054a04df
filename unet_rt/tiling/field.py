"""What a graph's outputs depend on: integers computed from the graph, needed to tile it exactly.

Frozen values only; no pixels, no ONNX. ``graph.py`` computes them, ``tiles.py`` uses them, ``engine.py`` stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Pair = tuple[int, int]


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

    ``fixed`` is the only size where the graph's own size could not be made free.
    """

    stride: int
    remainder: int
    minimum: int
    fixed: int | None = None

    def accepts(self, size: int) -> bool:
        if self.fixed is not None:
            return size == self.fixed
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

    def to_json(self) -> dict[str, Any]:
        f = self.field
        pairs = {
            key: {"before": [getattr(a, key)[0] for a in f], "after": [getattr(a, key)[1] for a in f]}
            for key in ("reach", "halo", "shrink")
        }
        return {
            "name": self.name,
            "axes": self.axes,
            "channels": self.channels,
            "stride": [a.stride for a in f],
            **pairs,
            "scale": [f"{a.scale.numerator}/{a.scale.denominator}" for a in f],
            "exact": self.exact,
            "reasons": list(self.reasons),
            "note": self.note,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OutputField:
        def pair(key: str, k: int) -> Pair:
            return data[key]["before"][k], data[key]["after"][k]

        field = tuple(
            AxisField(stride, pair("reach", k), pair("halo", k), pair("shrink", k), Fraction(data["scale"][k]))
            for k, stride in enumerate(data["stride"])
        )
        return cls(
            data["name"],
            data["axes"],
            data["channels"],
            field,
            data["exact"],
            tuple(data["reasons"]),
            data["note"],
        )
