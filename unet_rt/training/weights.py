"""Targets and weights of the paper's loss, from a mask of instance ids.

    w(x) = wc(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2))

wc balances the classes; d1 and d2 are the distances to the nearest and the second nearest object, so that the thin
background between two touching objects weighs most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Labels = npt.NDArray[np.integer[Any]]

FAR_SIGMAS = 5  # d1 + d2 beyond this many sigma: w0 e^-12.5 = 4e-5, nothing beside wc


def separate(labels: Labels) -> npt.NDArray[np.bool_]:
    """Foreground of instance ids (Y, X), with a background line of 1 to 2 px where two objects touch."""
    foreground: npt.NDArray[np.bool_] = labels > 0
    out = foreground.copy()
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here, there = _shift_slices(dy, dx)
        touching = (labels[here] != labels[there]) & foreground[here] & foreground[there]
        out[here] &= ~touching
    return out


def border_weights(labels: Labels, *, w0: float = 10.0, sigma_px: float = 5.0) -> F32:
    """The border term of the weight map, ``(Y, X)``: zero inside objects and far from any two of them.

    Args:
        labels: (Y, X) instance ids, 0 for background. Background between touching objects counts as such only if it
            is there: pass ``labels * separate(labels)``.
        w0: Weight where two borders meet.
        sigma_px: Its reach.
    """
    if labels.ndim != 2:
        raise ValueError(f"labels are {labels.shape}; border weights take one (Y, X) mask at a time")
    reach = int(np.ceil(FAR_SIGMAS * sigma_px))
    far = np.float32(4 * reach)
    near1 = np.full(labels.shape, far, np.float32)
    near2 = near1.copy()
    for number, box in _boxes(labels):
        grown = tuple(
            slice(max(s.start - reach, 0), min(s.stop + reach, n)) for s, n in zip(box, labels.shape, strict=True)
        )
        d = _distance(labels[grown] == number, reach)
        first, second = near1[grown], near2[grown]
        np.minimum(second, np.maximum(first, d), out=second)
        np.minimum(first, d, out=first)
    weights: F32 = np.float32(w0) * np.exp(-((near1 + near2) ** 2) / np.float32(2 * sigma_px**2))
    weights[(labels > 0) | (near1 + near2 > reach)] = 0
    return weights


def class_weights(targets: Sequence[npt.NDArray[Any]], classes: int, *, balance: float = 1.0) -> F32:
    """(classes,) weights proportional to ``frequency ** -balance`` whose mean over all pixels is one.

    ``balance`` 1 gives every class the same say (the paper's), 0 every pixel.
    """
    counts = sum((np.bincount(t.ravel(), minlength=classes) for t in targets), np.zeros(classes, np.int64))
    if np.any(counts == 0):
        missing = [int(k) for k in np.flatnonzero(counts == 0)]
        raise ValueError(f"no pixel of class {missing} in {len(targets)} masks; a network cannot learn it from these")
    frequency = counts / counts.sum()
    weights = frequency**-balance
    scaled: F32 = (weights / (weights * frequency).sum()).astype(np.float32)
    return scaled


def _shift_slices(dy: int, dx: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Index of every pixel that has a neighbour at (dy, dx), and of that neighbour; dy is 0 or 1."""
    rows = (slice(0, -dy or None), slice(dy, None))
    columns = (slice(max(0, -dx), -dx if dx > 0 else None), slice(max(0, dx), dx if dx < 0 else None))
    return (rows[0], columns[0]), (rows[1], columns[1])


def _boxes(labels: Labels) -> list[tuple[int, tuple[slice, slice]]]:
    """Bounding box of every id, all found in one sort."""
    y, x = np.nonzero(labels)
    if not len(y):
        return []
    ids = labels[y, x]
    order = np.argsort(ids, kind="stable")
    ids, y, x = ids[order], y[order], x[order]
    start = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    y0, y1 = np.minimum.reduceat(y, start), np.maximum.reduceat(y, start)
    x0, x1 = np.minimum.reduceat(x, start), np.maximum.reduceat(x, start)
    return [
        (int(number), (slice(int(a), int(b) + 1), slice(int(c), int(d) + 1)))
        for number, a, b, c, d in zip(ids[start], y0, y1, x0, x1, strict=True)
    ]


def _distance(inside: npt.NDArray[np.bool_], reach: int) -> F32:
    """Euclidean distance to the nearest pixel that is inside; ``4 * reach`` where none is within ``reach`` rows."""
    far = np.float32(4 * reach)
    down = np.full(inside.shape, far, np.float32)
    up = down.copy()
    row = np.where(inside, np.float32(0), far)
    height = inside.shape[0]
    down[0], up[-1] = row[0], row[-1]
    for k in range(1, height):
        np.minimum(row[k], down[k - 1] + 1, out=down[k])
        np.minimum(row[-1 - k], up[-k] + 1, out=up[-1 - k])
    vertical = np.minimum(np.minimum(down, up), far) ** 2
    best = vertical.copy()
    for k in range(1, min(reach, inside.shape[1] - 1) + 1):
        offset = np.float32(k * k)
        np.minimum(best[:, k:], vertical[:, :-k] + offset, out=best[:, k:])
        np.minimum(best[:, :-k], vertical[:, k:] + offset, out=best[:, :-k])
    distance: F32 = np.minimum(np.sqrt(best), far)
    return distance
