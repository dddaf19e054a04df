"""How far two runs of a graph in float32 may lie apart that differ in nothing but the order of their sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_HALF_ULP = 2.0**-24
# Both runs round, and what one layer rounds the next ones amplify a little.
_SAFETY = 8.0


@dataclass(frozen=True)
class Rounding:
    """What a graph's operators let float32 round.

    Attributes:
        sums: Roundings by layer, added up. Those of a sum of k products add up like a random walk: twice the root of k.
        coordinates: Resizes that read between pixels, at positions that float32 does not hold: by a factor of 3, say.
    """

    sums: float
    coordinates: int

    def bound(self, canvas: Sequence[int]) -> float:
        """Largest difference of a sample to the same sample in another tile, relative to the largest value."""
        return _HALF_ULP * _SAFETY * (self.sums + 2 * self.coordinates * max(canvas))


NO_ROUNDING = Rounding(0.0, 0)
