"""Electron microscopy that never was: a section through neuropil with its cell membranes, drawn from a seed.

Cells of very different sizes lie side by side, round ones and bundles of elongated ones, each a little darker or lighter
than the next. Between them run dark membranes, thin and thick, faint and strong, in places oblique to the section (wide
and grey) or dense (dark clouds as at synapses). Inside lie what a network must not take for a membrane: mitochondria with
dark rims and cristae, vesicles, reticulum, microtubules, granules. Then uneven light, blur and noise. For demos, tests and
training; grey-level statistics are near those of serial-section transmission electron microscopy at 4 nm per pixel, but
it is not a model of tissue, and a figure measured on it is a figure on it alone.

Cells are what lies nearest to ellipses in space that was warped; distances to a border are exact to first order, so that
no image of distances is ever transformed and membranes are smooth below a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ImageError
from .filters import F32, low_pass, smooth_noise
from .tissue import Tissue

MOST_PX = 4096  # side; noise fields are of the whole image
BLOCK_PX = 32  # cells are told apart by blocks of this size, each with the few ellipses that can reach it
JUNCTION_PX = 2.0  # how far membranes round the corner where three cells meet
LABEL_SHARE = 0.6  # half the label's thickness over the dark line's: annotators draw a little wider than it is dark
MEMBRANE, CELL = 0, 255  # of the truth, as the ISBI 2012 challenge has them


@dataclass(frozen=True)
class Section:
    """A drawn section.

    Attributes:
        image: (Y, X) uint8 grey levels.
        truth: (Y, X) uint8, 0 on membranes and 255 inside cells (organelles included).
        tissue: What was drawn.
    """

    image: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.uint8]
    tissue: Tissue


def membranes(shape: Sequence[int], *, seed: int = 0, tissue: Tissue | None = None) -> Section:
    """Draw a section.

    Args:
        shape: (Y, X) in pixels, up to 4096 a side.
        seed: Everything random comes from it.
        tissue: What to draw; the default is :class:`Tissue`'s. See :func:`random_tissue` for variety.

    Raises:
        ImageError: a shape or seed that cannot be drawn.
    """
    size = tuple(int(n) for n in shape)
    if len(size) != 2 or not 1 <= min(size) <= max(size) <= MOST_PX:
        raise ImageError(f"shape {tuple(shape)} cannot be drawn; use (height, width) of 1 to {MOST_PX} px")
    if seed < 0:
        raise ImageError(f"seed {seed} is negative; use 0 or more")
    tissue = tissue or Tissue()
    # Fields are periodic: drawn a little larger, so that opposite edges of the image do not match, and fast to transform.
    field = tuple(64 * (-(-n // 64) + 1) for n in size)
    cells = _Cells(np.random.default_rng((seed, 0)), tissue, field)
    level = _cytoplasm(np.random.default_rng((seed, 1)), tissue, cells)
    _draw_vesicles(np.random.default_rng((seed, 2)), tissue, cells, level)
    _draw_mitochondria(np.random.default_rng((seed, 3)), tissue, cells, level)
    # Membranes lie over everything else.
    truth = _draw_membranes(np.random.default_rng((seed, 4)), tissue, cells, level)
    rng = np.random.default_rng((seed, 5))
    level += np.float32(tissue.shading) * smooth_noise(rng, field, 0.12 * max(field))
    # Half of the noise passes the optics.
    share = np.float32(tissue.noise * math.sqrt(0.5))
    level += share * rng.standard_normal(field, np.float32)
    level = _blur(level, tissue.blur_px) + share * rng.standard_normal(field, np.float32)
    image = np.clip(np.rint(level), 0, 255).astype(np.uint8)
    window = tuple(slice(0, n) for n in size)
    return Section(image[window].copy(), truth[window].copy(), tissue)


class _Cells:
    """Which cell a pixel lies in, how far from its border, and where in it.

    Attributes:
        ids: (Y, X) number of the cell.
        depth: (Y, X) distance to the nearest border in pixels, less in corners.
        across: (Y, X) pixels from the long axis of the cell.
        elongated: per cell, ratio of its axes.
    """

    def __init__(self, rng: np.random.Generator, tissue: Tissue, field: tuple[int, ...]) -> None:
        centre, axes, angle = _ellipses(rng, tissue, field)
        self.elongated = (axes[:, 0] / axes[:, 1]).astype(np.float32)
        # Coarse bends, wavy borders, and the wiggle of a membrane.
        bends = [[(s, a * smooth_noise(rng, field, s)) for s, a in ((40, 13.0), (13, 3.5), (5, 0.7))] for _ in "yx"]
        warp = np.stack([sum(values for _, values in bend) for bend in bends]).astype(np.float32)
        slope = np.stack([np.stack(np.gradient(w)) for w in warp])  # [coordinate that is bent, along which axis]
        place = warp + np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in field), indexing="ij"))
        # The frame of an ellipse: rows are its long and its short direction, each divided by the semi-axis.
        cos, sin = np.cos(angle), np.sin(angle)
        frame = np.stack([np.stack([sin, cos], -1) / axes[:, :1], np.stack([cos, -sin], -1) / axes[:, 1:]], 1)
        frame = frame.astype(np.float32)
        centre, minor = centre.astype(np.float32), axes[:, 1].astype(np.float32)
        self.ids = np.empty(field, np.int32)
        self.depth: F32 = np.empty(field, np.float32)
        self.across: F32 = np.empty(field, np.float32)
        for y in range(0, field[0], BLOCK_PX):
            for x in range(0, field[1], BLOCK_PX):
                box = (slice(y, y + BLOCK_PX), slice(x, x + BLOCK_PX))
                here = place[:, box[0], box[1]].reshape(2, -1)
                near = _candidates(here, centre, frame, minor)
                order, depth, across = _depth(
                    here, slope[:, :, box[0], box[1]].reshape(2, 2, -1), centre[near], frame[near], minor[near]
                )
                shape = self.ids[box].shape
                self.ids[box] = near[order].reshape(shape)
                self.depth[box] = depth.reshape(shape)
                self.across[box] = across.reshape(shape)


def _ellipses(rng: np.random.Generator, tissue: Tissue, field: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Centres (n, 2), semi-axes (n, 2), long one first, and angles (n,) of ellipses that hardly overlap."""
    margin = 4 * tissue.cell_px + 32
    area = math.prod(n + 2 * margin for n in field)
    mean = math.pi * tissue.cell_px**2 * math.exp(2 * tissue.cell_spread**2)
    tries = int(2.2 * area / mean) + 8
    radius = tissue.cell_px * np.exp(np.clip(tissue.cell_spread * rng.standard_normal(tries), -0.9, 1.8))
    radius = np.sort(radius)[::-1]
    bundle = _field_at(rng, field, margin, 60.0)
    way = _field_at(rng, field, margin, 90.0)
    main = rng.uniform(0, math.pi)
    limit = _quantile(1 - tissue.bundles)
    centre, axes, angle = np.empty((tries, 2)), np.empty((tries, 2)), np.empty(tries)
    n = 0
    for r in radius:
        for _ in range(8):
            at = np.array([rng.uniform(-margin, f + margin) for f in field])
            if bundle(at) > limit:
                ratio, turn = tissue.elongation * math.exp(0.3 * rng.standard_normal()), main + 0.6 * way(at)
            else:
                ratio, turn = math.exp(abs(0.35 * rng.standard_normal())), rng.uniform(0, math.pi)
            stretch = math.sqrt(min(max(ratio, 1.0), 7.0))
            short = r / stretch
            # Distance from each ellipse that is there, as _depth measures it.
            d = at - centre[:n]
            u = np.sin(angle[:n]) * d[:, 0] + np.cos(angle[:n]) * d[:, 1]
            v = np.cos(angle[:n]) * d[:, 0] - np.sin(angle[:n]) * d[:, 1]
            gap = (np.hypot(u / axes[:n, 0], v / axes[:n, 1]) - 1) * axes[:n, 1]
            if n == 0 or gap.min() > 0.75 * short:
                centre[n], axes[n], angle[n] = at, (r * stretch, short), turn
                n += 1
                break
    return centre[:n], axes[:n], angle[:n]


