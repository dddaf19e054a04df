"""Objects of a mask: connected components with ids that hold across windows, and a table of what they measure.

The mask is read window by window, twice. The first pass labels every window by itself; a component of one window is a
*piece*. Pieces of neighbouring windows that touch are united, and whole objects are measured, sorted and filtered. The
second pass labels every window again (the same pixels give the same pieces) and writes the final ids. Beside one window
this takes memory for the pieces (some 300 bytes each) and for one cross-section of the mask, whatever the mask's size.

Ids are 1 to N in the order of the objects' first pixels (rows first, as arrays are stored), so they depend on the mask
alone, never on the windows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, ImageError, size_text
from .pieces import Array, Connectivity, Ints, Pieces, Seams, box_of, measure_pieces, unite
from .split import How, Parts, Split, border_label
from .windows import Labeller, Read, Windows, morphology, window_for, window_text

Ids = npt.NDArray[np.uint32]
Unit = Literal["um", "mm", "m"]

UNIT_PER_UM = {"um": 1.0, "mm": 1e-3, "m": 1e-6}

SPOOL_BYTES = 2**26  # of parts of objects, beyond which they lie on the disk
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
        unit: Of the areas in files: micrometres, millimetres (scanners) or metres (maps).
        channels: Names of the image's channels, where their pixels were looked at.
        means: (N, channels) float64: mean pixel of each object in each of them.
    """

    shape: tuple[int, ...]
    label: Ints
    area_px: Ints
    centroid: npt.NDArray[np.float64]
    start: Ints
    stop: Ints
    pixel_size_um: tuple[float, ...] = ()
    class_names: Mapping[int, str] = field(default_factory=dict)
    unit: Unit = "um"
    channels: tuple[str, ...] = ()
    means: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

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

    @property
    def pixel_area(self) -> float | None:
        """Of one pixel (voxel) in :attr:`unit`, squared (cubed); None where the pixel size is unknown."""
        per_um = UNIT_PER_UM[self.unit] ** len(self.shape)
        return prod(self.pixel_size_um) * per_um if self.pixel_size_um else None

    @property
    def area_unit(self) -> str:
        """``um2``, ``m2``, ``mm3``, ...: of :attr:`pixel_area`."""
        return f"{self.unit}{len(self.shape)}"

    def class_name(self, label: int) -> str:
        """The name of a label; its number where it has none."""
        return self.class_names.get(label, str(label))


@dataclass(frozen=True)
class Sought:
    """Which objects of a mask are wanted.

    Attributes:
        min_size: Objects of fewer pixels (voxels) than this are left out. It applies to whole objects, once they are split.
        classes: The labels whose pixels are objects; None: all but 0.
        connectivity: ``full``: pixels that touch by a corner belong together, the convention of scikit-image, ImageJ
            and CellProfiler; ``face``: only those that share an edge (a face, in volumes) do.
        split: How objects that touch are told apart; None: they are one.
    """

    min_size: int = 1
    classes: tuple[int, ...] | None = None
    connectivity: Connectivity = "full"
    split: Split | None = None


def label_mask(
    mask: Array,
    *,
    min_size: int = 1,
    classes: Sequence[int] | None = None,
    connectivity: Connectivity = "full",
    pixel_size_um: Sequence[float] = (),
    class_names: Mapping[int, str] | None = None,
    split: How = "none",
) -> tuple[npt.NDArray[np.uint32], Objects]:
    """(ids, objects) of a mask in memory (or mapped): (Y, X) or (Z, Y, X).

    Args:
        mask: Labels: integers or bool, 0 is background.
        min_size, classes, connectivity: See :class:`Sought`.
        pixel_size_um: Micrometres per pixel of each axis, where known.
        class_names: Names of labels.
        split: How objects that touch are told apart: ``none``, ``watershed`` (from the places farthest from the edge) or
            ``border`` (by the class of that name in ``class_names``).

    Raises:
        ContractError: An option makes no sense, or SciPy or scikit-image is missing.
        ImageError: The mask holds no labels, or falls into more pieces than can be counted.
    """
    mask = np.asarray(mask)
    ids = np.empty(mask.shape, np.uint32)
    names = dict(class_names or {})

    def read(start: Sequence[int], stop: Sequence[int]) -> Array:
        return mask[box_of(start, stop)]

    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        how = None
        if split != "none":
            border = border_label(names) if split == "border" else 0
            how = Split(split, spool, border, sampling=tuple(pixel_size_um))
        sought = Sought(min_size, None if classes is None else tuple(classes), connectivity, how)
        found = find_objects(read, mask.shape, sought, pixel_size_um=pixel_size_um)
        for start, block in found.windows():
            ids[box_of(start, [a + n for a, n in zip(start, block.shape, strict=True)])] = block
    return ids, replace(found.objects, class_names=names)


