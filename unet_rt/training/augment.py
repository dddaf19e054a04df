"""Tiles for training: windows of the images, deformed, turned, mirrored at the borders, of varied grey values.

A tile is drawn by one look-up: the place of every pixel of the tile in the image is computed (shift, rotation, scale,
flip, elastic deformation), then image, target and weight are read there. All of it runs on the device of training, and
every tile has a random stream of its own (seed, step, number), so that training can stop and go on anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ImageError
from .samples import Sample

NODES = 3  # the paper's coarse grid


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a tile.

    Attributes:
        flip: Mirror left and right, half of the time.
        turn: ``any`` angle, ``quarter`` turns or ``none``.
        scale: Magnification is ``exp(N(0, scale))``.
        elastic_px: Deviation of the random displacements on a coarse grid of 3 x 3 nodes over the tile, in pixels; in
            between they are interpolated bicubically. At most a sixteenth of the tile: more would fold it.
        gain: Contrast is multiplied by ``exp(N(0, gain))``.
        gamma: Grey values between their darkest and brightest are bent by the power ``exp(N(0, gamma))``.
        offset: Added grey value, deviation in normalised units.
        noise: Largest deviation of added pixel noise, normalised units.
    """

    flip: bool = True
    turn: Literal["any", "quarter", "none"] = "any"
    scale: float = 0.1
    elastic_px: float = 10.0
    gain: float = 0.2
    gamma: float = 0.2
    offset: float = 0.05
    noise: float = 0.03

    def __post_init__(self) -> None:
        if self.turn not in ("any", "quarter", "none"):
            raise ValueError(f"turn is {self.turn!r}; use any, quarter or none")
        for name in ("scale", "elastic_px", "gain", "gamma", "offset", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"augmentation {name} is {getattr(self, name)}; use 0 or more")

    @property
    def moves_pixels(self) -> bool:
        """Whether tiles are more than shifted, turned by quarters and flipped: then pixels are interpolated."""
        return self.turn == "any" or self.scale > 0 or self.elastic_px > 0

    @classmethod
    def none(cls) -> Augmentation:
        """Windows of the images as they are."""
        return cls(**{f.name: {"flip": False, "turn": "none"}.get(f.name, 0.0) for f in fields(cls)})  # type: ignore[arg-type] # by name


