"""What a network is trained on: normalised images with targets and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..contract.contract import Contract, Normalization
from ..errors import ImageError
from ..images.normalize import affine, normalize_pixels
from ..images.open import open_image
from ..images.reading import Reading
from .components import components
from .weights import F32, Labels, border_weights, separate

# What the numbers of a mask mean: 0 against everything else; one id per object; one number per class.
MaskKind = Literal["binary", "instances", "classes"]


@dataclass(frozen=True)
class Sample:
    """One image, ready to be cut.

    Attributes:
        name: For messages and records.
        image: (C, Y, X) float32, normalised over the whole image.
        target: (Y, X) uint8 class of every pixel; touching objects are separated by background.
        weight: (Y, X) float32 border term of the weight map (the class term is added by the trainer).
        truth: (Y, X) uint8 class as annotated, without the separating lines: what figures are measured against.
    """

    name: str
    image: F32
    target: npt.NDArray[np.uint8]
    weight: F32
    truth: npt.NDArray[np.uint8]


def normalized(image: npt.NDArray[Any], normalization: Normalization, name: str = "image") -> F32:
    """(C, Y, X) raw pixels in memory -> float32 as the network wants them, by statistics of the whole image.

    The numbers and the arithmetic are the image line's, so that a network sees in training what it will see in use.
    """
    with open_image(image, Contract(), Reading("CYX"), spatial=2, network_channels=image.shape[0], name=name) as source:
        numbers = affine(normalization, source).plane(0)
    return normalize_pixels(image, numbers)


def prepare(
    name: str,
    image: npt.NDArray[Any],
    labels: Labels,
    normalization: Normalization,
    *,
    masks: MaskKind = "instances",
    w0: float = 10.0,
    sigma_px: float = 5.0,
) -> Sample:
    """Sample of an image (Y, X) or (C, Y, X) and its mask (Y, X)."""
    planes = image[None] if image.ndim == 2 else image
    if planes.ndim != 3 or labels.shape != planes.shape[1:]:
        raise ImageError(f"{name}: image {image.shape} and mask {labels.shape} do not match; give (C, Y, X) and (Y, X)")
    return sample_of(name, normalized(planes, normalization, name), labels, masks=masks, w0=w0, sigma_px=sigma_px)


def sample_of(
    name: str, pixels: F32, labels: Labels, *, masks: MaskKind = "instances", w0: float = 10.0, sigma_px: float = 5.0
) -> Sample:
    """Sample of normalised pixels (C, Y, X) and a mask (Y, X) of ``masks`` kind.

    Instance ids become background and foreground, with background between touching objects. The border weights of a
    binary mask are those of its connected parts; masks of classes have them around the parts of any class but 0.
    """
    if masks == "instances":
        target = separate(labels)
        weight = border_weights(labels * target, w0=w0, sigma_px=sigma_px)
        return Sample(name, pixels, target.astype(np.uint8), weight, (labels > 0).astype(np.uint8))
    classes = (labels > 0).astype(np.uint8) if masks == "binary" else labels.astype(np.uint8)
    flat = np.zeros(labels.shape, np.float32)
    weight = border_weights(components(classes > 0), w0=w0, sigma_px=sigma_px) if w0 else flat
    return Sample(name, pixels, classes, weight, classes)


def split_by_blocks(samples: Sequence[Sample], share: float = 0.2) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): ``share`` of the images in one block, since neighbours in a stack look alike.

    Fewer than five images are each cut in two, the lower rows for validation. Where a part would miss a class, the last
    block that leaves none missing validates, or the upper rows: by images without foreground the network that finds
    nothing would be the best one.
    """
    if not samples:
        raise ImageError("no images to train on; give at least one with its mask")
    if len(samples) < 5:
        cuts = [_cut_in_two(samples, share, upper_validates=upper) for upper in (False, True)]
        return next((cut for cut in cuts if _serves(*([_classes(s) for s in part] for part in cut))), cuts[0])
    held = max(1, round(share * len(samples)))
    present = [_classes(s) for s in samples]
    firsts = range(len(samples) - held, -1, -1)
    first = next((k for k in firsts if _serves(present[:k] + present[k + held :], present[k : k + held])), firsts[0])
    return [*samples[:first], *samples[first + held :]], list(samples[first : first + held])


def _cut_in_two(samples: Sequence[Sample], share: float, *, upper_validates: bool) -> tuple[list[Sample], list[Sample]]:
    training, validation = list[Sample](), list[Sample]()
    for s in samples:
        height = s.target.shape[0]
        kept = max(1, min(round((1 - share) * height), height - 1))
        cut = height - kept if upper_validates else kept
        above, below = _rows(s, 0, cut, "top"), _rows(s, cut, height, "bottom")
        training.append(below if upper_validates else above)
        validation.append(above if upper_validates else below)
    return training, validation


def _classes(s: Sample) -> set[int]:
    return set(np.unique(s.target).tolist())


def _serves(training: Sequence[set[int]], validation: Sequence[set[int]]) -> bool:
    """Whether both parts hold every class of either."""
    return set().union(*training) == set().union(*validation)


def _rows(s: Sample, start: int, stop: int, part: str) -> Sample:
    rows = slice(start, stop)
    return Sample(f"{s.name} ({part})", s.image[:, rows], s.target[rows], s.weight[rows], s.truth[rows])


def pad_mirrored(image: F32, low: int, high: Sequence[int]) -> F32:
    """(C, Y, X) with ``low`` mirrored pixels before and ``high`` after, repeatedly if the image is small."""
    return np.pad(image, ((0, 0), *((low, h) for h in high)), mode="reflect")
