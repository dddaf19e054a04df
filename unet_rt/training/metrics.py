"""Figures of segmentations against truth, each with its source. Rand errors need scikit-image (the ``train`` extra)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError
from .components import components

Labels = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def pixel_error(mask: Labels, truth: Labels) -> float:
    """Share of pixels of another class: of masks, ISBI 2012's squared distance (Arganda-Carreras et al. 2015)."""
    return float(np.mean(mask != truth))


def iou(mask: Mask, truth: Mask) -> float:
    """|A and B| / |A or B|, intersection over union (Jaccard 1901); 1 where both are empty."""
    union = int((mask | truth).sum())
    return int((mask & truth).sum()) / union if union else 1.0


def dice(mask: Mask, truth: Mask) -> float:
    """2 |A and B| / (|A| + |B|) (Dice 1945); 1 where both are empty."""
    total = int(mask.sum()) + int(truth.sum())
    return 2 * int((mask & truth).sum()) / total if total else 1.0


def rand_error(mask: Mask, truth: Mask) -> float:
    """1 - F score of pairs of pixels, of the 4-connected objects of two masks (Y, X).

    As the ISBI 2012 challenge scored in the end (Arganda-Carreras et al. 2015): foreground-restricted (pixels that are
    background in the truth do not count), and after border thinning (the objects of ``mask`` are grown by a watershed
    until they touch, so that the thickness of a drawn border does not matter).
    Computed by ``skimage.metrics.adapted_rand_error``.
    """
    skimage = _skimage()
    found = skimage.segmentation.watershed(_distance(mask), components(mask)) if mask.any() else mask.astype(np.int32)
    reference = components(truth)
    if not truth.any():
        return float(mask.any())
    # In one call: pixels that are 0 in the truth are left out.
    error: float = skimage.metrics.adapted_rand_error(reference, found, ignore_labels=(0,))[0]
    return float(error)


def object_iou(labels: Labels, truth: Labels) -> float:
    """SEG of the Cell Tracking Challenge (Maška et al. 2014): mean IoU over the objects of the truth.

    A reference object matches the one object that covers more than half of it; where none does it counts 0. Both are
    (Y, X) ids, 0 for background. NaN where the truth holds no object.
    """
    reference, counts = np.unique(truth, return_counts=True)
    sizes = dict(zip(*np.unique(labels, return_counts=True), strict=True))
    found: list[float] = []
    for k, area in zip(reference.tolist(), counts.tolist(), strict=True):
        if k == 0:
            continue
        inside, covered = np.unique(labels[truth == k], return_counts=True)
        best = int(np.argmax(np.where(inside == 0, 0, covered)))
        shared = int(covered[best])
        if inside[best] == 0 or 2 * shared <= area:
            found.append(0.0)
        else:
            found.append(shared / (area + int(sizes[inside[best]]) - shared))
    return float(np.mean(found)) if found else float("nan")


def warping_error(mask: Mask, truth: Mask) -> float:
    """Share of pixels that still differ after the truth was warped towards ``mask`` (Jain et al. 2010).

    The truth's pixels are flipped to the mask's value one after the other wherever that leaves its topology as it is
    (simple points; foreground 4-connected, background 8-connected) until none can be: borders may move, splits,
    mergers, holes and lost objects remain. The greedy order makes it an upper bound, as it does in the challenge's own
    implementation; unlike there, no mask bounds how far a border may move.
    """
    warped = np.pad(truth.astype(np.uint8), 1)  # beyond the image is background
    wanted = np.pad(mask.astype(np.uint8), 1)
    wanted[[0, -1], :] = wanted[:, [0, -1]] = 0
    simple = _simple_points()
    differs = warped != wanted
    pending = [tuple(p) for p in np.argwhere(differs).tolist()]
    waiting = set(pending)
    while pending:
        following: list[tuple[int, ...]] = []
        for place in pending:
            y, x = place
            if place not in waiting:
                continue
            window = warped[y - 1 : y + 2, x - 1 : x + 2].ravel()
            if simple[int(window @ _BITS)]:
                warped[y, x] ^= 1
                waiting.discard(place)
                # Neighbours that were not simple may be now.
                following += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (y + dy, x + dx) in waiting]
        pending = list(dict.fromkeys(following))
    return len(waiting) / mask.size


_BITS = 2 ** np.arange(9)


@cache
def _simple_points() -> tuple[bool, ...]:
    """For each of the 512 3 x 3 windows: whether flipping the centre keeps the topology.

    True if exactly one 4-connected part of the foreground among the eight neighbours touches the centre by a side, and
    exactly one 8-connected part of the background touches it (Kong and Rosenfeld 1989).
    """
    found = []
    for code in range(512):
        window = (code >> np.arange(9) & 1).reshape(3, 3).astype(bool)
        ring = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
        inside = _parts([p for p in ring if window[p]], diagonal=False)
        outside = _parts([p for p in ring if not window[p]], diagonal=True)
        sides = {(0, 1), (1, 0), (1, 2), (2, 1)}
        found.append(sum(bool(part & sides) for part in inside) == 1 and len(outside) == 1)
    return tuple(found)


def _parts(places: list[tuple[int, int]], *, diagonal: bool) -> list[set[tuple[int, int]]]:
    parts: list[set[tuple[int, int]]] = []
    for y, x in places:
        near = [
            part
            for part in parts
            if any(max(abs(y - b), abs(x - a)) == 1 and (diagonal or abs(y - b) + abs(x - a) == 1) for b, a in part)
        ]
        joined = {(y, x)}.union(*near)
        parts = [part for part in parts if all(part is not other for other in near)] + [joined]
    return parts


def _distance(mask: Mask) -> npt.NDArray[np.float64]:
    """Distance to the mask, which is what its objects grow over."""
    from scipy.ndimage import distance_transform_edt

    distance: npt.NDArray[np.float64] = distance_transform_edt(~mask)
    return distance


def _skimage() -> Any:
    try:
        import skimage.metrics
        import skimage.segmentation
    except ModuleNotFoundError as error:
        raise BackendError("scikit-image is missing, which scores Rand errors; pip install unet-rt[train]") from error
    return skimage