class Tiles:
    """Seeded training tiles.

    Args:
        samples: What to cut; an image is drawn with a chance proportional to the square root of its area.
        tile_px: Input size of a tile.
        out_px: Output size of the network for it; the rest is margin. Beyond an image's border both are mirrored.
        augmentation: Random changes.
        seed: With step and number, all that a tile depends on.
        device: Where images are kept and tiles are made.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tile_px: int,
        out_px: int,
        augmentation: Augmentation,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if not samples:
            raise ImageError("no images to train on; give at least one with its mask")
        self.seed, self.augmentation, self.tile_px, self.out_px = seed, augmentation, tile_px, out_px
        self.device = torch.device(device)
        self._images = [torch.from_numpy(np.ascontiguousarray(s.image)).to(self.device) for s in samples]
        # Class and weight are read at the same places, so they lie in one array (2, Y, X).
        self._targets = [
            torch.from_numpy(np.stack([s.target.astype(np.float32), s.weight])).to(self.device) for s in samples
        ]
        area = np.sqrt([s.target.size for s in samples])
        self._chance = area / area.sum()
        self._cubic = _cubic(tile_px).to(self.device)
        self._noise = torch.Generator(self.device)

    def draw(self, count: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (count, C, tile, tile) float32, targets (count, out, out) int64 and border weights float32."""
        tiles = [self._one(np.random.default_rng((self.seed, step, k))) for k in range(count)]
        images, both = (torch.stack(column) for column in zip(*tiles, strict=True))
        return images, both[:, 0].long(), both[:, 1].contiguous()

    def _one(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        how = self.augmentation
        chosen = int(rng.choice(len(self._images), p=self._chance))
        image, both = self._images[chosen], self._targets[chosen]
        # Corner of the output window; an image smaller than it lies somewhere inside.
        corner = [int(rng.integers(min(0, n - self.out_px), max(0, n - self.out_px) + 1)) for n in both.shape[1:]]
        if how.moves_pixels:
            image, both = self._deformed(image, both, corner, rng)
        else:
            quarter = int(rng.integers(4)) if how.turn == "quarter" else 0
            mirror = how.flip and rng.random() < 0.5
            image, both = self._window(image, both, corner, quarter, mirror)
        return self._shaded(image, rng), both

    def _window(
        self, image: Tensor, both: Tensor, corner: Sequence[int], quarter: int, mirror: bool
    ) -> tuple[Tensor, Tensor]:
        margin = (self.tile_px - self.out_px) // 2
        y, x = (
            torch.from_numpy(_mirror(np.arange(c - margin, c - margin + self.tile_px), n)).to(self.device)
            for c, n in zip(corner, both.shape[1:], strict=True)
        )
        image = image[:, y[:, None], x]
        y, x = (axis[margin : margin + self.out_px] for axis in (y, x))
        both = both[:, y[:, None], x]
        if mirror:
            image, both = image.flip(-1), both.flip(-1)
        return image.rot90(quarter, (1, 2)), both.rot90(quarter, (1, 2))

    def _deformed(
        self, image: Tensor, both: Tensor, corner: Sequence[int], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        how = self.augmentation
        if how.turn == "any":
            angle = rng.uniform(0, 2 * math.pi)
        else:
            angle = math.pi / 2 * int(rng.integers(4)) if how.turn == "quarter" else 0.0
        size = math.exp(-rng.normal(0, how.scale)) if how.scale else 1.0
        mirror = -1.0 if how.flip and rng.random() < 0.5 else 1.0
        cos, sin = size * math.cos(angle), size * math.sin(angle)
        # Place of tile pixel (v, u), measured from the tile's centre, in the image: (y, x) = centre + A (v, u).
        matrix = np.array([[cos, -sin * mirror], [sin, cos * mirror]])
        centre = np.array([c + (self.out_px - 1) / 2 for c in corner])
        along = torch.arange(self.tile_px, dtype=torch.float32, device=self.device) - (self.tile_px - 1) / 2
        sigma = min(how.elastic_px, self.tile_px / 16)
        coarse = rng.normal(0, sigma, (2, NODES, NODES)).astype(np.float32) if sigma else None
        places = []
        for axis, n in enumerate(both.shape[1:]):
            place = (
                float(centre[axis])
                + float(matrix[axis, 0]) * along[:, None]
                + float(matrix[axis, 1]) * along[None, :]
            )  # fmt: skip
            if coarse is not None:
                nodes = torch.from_numpy(coarse[axis]).to(self.device)
                place = place + self._cubic @ nodes @ self._cubic.T
            # grid_sample counts from -1 (first pixel) to 1 (last one).
            places.append(place * (2.0 / max(n - 1, 1)) - 1.0)
        grid = torch.stack((places[1], places[0]), dim=-1)[None]
        inner = slice((self.tile_px - self.out_px) // 2, (self.tile_px - self.out_px) // 2 + self.out_px)
        pixels = functional.grid_sample(
            image[None], grid, mode="bicubic", padding_mode="reflection", align_corners=True
        )
        classes = functional.grid_sample(
            both[None], grid[:, inner, inner], mode="nearest", padding_mode="reflection", align_corners=True
        )
        return pixels[0], classes[0]

    def _shaded(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        how = self.augmentation
        if how.gamma:
            low, high = image.amin(), image.amax()
            reach = (high - low).clamp_min(1e-6)
            image = ((image - low) / reach) ** math.exp(rng.normal(0, how.gamma)) * reach + low
        if how.gain or how.offset:
            image = math.exp(rng.normal(0, how.gain)) * image + rng.normal(0, how.offset)
        if how.noise:
            self._noise.manual_seed(int(rng.integers(2**62)))
            deviation = rng.uniform(0, how.noise)
            image = image + deviation * torch.randn(image.shape, generator=self._noise, device=self.device)
        return image


def _mirror(index: np.ndarray[Any, np.dtype[np.int64]], size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices beyond an axis of ``size`` pixels, mirrored at its first and last pixel as often as needed."""
    if size == 1:
        return np.zeros_like(index)
    period = 2 * (size - 1)
    folded = index % period
    return np.where(folded < size, folded, period - folded)


def _cubic(size: int) -> Tensor:
    """(size, NODES) weights of bicubic interpolation from nodes at the first, middle and last sample."""
    unit = torch.eye(NODES)[:, None, :, None]  # one node at a time, as an image (NODES, 1, NODES, 1)
    rows = functional.interpolate(unit, size=(size, 1), mode="bicubic", align_corners=True)
    return rows[:, 0, :, 0].T.contiguous()
