"""How good a network in training is: whole images predicted, and the IoU of what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..models.architecture import Network
from .metrics import iou
from .samples import Sample, pad_mirrored
from .weights import F32

WHOLE_PX = 1536  # larger images are predicted by windows of this size: activations of a whole slide fit nowhere


MARGIN_PX = 128  # of those windows


def predict_whole(network: Network, image: F32) -> F32:
    """Logits (K, Y, X) of a normalised image (C, Y, X), computed with mirrored borders on the network's device.

    At once up to 1536 px a side; larger images by windows with a margin, which is near enough for validation.
    """
    shape = image.shape[1:]
    if max(shape) <= WHOLE_PX:
        return _predict_window(network, image)
    step = WHOLE_PX - 2 * MARGIN_PX
    logits = np.empty((network.spec.classes, *shape), np.float32)
    for y in range(0, shape[0], step):
        for x in range(0, shape[1], step):
            top, left = max(0, y - MARGIN_PX), max(0, x - MARGIN_PX)
            window = image[:, top : y + step + MARGIN_PX, left : x + step + MARGIN_PX]
            part = _predict_window(network, window)[:, y - top : y - top + step, x - left : x - left + step]
            logits[:, y : y + step, x : x + step] = part
    return logits


def _predict_window(network: Network, image: F32) -> F32:
    spec = network.spec
    shape = image.shape[1:]
    size = spec.size_at_least(1)
    margin = (size - spec.out_size(size)) // 2
    wanted = [spec.size_at_least(n + 2 * margin) for n in shape]
    grown = pad_mirrored(image, margin, [w - n - margin for w, n in zip(wanted, shape, strict=True)])
    place = next(network.parameters()).device
    with torch.no_grad():
        logits: F32 = network(torch.from_numpy(grown[None]).to(place))[0].float().cpu().numpy()
    return logits[:, : shape[0], : shape[1]]


def evaluate(
    network: Network,
    samples: Sequence[Sample],
    *,
    against: Literal["target", "truth"] = "target",
    background: bool = False,
) -> list[float]:
    """IoU of every sample: of the foreground, or the mean over classes; ``background`` counts as one if asked for.

    ``target`` has background lines between touching objects, as the network was asked to draw them; ``truth`` is what
    was annotated, where each such line counts as an error.
    """
    was_training = network.training
    network.eval()
    found = [
        class_iou(predict_whole(network, s.image).argmax(0), getattr(s, against), background=background)
        for s in samples
    ]
    network.train(was_training)
    return found


def foreground_is_common(samples: Sequence[Sample]) -> bool:
    """Whether most pixels are foreground: then "foreground everywhere" has a high IoU, so that background counts too."""
    return sum(int((s.target > 0).sum()) for s in samples) > sum(s.target.size for s in samples) / 2


def class_iou(labels: npt.NDArray[Any], truth: npt.NDArray[Any], *, background: bool = False) -> float:
    """Mean IoU over the classes that occur in either, without 0 unless ``background``; 1 where none does."""
    present = sorted({*np.unique(labels).tolist(), *np.unique(truth).tolist()} - (set() if background else {0}))
    return float(np.mean([iou(labels == k, truth == k) for k in present])) if present else 1.0
