"""How equal a tiled result is to the whole-image result: to the bit, or up to rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..system.json import Count, Record
from .budget import Budget

ROUNDING_ERROR = 1e-5  # of the range of a regression's values that FP32 may round away


@dataclass(frozen=True)
class Equality(Record):
    """How equal the results of two tile shapes are, as measured by build on pixels of the samples.

    Attributes:
        kind: ``bits``: every value was the same. ``rounding``: the same sums in another order.
        difference: The largest difference over the range of the output's values, of any output.
        labels: Share of labels that differ, of any output; None where the outputs have none.
        tile: The smaller tile, in pixels; the larger one was the whole window.
        window: Its pixels.
        tiles: How many of the smaller ones were compared, each at another place.
    """

    kind: Literal["bits", "rounding"]
    difference: float
    labels: float | None
    tile: tuple[Count, ...]
    window: tuple[Count, ...]
    tiles: Count

    def excess(self, budget: Budget, precision: str) -> str:
        """By what it misses a budget; "" where it does not."""
        if self.labels is not None:
            if self.labels <= budget.rounding:
                return ""
            return f"the tile changes {self.labels:.2e} of labels, budget rounding {budget.rounding:.1e}"
        bound = ROUNDING_ERROR if precision == "fp32" else budget.error
        if self.difference <= bound:
            return ""
        return f"the tile changes values by {self.difference:.2e} of the output's range, {bound:.1e} is allowed"

    def broken_by(self, error: float, difference: float, labels: float | None, budget: Budget, precision: str) -> str:
        """Why tiles are not as equal to the whole as was recorded; "" where they are.

        Args:
            error: The largest difference of a value between tiles and the whole.
            difference, labels: As the attributes, measured now.
            budget, precision: Of the engine.
        """
        now = replace(self, kind="rounding", difference=difference, labels=labels)
        if self.kind == "bits" and error:
            return f"tiles were equal to the bit where the engine was built, and here are {now.text}"
        return now.excess(budget, precision)

    @property
    def text(self) -> str:
        """In a few words, for tables and messages."""
        if self.kind == "bits":
            return "equal to the bit"
        labels = "" if self.labels is None else f", {self.labels:.1e} of labels" if self.labels else ", no label"
        return f"equal up to rounding ({self.difference:.1e} of the range{labels})"
