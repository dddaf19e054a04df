"""Windows of a mask: read, checked and labelled one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, ImageError
from .pieces import Array, Connectivity, Ints

Read = Callable[[Sequence[int], Sequence[int]], Array]  # (start, stop) -> the pixels of that window

WINDOW_PX = 2**22  # of a window where none is given: 4 MB of labels, about 80 MB with what is made of them


def window_for(shape: Sequence[int]) -> tuple[int, ...]:
    """A window of at most ``WINDOW_PX`` pixels: all of the short axes, equal parts of the long ones."""
    window, room = [0] * len(shape), WINDOW_PX
    for left, k in zip(range(len(shape), 0, -1), sorted(range(len(shape)), key=lambda k: shape[k]), strict=True):
        window[k] = max(1, min(shape[k], int(room ** (1 / left))))
        room //= window[k]
    return tuple(window)


class Windows:
    """The windows of a mask, and which of all pieces are theirs."""

    def __init__(self, shape: tuple[int, ...], window: tuple[int, ...]) -> None:
        self.shape, self.window = shape, window
        self.counts = tuple(ceil(n / w) for n, w in zip(shape, window, strict=True))
        self.numbers: dict[tuple[int, ...], range] = {}

    def corners(self, place: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        start = tuple(i * w for i, w in zip(place, self.window, strict=True))
        return start, tuple(min(a + w, n) for a, w, n in zip(start, self.window, self.shape, strict=True))

    def holds(self, place: tuple[int, ...], low: Sequence[int], high: Sequence[int]) -> bool:
        """Whether what fills this box touches no side of a window that another one lies behind."""
        start, stop = self.corners(place)
        sides = zip(low, high, start, stop, self.shape, strict=True)
        return all((i > a or a == 0) and (j < b or b == n) for i, j, a, b, n in sides)


def window_text(start: Sequence[int], stop: Sequence[int]) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(start, stop, strict=True)) + "]"


def read_window(read: Read, start: Sequence[int], stop: Sequence[int]) -> Array:
    """The pixels of a window, or ImageError where they are no labels or not as many as asked for."""
    block = np.asarray(read(start, stop))
    expected = tuple(b - a for a, b in zip(start, stop, strict=True))
    if block.shape != expected:
        raise ImageError(f"reading the window {window_text(start, stop)} gave {block.shape} pixels, not {expected}")
    if block.dtype.kind not in "iub":
        raise ImageError(
            f"the mask holds {block.dtype} pixels, objects need labels (bool, integers); threshold it first"
        )
    return block


def morphology() -> Any:
    """SciPy's image module; ContractError where it is missing."""
    try:
        from scipy import ndimage
    except ModuleNotFoundError as error:
        raise ContractError("finding objects needs scipy, which is missing; pip install 'unet-rt[objects]'") from error
    return ndimage


class Labeller:
    """Labels one window: the same pixels always get the same numbers.

    Attributes:
        structure: What touches a pixel.
        block: The mask in the window that was labelled last; what is not sought is 0.
    """

    def __init__(
        self, read: Read, axes: int, classes: tuple[int, ...] | None, connectivity: Connectivity, *, merged: bool
    ) -> None:
        """``merged``: classes that touch are one piece."""
        ndimage = morphology()
        self._read, self._classes, self._merged, self._label = read, classes, merged, ndimage.label
        self.structure: Array = ndimage.generate_binary_structure(axes, axes if connectivity == "full" else 1)
        self.block: Array = np.zeros((0,) * axes, np.uint8)

    def __call__(self, start: Sequence[int], stop: Sequence[int]) -> tuple[npt.NDArray[np.int32], Ints]:
        """(pieces of the window numbered from 1, 0 elsewhere; the label that each is made of)."""
        block = read_window(self._read, start, stop)
        present = np.unique(block).tolist()
        if min(present) < 0:
            raise ImageError(
                f"the mask holds {min(present)} in its window {window_text(start, stop)}; labels are 0 or more"
            )
        if self._classes is not None:
            present = [value for value in present if value in self._classes]
            block = np.where(np.isin(block, present), block, np.zeros(1, block.dtype))
        self.block = block
        if self._merged:
            local, count = self._label(block > 0, self.structure, output=np.int32)
            return local, np.ones(count, np.int64)
        local = np.zeros(block.shape, np.int32)
        labels: list[int] = []
        for value in filter(None, present):
            of_class, count = self._label(block == value, self.structure, output=np.int32)
            np.add(local, of_class + len(labels), out=local, where=of_class > 0)
            labels += [int(value)] * count
        return local, np.array(labels, np.int64)