def _field_at(rng: np.random.Generator, field: tuple[int, ...], margin: float, scale: float) -> Any:
    """A slow random field of deviation 1, to be asked for its value at a place (y, x)."""
    step = 8
    coarse = tuple(int((n + 2 * margin) // step) + 2 for n in field)
    values = smooth_noise(rng, coarse, scale / step)
    return lambda at: float(values[int((at[0] + margin) // step), int((at[1] + margin) // step)])


def _candidates(place: F32, centre: F32, frame: F32, minor: F32) -> npt.NDArray[np.int64]:
    """Numbers of the ellipses that can be among the three nearest anywhere in a block.

    The measured distance of an ellipse changes by at most the distance between two places, so that it is bounded by
    its value at the block's middle.
    """
    low, high = place.min(1), place.max(1)
    middle, reach = (low + high) / 2, float(np.hypot(*(high - low))) / 2
    gap = _gap(np.einsum("nij,nj->ni", frame, middle - centre), minor)
    third = np.sort(gap)[min(2, len(gap) - 1)]
    return np.flatnonzero(gap <= third + 2 * reach)


def _gap(local: F32, minor: F32) -> F32:
    """Distance from ellipses, negative inside, of places in their frames (n, 2, ...): exact along the short axis."""
    gap: F32 = (np.sqrt((local**2).sum(1)) - 1) * minor.reshape(-1, *[1] * (local.ndim - 2))
    return gap


def _depth(place: F32, slope: F32, centre: F32, frame: F32, minor: F32) -> tuple[npt.NDArray[np.int64], F32, F32]:
    """Nearest ellipse, distance to its border and from its long axis, of places (2, pixels).

    The border is where two gaps are equal; their difference over the length of its gradient is the distance to it.
    """
    local = np.einsum("nij,njp->nip", frame, place[None] - centre[:, :, None])
    gap = _gap(local, minor)
    few = min(3, len(minor))
    nearest = np.argpartition(gap, few - 1, axis=0)[:few]
    nearest = np.take_along_axis(nearest, np.argsort(np.take_along_axis(gap, nearest, 0), axis=0), 0)
    pixels = np.arange(place.shape[1])
    values, gradients = [], []
    for k in nearest:
        own, axes = local[k, :, pixels], frame[k]  # (p, 2) and (p, 2, 2)
        rho = np.maximum(np.sqrt((own**2).sum(1)), 1e-3)
        warped = np.einsum("pi,pij->pj", own * (minor[k] / rho)[:, None], axes)
        values.append(gap[k, pixels])
        gradients.append(np.einsum("pj,jip->pi", warped, slope) + warped)
    rest = np.full(place.shape[1], 1e-9, np.float32)
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        across = np.maximum(np.sqrt(((gradient - gradients[0]) ** 2).sum(1)), 0.5)
        rest += np.exp(-(value - values[0]) / across / JUNCTION_PX)
    depth = (-JUNCTION_PX * np.log(np.minimum(rest, 1))).astype(np.float32)
    beside: F32 = local[nearest[0], 1, pixels] * minor[nearest[0]]
    return nearest[0], depth, beside


def _cytoplasm(rng: np.random.Generator, tissue: Tissue, cells: _Cells) -> F32:
    """Grey levels of cells, with all in them but vesicles and mitochondria."""
    field = cells.ids.shape

    def noise(scale: float) -> F32:
        return smooth_noise(rng, field, scale).astype(np.float32)

    count = len(cells.elongated)
    inside = _step(cells.depth, tissue.membrane_px / 2 + 0.5, 2.0)  # 0 on membranes, 1 inside cells
    level = np.full(field, tissue.grey, np.float32)
    # Grain of two sizes, darker specks than bright ones, more or less of it in each cell; clouds.
    grain = np.float32(0.7) * (noise(0.9) + noise(1.7))
    grain -= np.float32(0.1) * (grain**2 - 1)
    level += rng.normal(0, tissue.cell_contrast, count).astype(np.float32)[cells.ids]
    level += np.float32(tissue.texture) * rng.uniform(0.65, 1.3, count).astype(np.float32)[cells.ids] * grain
    level += np.float32(0.4 * tissue.texture) * (np.float32(0.6) * noise(7) + np.float32(0.8) * noise(18))
    # Microtubules run along some elongated cells.
    striped = (rng.random(count) < 0.5) & (cells.elongated > 1.8)
    stripes = np.sin(cells.across * np.float32(2 * math.pi / 8) + 2 * noise(14)) * _step(noise(16), 0.2, 0.5)
    level -= np.float32(0.5 * tissue.texture) * striped[cells.ids] * np.maximum(stripes, 0) * inside
    # Reticulum: lines that begin and end anywhere.
    winding = noise(10)
    line = np.abs(winding) / np.maximum(np.hypot(*np.gradient(winding)), 0.02)
    drawn = np.exp(-((line / np.float32(1.4)) ** 2)) * _step(noise(15), 0.9, 0.3)
    level -= np.float32(0.45 * tissue.membrane_depth) * drawn * inside
    return level


def _draw_membranes(rng: np.random.Generator, tissue: Tissue, cells: _Cells, level: F32) -> npt.NDArray[np.uint8]:
    """Darkens ``level`` along the borders of cells; the truth."""
    field, depth = cells.ids.shape, cells.depth

    def noise(scale: float) -> F32:
        return smooth_noise(rng, field, scale).astype(np.float32)

    oblique = _step(noise(17), _quantile(1 - tissue.oblique), 0.35)
    cloud = _step(noise(11), _quantile(1 - tissue.dense), 0.4)
    half = np.float32(tissue.membrane_px / 2) * np.exp(np.float32(0.16) * noise(20))
    strength = np.clip(1 + np.float32(0.2) * noise(15), 0.35, 1.3) * (1 - np.float32(0.45) * oblique)
    wide = half * (1 + np.float32(1.4) * oblique + np.float32(0.8) * cloud)
    darkest = np.float32(tissue.grey) - np.float32(tissue.membrane_depth) * (1 + np.float32(0.35) * cloud)
    darkest += np.float32(0.25 * tissue.texture) * noise(1.2)
    beyond = np.maximum(depth - 8 * cloud, 0)
    level += (darkest - level) * np.exp(-np.float32(math.log(2)) * (beyond / wide) ** 2) * strength
    # What is dense darkens its surroundings, on which the truth is silent.
    level -= np.float32(0.35 * tissue.membrane_depth) * np.exp(-depth / 9) * _step(noise(12), 1.1, 0.6)
    border = half * (2 * LABEL_SHARE) * (1 + np.float32(0.25) * oblique) + 8 * cloud
    return np.where(depth < border, MEMBRANE, CELL).astype(np.uint8)


def _draw_vesicles(rng: np.random.Generator, tissue: Tissue, cells: _Cells, level: F32) -> None:
    """Small dark rings in swarms, a few of them large, some filled."""
    field = level.shape
    left = int(rng.poisson(tissue.vesicles_per_mpx * level.size / 1e6))
    while left > 0:
        home = [int(rng.integers(n)) for n in field]
        swarm = min(left, 1 + int(rng.exponential(8)))
        left -= swarm
        spread = rng.uniform(5, 25)
        for _ in range(swarm):
            y, x = (h + spread * rng.standard_normal() for h in home)
            radius = rng.uniform(5, 9) if rng.random() < 0.07 else rng.uniform(2.0, 4.2)
            filled, strength = rng.random() < 0.15, rng.uniform(0.25, 0.8)
            box = _box(y, x, radius + 4, field)
            if box is None or not (0 <= int(y) < field[0] and 0 <= int(x) < field[1]):
                continue
            if cells.depth[int(y), int(x)] < radius + 0.5 * tissue.membrane_px:
                continue
            rho = np.hypot(*_from(y, x, box))
            ring = np.exp(-(((rho - radius) / 1.1) ** 2))
            lumen = _step(radius - rho, 1.0, 1.0)
            level[box] -= np.float32(strength * tissue.membrane_depth) * (
                lumen * np.float32(0.8) if filled else ring - np.float32(0.2) * lumen
            ).astype(np.float32)


def _draw_mitochondria(rng: np.random.Generator, tissue: Tissue, cells: _Cells, level: F32) -> None:
    """Dark bodies with a darker rim and cristae; where one does not fit into its cell it takes the cell's shape."""
    field = level.shape
    taken = np.zeros(field, bool)
    for _ in range(int(rng.poisson(tissue.mitochondria_per_mpx * level.size / 1e6))):
        for _ in range(30):  # places tried
            y, x = (int(rng.integers(n)) for n in field)
            room = float(cells.depth[y, x])
            if room > 11 and not taken[y, x]:
                break
        else:
            continue
        short = min(rng.uniform(10, 38), 1.1 * room)
        long = short * rng.uniform(1.0, 2.4)
        box = _box(y, x, long + 6, field)
        if box is None:
            continue
        turn = rng.uniform(0, math.pi)
        dy, dx = _from(y, x, box)
        u, v = math.sin(turn) * dy + math.cos(turn) * dx, math.cos(turn) * dy - math.sin(turn) * dx
        wobble = (
            1
            + 0.08 * np.sin(2 * np.arctan2(v, u) + rng.uniform(0, 6))
            + 0.05 * np.sin(3 * np.arctan2(v, u) + rng.uniform(0, 6))
        )
        body = np.minimum((wobble - np.hypot(u / long, v / short)) * short, cells.depth[box] - tissue.membrane_px)
        body = np.where(cells.ids[box] == cells.ids[y, x], body, -9.0).astype(np.float32)
        matrix, rim = rng.uniform(0.1, 0.5), rng.uniform(0.4, 0.9)
        period, crista = rng.uniform(5, 9), rng.uniform(0.1, 0.5)
        wave = np.sin((u if rng.random() < 0.5 else v) * (2 * math.pi / period) + 1.5 * np.sin(0.12 * (u + v)))
        whole = _step(body, 0.5, 1.0)
        darker = matrix * whole + rim * np.exp(-(((body - 1.5) / 1.5) ** 2))
        darker += crista * np.maximum(wave, 0) * _step(body, 4.0, 2.0)
        level[box] -= np.float32(tissue.membrane_depth) * darker.astype(np.float32)
        taken[box] |= body > -4


def _box(y: float, x: float, reach: float, field: tuple[int, ...]) -> tuple[slice, slice] | None:
    """Pixels within ``reach`` along both axes; None where that is outside the field."""
    spans = [(max(int(c - reach), 0), min(int(c + reach) + 1, n)) for c, n in zip((y, x), field, strict=True)]
    if any(a >= b for a, b in spans):
        return None
    return slice(*spans[0]), slice(*spans[1])


def _from(y: float, x: float, box: tuple[slice, slice]) -> tuple[Any, Any]:
    """Rows and columns of a box, counted from (y, x)."""
    return np.arange(box[0].start, box[0].stop)[:, None] - y, np.arange(box[1].start, box[1].stop)[None, :] - x


def _step(values: Any, at: float, width: float) -> Any:
    """0 below ``at``, 1 above, smooth over about ``width``."""
    t = np.clip((values - at) / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _quantile(share: float) -> float:
    """The value below which ``share`` of a normal field lies."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6))


def _blur(image: F32, sigma: float) -> F32:
    """By a Gaussian, periodic as the fields are."""
    out: F32 = np.fft.irfft2(low_pass(np.fft.rfft2(image), image.shape, sigma), s=image.shape).astype(np.float32)
    return out
