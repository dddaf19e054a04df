"""Connected parts of a mask: the objects in a mask that only says foreground and background."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def components(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Ids 1, 2, ... of the 4-connected parts of a mask (Y, X), in reading order; 0 for background.

    4-connected, so that a diagonal line one pixel wide keeps two objects apart. Horizontal runs are joined with those
    they touch in the row above.
    """
    height, width = mask.shape
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    row, start = np.nonzero(edges == 1)
    stop = np.nonzero(edges == -1)[1]
    count = len(row)
    out = np.zeros((height, width), np.int32)
    if count == 0:
        return out
    parent = list(range(count))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    first = np.searchsorted(row, np.arange(height + 1)).tolist()
    starts, stops = start.tolist(), stop.tolist()
    for y in range(1, height):
        above, last_above = first[y - 1], first[y]
        for k in range(first[y], first[y + 1]):
            while above < last_above and stops[above] <= starts[k]:
                above += 1
            other = above
            while other < last_above and starts[other] < stops[k]:
                a, b = root(other), root(k)
                parent[max(a, b)] = min(a, b)
                other += 1
            above = max(above, other - 1)
    roots = np.array([root(k) for k in range(count)])
    ids = np.unique(roots, return_inverse=True)[1] + 1
    # Runs in reading order: each id repeated over its run fills the foreground in reading order.
    out[mask] = np.repeat(ids, stop - start)
    return out
