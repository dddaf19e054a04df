"""Training of the reference networks (PyTorch; ``pip install unet-rt[train]``)."""

from .samples import Augmentation, Sample, normalized, prepare, split_by_blocks
from .trainer import (
    Progress,
    Recipe,
    TrainingError,
    evaluate,
    iou,
    load_checkpoint,
    predict_whole,
    save_checkpoint,
    train,
    weighted_cross_entropy,
)
from .weights import border_weights, class_weights, separate

__all__ = [
    "Augmentation",
    "Progress",
    "Recipe",
    "Sample",
    "TrainingError",
    "border_weights",
    "class_weights",
    "evaluate",
    "iou",
    "load_checkpoint",
    "normalized",
    "predict_whole",
    "prepare",
    "save_checkpoint",
    "separate",
    "split_by_blocks",
    "train",
    "weighted_cross_entropy",
]