class Numbered:
    """Objects that were found, and the ids of all pixels.

    Attributes:
        objects: What was found.
    """

    def __init__(
        self, objects: Objects, labeller: Labeller, windows: Windows, final: Ids, parts: _PartIds | None
    ) -> None:
        self.objects = objects
        self._labeller, self._windows, self._final, self._parts = labeller, windows, final, parts

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def window(self) -> tuple[int, ...]:
        """Size of a window."""
        return self._windows.window

    def windows(self) -> Iterator[tuple[tuple[int, ...], Ids]]:
        """(start, ids) of every window, in raster order, background included. The mask is read once more.

        Raises:
            ImageError: It has changed.
        """
        for place in np.ndindex(*self._windows.counts):
            start, stop = self._windows.corners(place)
            yield start, self.read(start, stop)

    def read(self, start: Sequence[int], stop: Sequence[int]) -> Ids:
        """The ids of one window. ImageError where the mask has changed."""
        local, labels = self._labeller(start, stop)
        own = self._windows.numbers[tuple(a // w for a, w in zip(start, self.window, strict=True))]
        if len(labels) != len(own):
            raise ImageError(
                f"the mask changed while it was read: its window {window_text(start, stop)} has {len(labels)} pieces "
                f"now, {len(own)} before; try again when nothing writes to it"
            )
        ids: Ids = np.concatenate([np.zeros(1, np.uint32), self._final[own.start : own.stop]])[local]
        if self._parts is not None:
            self._parts.kept.paste(start, ids, self._parts.ids)
        return ids


@dataclass(frozen=True)
class _PartIds:
    """The parts of objects that were split, and the id of each."""

    kept: Parts
    ids: Ids


def find_objects(
    read: Read,
    shape: Sequence[int],
    sought: Sought | None = None,
    *,
    window: Sequence[int] | None = None,
    pixel_size_um: Sequence[float] = (),
) -> Numbered:
    """The connected components of a mask that is read by windows, class by class, one row per object.

    Args:
        read: ``read(start, stop)`` gives the labels of a window: integers or bool, 0 is background. It has to give the same
            whenever it is called.
        shape: Of the mask, (Y, X) or (Z, Y, X).
        sought: Which objects are wanted; None: all, unsplit.
        window: Size of a window: what is read, and written, at a time. Multiples of the stored chunks read each chunk
            once per pass. It never changes the result.
        pixel_size_um: Micrometres per pixel of each axis, where known.

    Raises:
        ContractError: An option makes no sense, or a library is missing.
        ImageError: The mask holds no labels, changes while it is read, falls into more pieces than can be counted, or
            holds an object that is too large to be split.
    """
    sought = sought or Sought()
    shape = tuple(int(n) for n in shape)
    window = window_for(shape) if window is None else tuple(min(int(w), n) for w, n in zip(window, shape, strict=True))
    _check_options(shape, window, sought, pixel_size_um)
    merged = sought.split is not None and sought.split.merges
    labeller = Labeller(read, len(shape), sought.classes, sought.connectivity, merged=merged)
    parts = None if sought.split is None else Parts(sought.split, shape, labeller.structure)
    windows = Windows(shape, window)
    whole, group = _components(windows, labeller, sought.connectivity, parts)
    rows, split = whole, Pieces.empty(np.zeros(0, np.int64), len(shape))
    if parts is not None:
        rows, split = _split_rest(whole, group, labeller, parts)
    every = Pieces.concatenated([rows, split], len(shape))
    order = np.argsort(every.first, kind="stable")
    order = order[(every.area[order] >= sought.min_size) & (every.label[order] > 0)]
    ids = np.zeros(len(every.label), np.uint32)
    ids[order] = np.arange(1, len(order) + 1)
    found = every.take(order)
    objects = Objects(
        shape,
        found.label,
        found.area,
        found.position_sum / found.area[:, None],
        found.low,
        found.high + 1,
        tuple(float(s) for s in pixel_size_um),
    )
    pasted = None if parts is None else _PartIds(parts, ids[len(rows.label) :])
    return Numbered(objects, labeller, windows, ids[: len(rows.label)][group], pasted)


def _components(
    windows: Windows, labeller: Labeller, connectivity: Connectivity, parts: Parts | None
) -> tuple[Pieces, Ints]:
    """(whole objects, the row of every piece); what lies within one window is split on the way, by its piece's number."""
    shape = windows.shape
    # Pieces meet across a cross-section of the mask, which is smallest along its longest axis.
    order = sorted(range(len(shape)), key=lambda k: -shape[k])
    seams = Seams([shape[k] for k in order], connectivity)
    pieces: list[Pieces] = []
    total = 0
    for index in np.ndindex(*(windows.counts[k] for k in order)):
        place = tuple(index[order.index(k)] for k in range(len(shape)))
        start, stop = windows.corners(place)
        local, labels = labeller(start, stop)
        windows.numbers[place] = range(total, total + len(labels))
        if parts is not None:
            _split_inner(place, windows, local, labeller, parts)
        total += len(labels)
        if total > MOST_PIECES:
            raise ImageError(f"the mask falls into more than {MOST_PIECES:,} pieces: it is noise; raise the threshold")
        pieces.append(measure_pieces(local, labels, start, shape))
        seams.add(index, [start[k] for k in order], local.transpose(order), windows.numbers[place].start)
    return unite(Pieces.concatenated(pieces, len(shape)), seams.touching())


def _split_inner(
    place: tuple[int, ...], windows: Windows, local: npt.NDArray[np.int32], labeller: Labeller, parts: Parts
) -> None:
    """Splits the pieces of a window, just labelled, that are whole objects."""
    start, first = windows.corners(place)[0], windows.numbers[place].start
    for k, box in enumerate(morphology().find_objects(local)):
        low = [a + part.start for a, part in zip(start, box, strict=True)]
        high = [a + part.stop for a, part in zip(start, box, strict=True)]
        if windows.holds(place, low, high):
            parts.add(first + k, low, local[box] == k + 1, labeller.block[box])


def _split_rest(whole: Pieces, group: Ints, labeller: Labeller, parts: Parts) -> tuple[Pieces, Pieces]:
    """(objects with what each is made of, 0 where its parts stand for it; the parts): splits what no window held whole."""
    label = whole.label.copy()
    done = np.zeros(len(label), bool)
    for piece, made_of in parts.labels.items():
        label[group[piece]], done[group[piece]] = made_of, True
    for row in np.flatnonzero(~done).tolist():
        low, high = whole.low[row].tolist(), (whole.high[row] + 1).tolist()
        parts.check_room(low, high)
        local, _ = labeller(low, high)
        first = np.unravel_index(int(whole.first[row]), parts.shape)
        at = tuple(int(f) - a for f, a in zip(first, low, strict=True))
        parts.add(-1, low, local == local[at], labeller.block)
        label[row] = parts.labels.pop(-1)
    return replace(whole, label=label), parts.pieces()


def _check_options(
    shape: tuple[int, ...], window: tuple[int, ...], sought: Sought, pixel_size_um: Sequence[float]
) -> None:
    classes = sought.classes
    if not 2 <= len(shape) <= 3 or min(shape) < 1:
        raise ImageError(f"a mask of shape {size_text(shape)} has no objects; give (Y, X) or (Z, Y, X)")
    if min(window) < 1:
        raise ContractError(f"a window of {size_text(window)} px reads nothing; use 1 or more along each axis")
    if sought.min_size < 1:
        raise ContractError(f"min_size {sought.min_size} px must be 1 or more; 1 keeps every object")
    if classes is not None and (not len(classes) or min(classes) < 1 or len(set(classes)) != len(classes)):
        raise ContractError(f"classes {list(classes)} must be different labels above 0, which is background")
    if sought.connectivity not in ("full", "face"):
        raise ContractError(
            f"connectivity {sought.connectivity!r} is unknown; use full (corners touch) or face (they do not)"
        )
    if len(pixel_size_um) not in (0, len(shape)) or not all(s > 0 for s in pixel_size_um):
        raise ContractError(f"pixel_size_um {list(pixel_size_um)} must be {len(shape)} numbers above 0, one per axis")
