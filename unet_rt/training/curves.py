"""Loss and IoU while training, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..outputs.charts import Axes, beside, lines
from .trainer import Progress


def training_curves(history: Sequence[Progress], path: Path) -> None:
    """Loss and validation IoU against the step, the best one marked; a PNG."""
    best = max(history, key=lambda p: p.iou)
    loss = lines(
        Axes("training loss (weighted cross entropy)", "step", log_y=True),
        {"loss": [(p.step, p.loss) for p in history]},
    )
    iou = lines(
        Axes("validation IoU", "step"),
        {"IoU": [(p.step, p.iou) for p in history]},
        {f"best {best.iou:.4f}": (best.step, best.iou)},
    )
    beside([loss, iou]).save(path)
