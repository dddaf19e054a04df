"""What a network is trained on: normalised images with targets and weights, cut into tiles with mirrored borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unet_rt.contract import Contract, Normalization
from unet_rt.errors import ImageError
from unet_rt.image import open_image
from unet_rt.normalize import affine, normalised

from .weights import F32, Labels, border_weights, separate


@dataclass(frozen=True)
class Sample:
    """One image, ready to be cut.

    Attributes:
        name: For messages and records.
        image: (C, Y, X) float32, normalised over the whole image.
        target: (Y, X) uint8 class of every pixel; touching objects are separated by background.
        weight: (Y, X) float32 border term of the weight map (the class term is added by the trainer).
        truth: (Y, X) bool foreground as annotated, without the separating lines: what IoU is measured against.
    """

    name: str
    image: F32
    target: npt.NDArray[np.uint8]
    weight: F32
    truth: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a tile; each costs less than a tenth of a training step.

    Attributes:
        flip: Mirror left and right, half of the time.
        turn: Quarter turns.
        gain: Contrast is multiplied by ``exp(N(0, gain))``.
        offset: Added grey value, deviation in normalised units.
        noise: Largest deviation of added pixel noise, normalised units.
    """

    flip: bool = True
    turn: bool = True
    gain: float = 0.2
    offset: float = 0.03
    noise: float = 0.03


def normalized(image: npt.NDArray[Any], normalization: Normalization, name: str = "image") -> F32:
    """(C, Y, X) raw pixels in memory -> float32 as the network wants them, by statistics of the whole image.

    The numbers and the arithmetic are the image line's, so that a network sees in training what it will see in use.
    """
    with open_image(image, Contract(), axes="CYX", spatial=2, network_channels=image.shape[0], name=name) as source:
        numbers = affine(normalization, source).plane(0)
    return normalised(image, numbers)


def prepare(
    name: str,
    image: npt.NDArray[Any],
    labels: Labels,
    normalization: Normalization,
    *,
    w0: float = 10.0,
    sigma_px: float = 5.0,
) -> Sample:
    """Sample of an image (Y, X) or (C, Y, X) and its instance ids (Y, X)."""
    planes = image[None] if image.ndim == 2 else image
    if planes.ndim != 3 or labels.shape != planes.shape[1:]:
        raise ImageError(f"{name}: image {image.shape} and mask {labels.shape} do not match; give (C, Y, X) and (Y, X)")
    pixels = normalized(planes, normalization, name)
    target = separate(labels)
    weight = border_weights(labels * target, w0=w0, sigma_px=sigma_px)
    return Sample(name, pixels, target.astype(np.uint8), weight, labels > 0)


def split_by_blocks(samples: Sequence[Sample], share: float = 0.2) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): the last ``share`` in one block, since neighbours in a stack look alike.

    Fewer than five images are each cut in two, the lower rows for validation.
    """
    if not samples:
        raise ImageError("no images to train on; give at least one with its mask")
    if len(samples) >= 5:
        held = max(1, round(share * len(samples)))
        return list(samples[:-held]), list(samples[-held:])
    cuts = [max(1, min(round((1 - share) * s.target.shape[0]), s.target.shape[0] - 1)) for s in samples]
    return (
        [_rows(s, 0, cut, "top") for s, cut in zip(samples, cuts, strict=True)],
        [_rows(s, cut, s.target.shape[0], "bottom") for s, cut in zip(samples, cuts, strict=True)],
    )


def _rows(s: Sample, start: int, stop: int, part: str) -> Sample:
    rows = slice(start, stop)
    return Sample(f"{s.name} ({part})", s.image[:, rows], s.target[rows], s.weight[rows], s.truth[rows])


def padded(image: F32, low: int, high: Sequence[int]) -> F32:
    """(C, Y, X) with ``low`` mirrored pixels before and ``high`` after, repeatedly if the image is small."""
    return np.pad(image, ((0, 0), *((low, h) for h in high)), mode="reflect")


class Tiles:
    """An endless seeded stream of training tiles.

    Args:
        samples: What to cut; an image is drawn with a chance proportional to the square root of its area.
        tile_px: Input size of a tile.
        out_px: Output size of the network for it; the rest is margin, mirrored at the image's borders.
    """

    def __init__(
        self, samples: Sequence[Sample], tile_px: int, out_px: int, augmentation: Augmentation, rng: np.random.Generator
    ) -> None:
        if not samples:
            raise ImageError("no images to train on; give at least one with its mask")
        self.rng, self.augmentation, self.tile_px, self.out_px = rng, augmentation, tile_px, out_px
        margin = (tile_px - out_px) // 2
        self._samples = []
        for s in samples:
            grow = [max(0, out_px - n) for n in s.target.shape]
            flat = (padded(a[None], 0, grow)[0] for a in (s.target.astype(np.float32), s.weight))
            target, weight = flat
            self._samples.append((padded(s.image, margin, [margin + g for g in grow]), target.astype(np.int64), weight))
        area = np.sqrt([t.size for _, t, _ in self._samples])
        self._chance = area / area.sum()

    def draw(self, count: int) -> tuple[F32, npt.NDArray[np.int64], F32]:
        """Images (count, C, tile, tile), targets and border weights (count, out, out)."""
        tiles = [self._one() for _ in range(count)]
        images, targets, weights = (np.stack(column) for column in zip(*tiles, strict=True))
        return images, targets, weights

    def _one(self) -> tuple[F32, npt.NDArray[np.int64], F32]:
        rng, how = self.rng, self.augmentation
        image, target, weight = self._samples[int(rng.choice(len(self._samples), p=self._chance))]
        y, x = (int(rng.integers(n - self.out_px + 1)) for n in target.shape)
        cut = (slice(y, y + self.out_px), slice(x, x + self.out_px))
        image = image[:, y : y + self.tile_px, x : x + self.tile_px]
        target, weight = target[cut], weight[cut]
        if how.turn and (quarter := int(rng.integers(4))):
            image = np.rot90(image, quarter, (1, 2))
            target, weight = np.rot90(target, quarter), np.rot90(weight, quarter)
        if how.flip and rng.random() < 0.5:
            image, target, weight = image[..., ::-1], target[:, ::-1], weight[:, ::-1]
        gain = np.float32(np.exp(rng.normal(0, how.gain)))
        image = gain * image + np.float32(rng.normal(0, how.offset))
        if how.noise:
            image += np.float32(rng.uniform(0, how.noise)) * rng.standard_normal(image.shape, np.float32)
        return image, target, weight
