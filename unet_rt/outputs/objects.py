"""Objects of a mask: connected components with ids that hold across windows, and a table of what they measure.

The mask is read window by window, twice. The first pass labels every window by itself; a component of one window is a
*piece*. Pieces of neighbouring windows that touch are united, and whole objects are measured, sorted and filtered. The
second pass labels every window again (the same pixels give the same pieces) and writes the final ids. Beside one window
this takes memory for the pieces (some 300 bytes each) and for one cross-section of the mask, whatever the mask's size.

Ids are 1 to N in the order of the objects' first pixels (rows first, as arrays are stored), so they depend on the mask
alone, never on the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, ImageError, size_text
from .pieces import Array, Connectivity, Ints, Pieces, Seams, box_of, measure_pieces, unite

Read = Callable[[Sequence[int], Sequence[int]], Array]  # (start, stop) -> the pixels of that window
Write = Callable[[Sequence[int], Array], None]  # (start, ids of a window)

WINDOW_PX = 2**22  # of a window where none is given: 4 MB of labels, about 80 MB with what is made of them
MOST_PIECES = 2**31 - 1  # SciPy's graphs count nodes in 32 bits


@dataclass(frozen=True, eq=False)
class Objects:
    """What was found, one row per object; row k describes id k + 1.

    Attributes:
        shape: Of the mask, (Y, X) or (Z, Y, X), in pixels.
        label: (N,) int64: the label of the mask that the object is made of (its class).
        area_px: (N,) int64: pixels, or voxels of a volume.
        centroid: (N, axes) float64: mean pixel position; the centre of the first pixel is 0.
        start, stop: (N, axes) int64: bounding box, ``stop`` excluded.
        pixel_size_um: Micrometres per pixel of each axis; empty where unknown.
        class_names: Names of labels, as far as they have any.
    """

    shape: tuple[int, ...]
    label: Ints
    area_px: Ints
    centroid: npt.NDArray[np.float64]
    start: Ints
    stop: Ints
    pixel_size_um: tuple[float, ...] = ()
    class_names: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def ids(self) -> Ints:
        """(N,) the ids in the written image: 1 to N."""
        return np.arange(1, len(self) + 1)

    @property
    def touches_edge(self) -> npt.NDArray[np.bool_]:
        """(N,) whether an object reaches the edge of the mask, so that it may be cut."""
        reached: npt.NDArray[np.bool_] = np.any((self.start == 0) | (self.stop == np.array(self.shape)), axis=1)
        return reached

    @property
    def area_um(self) -> npt.NDArray[np.float64] | None:
        """(N,) areas in square (volumes in cubic) micrometres; None where the pixel size is unknown."""
        return np.multiply(self.area_px, prod(self.pixel_size_um), dtype=np.float64) if self.pixel_size_um else None

    def class_name(self, label: int) -> str:
        """The name of a label; its number where it has none."""
        return self.class_names.get(label, str(label))


def label_mask(
    mask: Array,
    *,
    min_size: int = 1,
    classes: Sequence[int] | None = None,
    connectivity: Connectivity = "full",
    pixel_size_um: Sequence[float] = (),
    class_names: Mapping[int, str] | None = None,
) -> tuple[npt.NDArray[np.uint32], Objects]:
    """(ids, objects) of a mask in memory (or mapped): (Y, X) or (Z, Y, X). See :func:`find_objects`."""
    mask = np.asarray(mask)
    ids = np.empty(mask.shape, np.uint32)

    def read(start: Sequence[int], stop: Sequence[int]) -> Array:
        return mask[box_of(start, stop)]

    def write(start: Sequence[int], block: Array) -> None:
        ids[box_of(start, [a + n for a, n in zip(start, block.shape, strict=True)])] = block

    found = find_objects(
        read,
        mask.shape,
        write=write,
        min_size=min_size,
        classes=classes,
        connectivity=connectivity,
        pixel_size_um=pixel_size_um,
    )
    return ids, replace(found, class_names=dict(class_names or {}))


def find_objects(
    read: Read,
    shape: Sequence[int],
    *,
    window: Sequence[int] | None = None,
    write: Write | None = None,
    min_size: int = 1,
    classes: Sequence[int] | None = None,
    connectivity: Connectivity = "full",
    pixel_size_um: Sequence[float] = (),
) -> Objects:
    """The connected components of a mask that is read by windows, class by class, one row per object.

    Args:
        read: ``read(start, stop)`` gives the labels of a window: integers or bool, 0 is background. It is called twice
            for every window (once without ``write``), and has to give the same both times.
        shape: Of the mask, (Y, X) or (Z, Y, X).
        window: Size of a window: what is read, and written, at a time. Multiples of the stored chunks read each chunk
            once per pass. It never changes the result.
        write: Receives ``(start, ids)`` for every window, in raster order, background included; ids are uint32.
        min_size: Objects of fewer pixels (voxels) than this are left out. It applies to whole objects.
        classes: The labels whose pixels are objects; None: all but 0.
        connectivity: ``full``: pixels that touch by a corner belong together, the convention of scikit-image, ImageJ
            and CellProfiler; ``face``: only those that share an edge (a face, in volumes) do.
        pixel_size_um: Micrometres per pixel of each axis, where known.

    Raises:
        ContractError: An option makes no sense, or SciPy is missing.
        ImageError: The mask holds no labels, changes while it is read, or falls into more pieces than can be counted.
    """
    shape = tuple(int(n) for n in shape)
    window = window_for(shape) if window is None else tuple(min(int(w), n) for w, n in zip(window, shape, strict=True))
    _check_options(shape, window, min_size, classes, connectivity, pixel_size_um)
    labeller = _Labeller(read, None if classes is None else tuple(classes), connectivity, len(shape))

    # Pieces meet across a cross-section of the mask, which is smallest along its longest axis.
    order = sorted(range(len(shape)), key=lambda k: -shape[k])
    seams = Seams([shape[k] for k in order], connectivity)
    pieces: list[Pieces] = []
    numbers: dict[tuple[int, ...], range] = {}  # of a window's pieces among all
    total = 0
    for index in np.ndindex(*(ceil(shape[k] / window[k]) for k in order)):
        place = tuple(index[order.index(k)] for k in range(len(shape)))
        start, stop = _corners(place, window, shape)
        local, labels = labeller(start, stop)
        numbers[place] = range(total, total + len(labels))
        total += len(labels)
        if total > MOST_PIECES:
            raise ImageError(f"the mask falls into more than {MOST_PIECES:,} pieces: it is noise; raise the threshold")
        pieces.append(measure_pieces(local, labels, start, shape))
        seams.add(index, [start[k] for k in order], local.transpose(order), numbers[place].start)
    found, final = unite(Pieces.concatenated(pieces, len(shape)), seams.touching(), min_size)
    if write is not None:
        for place in np.ndindex(*(ceil(n / w) for n, w in zip(shape, window, strict=True))):
            start, stop = _corners(place, window, shape)
            local, labels = labeller(start, stop)
            own = numbers[place]
            if len(labels) != len(own):
                raise ImageError(
                    f"the mask changed while it was read: its window {_text(start, stop)} has {len(labels)} pieces now, "
                    f"{len(own)} before; try again when nothing writes to it"
                )
            write(start, np.concatenate([np.zeros(1, np.uint32), final[own.start : own.stop]])[local])
    return Objects(
        shape,
        found.label,
        found.area,
        found.position_sum / found.area[:, None],
        found.low,
        found.high + 1,
        tuple(float(s) for s in pixel_size_um),
    )


def window_for(shape: Sequence[int]) -> tuple[int, ...]:
    """A window of at most ``WINDOW_PX`` pixels: all of the short axes, equal parts of the long ones."""
    window, room = [0] * len(shape), WINDOW_PX
    for left, k in zip(range(len(shape), 0, -1), sorted(range(len(shape)), key=lambda k: shape[k]), strict=True):
        window[k] = max(1, min(shape[k], int(room ** (1 / left))))
        room //= window[k]
    return tuple(window)


def _check_options(
    shape: tuple[int, ...],
    window: tuple[int, ...],
    min_size: int,
    classes: Sequence[int] | None,
    connectivity: str,
    pixel_size_um: Sequence[float],
) -> None:
    if not 2 <= len(shape) <= 3 or min(shape) < 1:
        raise ImageError(f"a mask of shape {size_text(shape)} has no objects; give (Y, X) or (Z, Y, X)")
    if min(window) < 1:
        raise ContractError(f"a window of {size_text(window)} px reads nothing; use 1 or more along each axis")
    if min_size < 1:
        raise ContractError(f"min_size {min_size} px must be 1 or more; 1 keeps every object")
    if classes is not None and (not len(classes) or min(classes) < 1 or len(set(classes)) != len(classes)):
        raise ContractError(f"classes {list(classes)} must be different labels above 0, which is background")
    if connectivity not in ("full", "face"):
        raise ContractError(f"connectivity {connectivity!r} is unknown; use full (corners touch) or face (they do not)")
    if len(pixel_size_um) not in (0, len(shape)) or not all(s > 0 for s in pixel_size_um):
        raise ContractError(f"pixel_size_um {list(pixel_size_um)} must be {len(shape)} numbers above 0, one per axis")


# Windows ------------------------------------------------------------------------------------------------------------


def _corners(
    place: tuple[int, ...], window: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start = tuple(i * w for i, w in zip(place, window, strict=True))
    return start, tuple(min(a + w, n) for a, w, n in zip(start, window, shape, strict=True))


def _text(start: Sequence[int], stop: Sequence[int]) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(start, stop, strict=True)) + "]"


def read_window(read: Read, start: Sequence[int], stop: Sequence[int]) -> Array:
    """The pixels of a window, or ImageError where they are no labels or not as many as asked for."""
    block = np.asarray(read(start, stop))
    expected = tuple(b - a for a, b in zip(start, stop, strict=True))
    if block.shape != expected:
        raise ImageError(f"reading the window {_text(start, stop)} gave {block.shape} pixels, not {expected}")
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


class _Labeller:
    """Labels one window: the same pixels always get the same numbers."""

    def __init__(self, read: Read, classes: tuple[int, ...] | None, connectivity: Connectivity, axes: int):
        ndimage = morphology()
        self._read, self._classes, self._label = read, classes, ndimage.label
        self._structure = ndimage.generate_binary_structure(axes, axes if connectivity == "full" else 1)

    def __call__(self, start: Sequence[int], stop: Sequence[int]) -> tuple[npt.NDArray[np.int32], Ints]:
        """(pieces of the window numbered from 1, 0 elsewhere; the label that each is made of)."""
        block = read_window(self._read, start, stop)
        present = np.unique(block).tolist()
        if min(present) < 0:
            raise ImageError(f"the mask holds {min(present)} in its window {_text(start, stop)}; labels are 0 or more")
        local = np.zeros(block.shape, np.int32)
        labels: list[int] = []
        for value in present:
            if value == 0 or (self._classes is not None and value not in self._classes):
                continue
            of_class, count = self._label(block == value, self._structure, output=np.int32)
            np.add(local, of_class + len(labels), out=local, where=of_class > 0)
            labels += [int(value)] * count
        return local, np.array(labels, np.int64)


# Pieces -------------------------------------------------------------------------------------------------------------
