"""How far an engine may differ from its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ContractError
from ..system.json import Record

LABEL_CHANGE = 1e-3  # share of labels that may change by default
LABEL_CHANGE_INT8 = 5e-3
_EXAMPLES = {
    "label_change": "1e-3",
    "dice": "0.99",
    "error": "1e-2",
    "seam": "1e-5",
    "rounding": "1e-4",
    "truth": "0.02",
    "class_px": "100",
}


@dataclass(frozen=True)
class Budget(Record):
    """What the user allows an engine to differ from its FP32 baseline, judged on the worst image.

    Attributes:
        label_change: Share of pixels whose label changes. None: 5e-3 for INT8, 1e-3 for everything else.
        dice: Lowest Dice of any class against the baseline's mask.
        error: For regression: largest error over the 1st to 99th percentile range of the baseline's output (where nearly
            all of it is one value, over all of its range; where all of it is, over that of the other images).
        seam: Share of labels that a measured halo may change (regression: the same ratio as ``error``).
        rounding: Share of labels that another tile may change, where a library's sums depend on it.
        truth: With labels: how far Dice or IoU of a class against them may fall below the baseline's. The default is what
            IoU may lose where Dice against the baseline's mask is 0.99.
        class_px: Classes of fewer pixels, in the baseline's mask and the engine's, are not judged on that image, but on
            all images together.
    """

    label_change: float | None = None
    dice: float = 0.99
    error: float = 1e-2
    seam: float = 1e-5
    rounding: float = 1e-4
    truth: float = 0.02
    class_px: int = 100

    def __post_init__(self) -> None:
        bounds = {
            "label_change": 1,
            "dice": 1,
            "error": float("inf"),
            "seam": 1,
            "rounding": 1,
            "truth": 1,
            "class_px": float("inf"),
        }
        low = 0
        for name, high in bounds.items():
            value = getattr(self, name)
            if value is None and name == "label_change":
                continue
            if not low <= value <= high:
                raise ContractError(
                    f"budget {name}={value} is outside {low} to {high}; pass e.g. {name}={_EXAMPLES[name]}"
                )

    def of(self, precision: str) -> Budget:
        """The budget with every default of ``precision`` written out."""
        if self.label_change is not None:
            return self
        return replace(self, label_change=LABEL_CHANGE_INT8 if precision == "int8" else LABEL_CHANGE)

    @property
    def labels(self) -> float:
        """``label_change`` with its default."""
        return LABEL_CHANGE if self.label_change is None else self.label_change


def parse_budget(parts: Sequence[str]) -> Budget | None:
    """The budget of words like ``label_change=1e-3``; None where there are none.

    Raises:
        ContractError: A word that is none, or a number outside its bounds.
    """
    if not parts:
        return None
    values: dict[str, Any] = {}
    for part in parts:
        key, _, text = part.partition("=")
        try:
            values[key] = int(text) if key == "class_px" else float(text)
        except ValueError:
            raise ContractError(f"--budget {part!r} is not KEY=NUMBER; pass e.g. --budget label_change=1e-3") from None
    known = set(Budget.__dataclass_fields__)
    if set(values) - known:
        raise ContractError(f"--budget knows {', '.join(sorted(known))}, not {', '.join(sorted(set(values) - known))}")
    return Budget(**values)
