"""Fluorescence microscopy that never was: nuclei with their truth, drawn from a seed.

Nuclei of varied shape, size, brightness and texture, many of them touching; uneven light, background, out-of-focus
haze, blur by the optics, shot noise and read noise, rare bright debris. For demos, tests and training; not a physical
model of a microscope, and a figure measured on it is a figure on it alone.

The scene lies on a fixed lattice of blocks of 512 px, each with a random stream of its own (seed, row, column), so any
window of an image of any size is drawn by itself and equals that part of the whole image, noise included. Pixels are
the same on every machine with the same version of NumPy up to rounding in its transcendental functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ImageError
from .filters import F32, blur, gaussian_kernel, smooth_noise
from .scene import Scene

Pixels = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

BLOCK_PX = 512
ROAM_PX = 96  # how far a cluster that begins in a block may grow beyond it; far less than a block
COARSE_PX = 8  # spacing of the lattice on which haze is summed
EDGE_BLOCKS = 8  # more than the blocks outside the image (1), so that the key of a random stream is not negative
IDS_PER_BLOCK = 4096  # ids of nuclei are block number x 4096 + k: unique in every window, not consecutive
CAMERA_OFFSET = 100.0  # grey levels of a dark pixel of a 16-bit camera
CAMERA_GAIN = 2.0  # grey levels per electron


@dataclass(frozen=True)
class Micrograph:
    """A drawn image.

    Attributes:
        image: (Y, X) uint16 or uint8 grey levels.
        truth: (Y, X) int32 ids of nuclei, 0 for background. An id names the same nucleus in every window.
        scene: What was drawn.
    """

    image: Pixels
    truth: npt.NDArray[np.int32]
    scene: Scene


def microscopy(
    shape: Sequence[int],
    *,
    seed: int = 0,
    scene: Scene | None = None,
    window: tuple[Sequence[int], Sequence[int]] | None = None,
    dtype: npt.DTypeLike = np.uint16,
) -> Micrograph:
    """Draw nuclei.

    Args:
        shape: (Y, X) of the image in pixels.
        seed: Everything random comes from it.
        scene: What to draw; the default is :class:`Scene`'s. See :func:`random_scene` for variety.
        window: (start, stop), each (Y, X): draw this part of the image only. Equal to that part of the whole.
        dtype: uint16 (a camera's grey levels, offset 100) or uint8 (as such images are often stored: bright
            nuclei near 200).

    Raises:
        ImageError: a shape, window or dtype that cannot be drawn.
    """
    size = tuple(int(n) for n in shape)
    if len(size) != 2 or min(size) < 1:
        raise ImageError(f"shape {tuple(shape)} cannot be drawn; use (height, width) of at least 1 px")
    if np.dtype(dtype) not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ImageError(f"microscopy is drawn as uint8 or uint16, not {np.dtype(dtype)}")
    start, stop = ((0, 0), size) if window is None else (tuple(map(int, w)) for w in window)
    if any(not 0 <= a < b <= n for a, b, n in zip(start, stop, size, strict=True)):
        raise ImageError(f"window {start} to {stop} is empty or leaves the image of {size[0]}x{size[1]} px")
    scene = scene or Scene()
    world = _World(seed, scene, size)
    image: Pixels = np.empty((stop[0] - start[0], stop[1] - start[1]), dtype)
    truth = np.empty(image.shape, np.int32)
    for row in range(start[0] // BLOCK_PX, -(-stop[0] // BLOCK_PX)):
        for column in range(start[1] // BLOCK_PX, -(-stop[1] // BLOCK_PX)):
            electrons, ids = world.block(row, column)
            levels = _grey_levels(electrons, scene, np.dtype(dtype))
            corner = (row * BLOCK_PX, column * BLOCK_PX)
            low = [max(a, c) for a, c in zip(start, corner, strict=True)]
            high = [min(b, c + BLOCK_PX) for b, c in zip(stop, corner, strict=True)]
            here = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, corner, strict=True))
            there = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            image[there], truth[there] = levels[here], ids[here]
    return Micrograph(image, truth, scene)


@dataclass(frozen=True)
class _Nuclei:
    """Objects that begin in one block, as columns. Positions are image pixels."""

    y: npt.NDArray[np.float64]
    x: npt.NDArray[np.float64]
    radius: npt.NDArray[np.float64]
    stretch: npt.NDArray[np.float64]  # square root of long over short axis
    angle: npt.NDArray[np.float64]
    wobble: npt.NDArray[np.complex64]  # (n, 3): Fourier modes 2, 3 and 4 of the outline, relative to the radius
    brightness: npt.NDArray[np.float64]
    texture_at: npt.NDArray[np.int64]  # (n, 2)

    def extent(self, k: int) -> float:
        """No pixel of nucleus ``k`` is farther from its centre."""
        return float(self.radius[k] * self.stretch[k] * (1 + np.abs(self.wobble[k]).sum()) + 1.0)


_NONE = np.empty(0)
_NOTHING = _Nuclei(
    y=_NONE,
    x=_NONE,
    radius=_NONE,
    stretch=_NONE,
    angle=_NONE,
    wobble=np.empty((0, 3), np.complex64),
    brightness=_NONE,
    texture_at=np.empty((0, 2), np.int64),
)


class _World:
    """Everything that blocks share; nuclei of a block are computed once."""

    def __init__(self, seed: int, scene: Scene, size: tuple[int, ...]) -> None:
        if seed < 0:
            raise ImageError(f"seed {seed} is negative; use 0 or more")
        self.seed, self.scene, self.size = seed, scene, size
        self.rows, self.columns = -(-size[0] // BLOCK_PX), -(-size[1] // BLOCK_PX)
        self._nuclei: dict[tuple[int, int], _Nuclei] = {}
        self._texture = _texture(np.random.default_rng((seed, 1)))
        self._kernel = gaussian_kernel(scene.blur_px)
        rng = np.random.default_rng((seed, 2))
        # Light: a bright spot somewhere near the middle, and a slow ripple.
        self._light_at = rng.uniform(0.3, 0.7, 2)
        self._ripple = rng.uniform(0, 2 * np.pi, 2)

    def block(self, row: int, column: int) -> tuple[F32, npt.NDArray[np.int32]]:
        """Electrons with noise, and ids, both (512, 512)."""
        scene = self.scene
        margin = len(self._kernel) // 2
        side = BLOCK_PX + 2 * margin
        corner = (row * BLOCK_PX - margin, column * BLOCK_PX - margin)
        light: F32 = np.zeros((side, side), np.float32)
        depth = np.zeros((side, side), np.float32)
        ids = np.zeros((side, side), np.int32)
        coarse_side = BLOCK_PX // COARSE_PX + 1
        haze = np.zeros((coarse_side, coarse_side), np.float32)
        for r in (row - 1, row, row + 1):
            for c in (column - 1, column, column + 1):
                nuclei = self.nuclei(r, c)
                # Blocks left of and above the image exist too; their ids stay positive and unique.
                first = ((r + 1) * (self.columns + 2) + c + 1) * IDS_PER_BLOCK + 1
                for k in range(len(nuclei.y)):
                    self._draw(nuclei, k, first + k, corner, light, depth, ids)
                if scene.haze:
                    _add_haze(nuclei, (row * BLOCK_PX, column * BLOCK_PX), haze)
        self._draw_debris(row, column, corner, light)
        light = blur(light, self._kernel)
        if scene.haze:
            up = _interpolation()
            light *= np.float32(1 - scene.haze)
            light += np.float32(scene.haze) * (up @ haze @ up.T)
        inner = slice(margin, margin + BLOCK_PX)
        electrons = (scene.signal_e * light + scene.background_e) * self._illumination(row, column)
        rng = np.random.default_rng((self.seed, 3, row, column))
        noisy = rng.poisson(electrons).astype(np.float32)
        noisy += np.float32(scene.read_e) * rng.standard_normal(noisy.shape, np.float32)
        return noisy, ids[inner, inner]

    def nuclei(self, row: int, column: int) -> _Nuclei:
        """Nuclei that begin in a block: clusters grown by putting each next one against one that is there.

        Blocks yield to neighbours of a lower colour (row and column, each odd or even), so that nuclei of different
        blocks do not lie upon each other whichever window is drawn first.
        """
        key = (row, column)
        if key in self._nuclei:
            return self._nuclei[key]
        scene = self.scene
        # The world ends one block beyond the image: what begins farther away cannot be seen in it.
        if not (-1 <= row <= self.rows and -1 <= column <= self.columns):
            return _NOTHING
        around = [(row + dr, column + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1) if dr or dc]
        near = [self.nuclei(r, c) for r, c in around if _colour(r, c) < _colour(row, column)]
        taken_y = np.concatenate([n.y for n in near] + [np.empty(0)])
        taken_x = np.concatenate([n.x for n in near] + [np.empty(0)])
        taken_r = np.concatenate([n.radius for n in near] + [np.empty(0)])

        rng = np.random.default_rng((self.seed, 4, row + EDGE_BLOCKS, column + EDGE_BLOCKS))
        mean_area = np.pi * scene.radius_px**2 * np.exp(2 * scene.radius_spread**2)
        wanted = min(int(rng.poisson(scene.cover * BLOCK_PX**2 / mean_area)), IDS_PER_BLOCK)
        capacity = len(taken_y) + wanted
        ys, xs, rs = (np.empty(capacity) for _ in range(3))
        placed = len(taken_y)
        ys[:placed], xs[:placed], rs[:placed] = taken_y, taken_x, taken_r
        own = placed
        low, roam = (row * BLOCK_PX - ROAM_PX, column * BLOCK_PX - ROAM_PX), BLOCK_PX + 2 * ROAM_PX
        members: list[int] = []
        left_in_cluster = 0
        for _ in range(3 * wanted):
            if placed == capacity:
                break
            radius = scene.radius_px * math.exp(min(max(scene.radius_spread * rng.standard_normal(), -0.8), 0.8))
            if left_in_cluster > 0 and members:
                parent = members[int(rng.integers(len(members)))]
                way, gap = 2 * math.pi * rng.random(), 0.85 + 0.27 * rng.random()
                y = ys[parent] + gap * (rs[parent] + radius) * math.sin(way)
                x = xs[parent] + gap * (rs[parent] + radius) * math.cos(way)
                left_in_cluster -= 1
            else:
                y, x = (row + rng.random()) * BLOCK_PX, (column + rng.random()) * BLOCK_PX
                members, left_in_cluster = [], int(rng.poisson(scene.cluster - 1))
            if not (low[0] <= y < low[0] + roam and low[1] <= x < low[1] + roam):
                continue
            room = (ys[:placed] - y) ** 2 + (xs[:placed] - x) ** 2 - (0.82 * (rs[:placed] + radius)) ** 2
            if placed and room.min() < 0:
                continue
            ys[placed], xs[placed], rs[placed] = y, x, radius
            members.append(placed)
            placed += 1
        found = self._shaped(rng, ys[own:placed].copy(), xs[own:placed].copy(), rs[own:placed])
        self._nuclei[key] = found
        return found

    def _shaped(self, rng: np.random.Generator, y: Floats, x: Floats, radius: Floats) -> _Nuclei:
        """Nuclei of these places and radii, with outlines, brightness and texture drawn at random."""
        scene, n = self.scene, len(y)
        amplitude = np.array([0.05, 0.05, 0.03]) * rng.gamma(2.0, 0.5, (n, 3)).clip(0, 3)
        phase = rng.uniform(0, 2 * np.pi, (n, 3))
        brightness = np.exp(rng.normal(0, scene.signal_spread, n)).clip(0.35, 4.0)
        # A few divide: small, round, bright.
        dividing = rng.random(n) < 0.02
        stretch = np.sqrt(np.clip(1 + (scene.elongation - 1) * rng.gamma(3.0, 1 / 3, n), 1.0, 2.5))
        return _Nuclei(
            y=y,
            x=x,
            radius=radius * np.where(dividing, 0.75, 1.0),
            stretch=stretch,
            angle=rng.uniform(0, np.pi, n),
            wobble=(amplitude * np.exp(1j * phase)).astype(np.complex64),
            brightness=brightness * np.where(dividing, 1.8, 1.0),
            texture_at=rng.integers(0, 1 << 30, (n, 2)),
        )

    def _draw(
        self,
        nuclei: _Nuclei,
        k: int,
        number: int,
        corner: tuple[int, int],
        light: F32,
        depth: F32,
        ids: npt.NDArray[np.int32],
    ) -> None:
        """Add nucleus ``k``. A pixel that two nuclei claim goes to the one it lies deeper in."""
        y, x, reach = nuclei.y[k] - corner[0], nuclei.x[k] - corner[1], nuclei.extent(k)
        side = light.shape[0]
        y0, y1 = max(int(np.ceil(y - reach)), 0), min(int(y + reach) + 1, side)
        x0, x1 = max(int(np.ceil(x - reach)), 0), min(int(x + reach) + 1, side)
        if y0 >= y1 or x0 >= x1:
            return
        # z: the pixel in the nucleus's own frame, where its mean outline is the unit circle.
        rows = np.arange(y0, y1, dtype=np.float32) - np.float32(y)
        columns = np.arange(x0, x1, dtype=np.float32) - np.float32(x)
        cos, sin = np.float32(np.cos(nuclei.angle[k])), np.float32(np.sin(nuclei.angle[k]))
        radius, stretch = np.float32(nuclei.radius[k]), np.float32(nuclei.stretch[k])
        z = np.empty((y1 - y0, x1 - x0), np.complex64)
        z.real = (cos * columns[None, :] + sin * rows[:, None]) / (radius * stretch)
        z.imag = (cos * rows[:, None] - sin * columns[None, :]) * (stretch / radius)
        rho = np.abs(z)
        unit = z / np.maximum(rho, np.float32(1e-6))
        a, b, c = nuclei.wobble[k]
        outline = 1 + (unit * unit * (a + unit * (b + unit * c))).real
        inside = 1 - rho / outline  # 1 in the centre, 0 on the outline
        box = (slice(y0, y1), slice(x0, x1))
        claim = inside > depth[box]
        depth[box][claim] = inside[claim]
        ids[box][claim] = number
        texture = self._texture_window(nuclei, k, y0 + corner[0], x0 + corner[1], z.shape)
        edge = np.clip(inside * radius + np.float32(0.5), 0, 1)  # half-covered pixels get half the light
        thickness = np.sqrt(np.clip(inside * (2 - inside), 0.0, 1.0)) * np.float32(0.45) + np.float32(0.55)
        light[box] += np.float32(nuclei.brightness[k]) * edge * thickness * texture

    def _texture_window(self, nuclei: _Nuclei, k: int, y: int, x: int, shape: tuple[int, ...]) -> F32:
        """Chromatin moves with its nucleus: each takes its own place in one periodic texture."""
        period = self._texture.shape[0] // 2
        y = (y + int(nuclei.texture_at[k, 0])) % period
        x = (x + int(nuclei.texture_at[k, 1])) % period
        grain = self._texture[y : y + shape[0], x : x + shape[1]]
        out: F32 = np.float32(1) + np.float32(self.scene.texture) * grain
        return out

    def _draw_debris(self, row: int, column: int, corner: tuple[int, int], light: F32) -> None:
        """Bright specks, a few px wide, up to 30 times as bright as a nucleus; some are short fibres."""
        side = light.shape[0]
        for r in (row - 1, row, row + 1):
            for c in (column - 1, column, column + 1):
                rng = np.random.default_rng((self.seed, 5, r + EDGE_BLOCKS, c + EDGE_BLOCKS))
                for _ in range(int(rng.poisson(self.scene.debris_per_mpx * BLOCK_PX**2 / 1e6))):
                    y, x = (np.array([r, c]) + rng.random(2)) * BLOCK_PX - np.array(corner)
                    size, bright, way = rng.uniform(0.6, 2.2), np.exp(rng.uniform(0.7, 3.4)), rng.uniform(0, np.pi)
                    length = size * (rng.uniform(3, 8) if rng.random() < 0.25 else 1.0)
                    reach = 3 * length + 1
                    y0, y1 = max(int(y - reach), 0), min(int(y + reach) + 1, side)
                    x0, x1 = max(int(x - reach), 0), min(int(x + reach) + 1, side)
                    if y0 >= y1 or x0 >= x1:
                        continue
                    dy = (np.arange(y0, y1) - y)[:, None]
                    dx = (np.arange(x0, x1) - x)[None, :]
                    along = (np.cos(way) * dx + np.sin(way) * dy) / length
                    across = (np.cos(way) * dy - np.sin(way) * dx) / size
                    light[y0:y1, x0:x1] += (bright * np.exp(-0.5 * (along**2 + across**2))).astype(np.float32)

    def _illumination(self, row: int, column: int) -> F32:
        """(512, 512) of 1 - shading .. 1, slow over the whole image."""
        longest = max(self.size)
        y = (row * BLOCK_PX + np.arange(BLOCK_PX)) / longest
        x = (column * BLOCK_PX + np.arange(BLOCK_PX)) / longest
        center = self._light_at * np.array(self.size) / longest
        fall = ((y - center[0]) ** 2)[:, None] + ((x - center[1]) ** 2)[None, :]
        ripple = np.cos(5 * y + self._ripple[0])[:, None] * np.cos(4 * x + self._ripple[1])[None, :]
        dark = np.clip(1.6 * fall + 0.15 * (1 + ripple), 0, 1)
        out: F32 = (1 - self.scene.shading * dark).astype(np.float32)
        return out


def _colour(row: int, column: int) -> int:
    return 2 * (row % 2) + column % 2


def _texture(rng: np.random.Generator) -> F32:
    """(1024, 1024), period 512: chromatin of two grain sizes, and dark nucleoli; deviation about 1."""
    period = 512
    fine, middle, large = (smooth_noise(rng, (period, period), scale) for scale in (1.2, 3.0, 6.0))
    nucleoli = np.clip(large - 1.2, 0, 0.8) / 0.8
    texture = 0.6 * fine + 0.8 * middle - 1.5 * nucleoli
    return np.tile(np.clip(texture, -2.5, 2.5).astype(np.float32), (2, 2))


def _add_haze(nuclei: _Nuclei, corner: tuple[int, int], haze: F32) -> None:
    """Each nucleus as a wide Gaussian of the same total light, on the coarse lattice of a block."""
    side = haze.shape[0]
    sigma = 3.0 * COARSE_PX  # px; three lattice steps, so that linear interpolation is smooth
    y = (nuclei.y - corner[0])[:, None] - COARSE_PX * np.arange(side)[None, :]
    x = (nuclei.x - corner[1])[:, None] - COARSE_PX * np.arange(side)[None, :]
    weight = nuclei.brightness * nuclei.radius**2 / (2 * sigma**2)
    gy = (weight[:, None] * np.exp(-0.5 * (y / sigma) ** 2)).astype(np.float32)
    gx = np.exp(-0.5 * (x / sigma) ** 2).astype(np.float32)
    haze += gy.T @ gx


def _interpolation() -> F32:
    """(512, 65): linear interpolation from the coarse lattice to pixels."""
    at = np.arange(BLOCK_PX) / COARSE_PX
    below = at.astype(np.int64)
    matrix = np.zeros((BLOCK_PX, BLOCK_PX // COARSE_PX + 1), np.float32)
    matrix[np.arange(BLOCK_PX), below] = 1 - (at - below)
    matrix[np.arange(BLOCK_PX), below + 1] = at - below
    return matrix


def _grey_levels(electrons: F32, scene: Scene, dtype: np.dtype[Any]) -> Pixels:
    levels: Pixels
    if dtype == np.uint16:
        levels = np.clip(np.rint(CAMERA_OFFSET + CAMERA_GAIN * electrons), 0, 65535).astype(np.uint16)
        return levels
    # As exported for viewing: black a little below the background, bright nuclei near 200.
    white = 200 / (2.5 * scene.signal_e + scene.background_e)
    levels = np.clip(np.rint(3 + white * electrons), 0, 255).astype(np.uint8)
    return levels
