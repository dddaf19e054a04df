"""Training of the reference networks (PyTorch; ``pip install unet-rt[train]``)."""

from __future__ import annotations

from ..models.checkpoint import TrainingError, load_checkpoint, save_checkpoint
from .augment import Augmentation, Tiles
from .components import components
from .evaluate import class_iou, evaluate, predict_whole
from .metrics import iou
from .samples import MaskKind, Sample, normalized, prepare, sample_of, split_by_blocks
from .trainer import Progress, Recipe, train, weighted_cross_entropy
from .weights import border_weights, class_weights, separate

__all__ = [
    "Augmentation",
    "MaskKind",
    "Progress",
    "Recipe",
    "Sample",
    "Tiles",
    "TrainingError",
    "border_weights",
    "class_iou",
    "class_weights",
    "components",
    "evaluate",
    "iou",
    "load_checkpoint",
    "normalized",
    "predict_whole",
    "prepare",
    "sample_of",
    "save_checkpoint",
    "separate",
    "split_by_blocks",
    "train",
    "weighted_cross_entropy",
]
