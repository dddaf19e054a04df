"""Agreement of masks with labels that a person drew: IoU per class, for engine and baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..baseline.samples import SampleWindow, sample_images
from ..contract.contract import Contract
from ..engine import parity as parity_module
from ..engine.budget import Budget
from ..errors import ImageError, size_text

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Truth:
    """Agreement with labels: Dice and IoU of the foreground (or mean over classes), for engine and baseline.

    Attributes:
        engine_dice, engine_iou, baseline_dice, baseline_iou: Mean over images.
        drop: How far Dice or IoU of a class falls below the baseline's, where it falls farthest; of classes of at least
            the budget's ``class_px`` pixels in an image's labels.
        image: The image, and the class, where it does.
        head: The output that the labels belong to, where there are several, else "".
    """

    engine_dice: float
    engine_iou: float
    baseline_dice: float
    baseline_iou: float
    drop: float = 0.0
    image: str = ""
    head: str = ""


def compare_to_labels(
    sample: SampleWindow, labels: Any, wanted: Array, got: Array, contract: Contract, budget: Budget
) -> Truth:
    """Agreement of one window with its labels, for engine and baseline.

    Args:
        sample: The window.
        labels: Files, folders or paths; the one of the image's name is taken.
        wanted, got: The baseline's and the engine's values (K, *spatial) of the output that the labels belong to.
        contract: Of that output.
        budget: Says from which size on a class counts.

    Raises:
        ImageError: The output has no labels, or those that were given do not fit the window.
    """
    if not contract.has_labels:
        what = "is a regression" if contract.task == "regression" else "has no task"
        raise ImageError(
            f"labels are for segmentation, and the output {what}; pass --head NAME for another output, or leave --labels out"
        )
    channels = len(wanted)
    several = contract.task == "multilabel"
    truth = _label_of(sample, labels, channels if several else 1)
    if truth.shape[1:] != sample.plane_shape:
        raise ImageError(
            f"{sample.name}: the label is {size_text(truth.shape[1:])} px and the image {size_text(sample.plane_shape)}; "
            "they must be of one size"
        )
    truth = truth[:, *(slice(a, a + n) for a, n in zip(sample.start, sample.shape, strict=True))]
    if truth.shape[1:] != wanted.shape[1:]:
        raise ImageError(
            f"{sample.name}: labels are compared pixel by pixel, and the result of {size_text(truth.shape[1:])} px is "
            f"{size_text(wanted.shape[1:])}; pass --head NAME for an output of the image's size, or leave --labels out"
        )
    if not several and (contract.task == "binary" or channels == 2):
        truth = truth > 0
    elif not several and (strange := np.setdiff1d(truth, np.arange(channels))).size:
        raise ImageError(
            f"{sample.name}: the label holds {', '.join(f'{v:g}' for v in strange[:5])}, and the classes are 0 to "
            f"{channels - 1}; give labels of class numbers"
        )
    references = truth > 0 if several else [truth[0] == c for c in range(1, max(channels, 2))]
    first = 1 if contract.task == "multiclass" else 0  # the first class of several is the background
    engine, baseline = (
        parity_module.class_masks(parity_module.labels(raw, contract), contract, channels)[first:]
        for raw in (got, wanted)
    )
    scores, drops = [], [(0.0, "")]
    for (name, ours), (_, theirs), reference in zip(engine, baseline, references, strict=True):
        one = [f(mask, reference) for mask in (ours, theirs) for f in (parity_module.dice, _iou)]
        scores.append(one)
        if np.count_nonzero(reference) >= budget.class_px:
            drops.append((max(one[2] - one[0], one[3] - one[1]), f"{sample.name}, class {name}"))
    return _average_scores(scores, *max(drops))


def _average_scores(scores: Sequence[Sequence[float]], drop: float, image: str, head: str = "") -> Truth:
    """Means of rows of (Dice, IoU of the engine, Dice, IoU of the baseline)."""
    means = [float(np.mean(column)) for column in zip(*scores, strict=True)]
    return Truth(means[0], means[1], means[2], means[3], drop, image, head)


def average_truths(truths: Sequence[Truth], head: str) -> Truth:
    """Agreement over several images: means, and the largest drop."""
    worst = max(truths, key=lambda t: t.drop)
    scores = [(t.engine_dice, t.engine_iou, t.baseline_dice, t.baseline_iou) for t in truths]
    return _average_scores(scores, worst.drop, worst.image, head)


def _iou(a: Array, b: Array) -> float:
    union = int(np.count_nonzero(a | b))
    return 1.0 if union == 0 else int(np.count_nonzero(a & b)) / union


def _label_of(sample: SampleWindow, labels: Any, channels: int) -> Array:
    """(channels, *spatial): the label of the image that a sample comes from, whole."""
    from ..images.open import open_image
    from ..images.reading import Reading

    if sample.path is None:
        raise ImageError("labels need images that are files, to be matched by name")
    found = [path for path in map(Path, sample_images(labels)) if path.stem == sample.path.stem]
    if len(found) != 1:
        there = " and ".join(path.name for path in found) if found else "no label"
        raise ImageError(
            f"{there} for {sample.path.name}; labels are matched by file name without suffix, one for each image"
        )
    path = found[0]
    reading = Reading(indices=True)
    with open_image(path, Contract(), reading, spatial=len(sample.shape), network_channels=channels) as source:
        if sample.plane >= source.planes:
            raise ImageError(
                f"{sample.name}: the label {source.reading} has no plane {sample.plane}; "
                "give labels with a plane for each plane of the image"
            )
        stop = tuple(source.shape)
        label: Array = np.array(source.read(sample.plane, (0,) * len(stop), stop))
        return label
