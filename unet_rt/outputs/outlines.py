"""Outlines of objects as GeoJSON polygons, for slide viewers and maps.

Outlines run along the sides of pixels, so a polygon covers its object exactly: its area is the number of pixels. Holes are
kept, and rings never cross or touch themselves. Parts of an object that meet at a corner alone become a MultiPolygon.

The image of ids is read window by window, once. Sides of pixels are collected as directed edges with the object on their
right. An object that goes on in a later window waits; where its windows meet, edges of opposite direction cancel. So memory
is bounded by a window and the outlines of the objects that are being read, however large an object is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, ImageError
from ..system.durable import open_whole
from .objects import Objects
from .pieces import Array, Ints
from .windows import Read, read_window, window_for

Edges = npt.NDArray[np.int32]
Ring = list[tuple[int, int]]  # corners (y, x) of a closed line, the first not repeated
Affine = tuple[float, float, float, float, float, float]

PIXELS: Affine = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
# (y, x) steps of the four directions, each a right turn from the one before (y points down): east, south, west, north.
STEP = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
# Readable on bright-field and on fluorescence images; the class of label k gets colour k - 1, then from the front again.
COLOURS = ((230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127), (132, 145, 180), (240, 190, 40))


@dataclass(frozen=True)
class Outlined:
    """The objects of one picture that are drawn as polygons.

    Attributes:
        found: The objects, as :func:`unet_rt.outputs.objects.find_objects` returned them; of a (Y, X) mask.
        read: ``read(start, stop)`` gives the ids that were written, of a window.
        plane: (z, t) of a picture of a stack; None: the image has one.
    """

    found: Objects
    read: Read
    plane: tuple[int, int] | None = None


def write_geojson(
    path: str | os.PathLike[str],
    pictures: Sequence[Outlined],
    *,
    window: Sequence[int] | None = None,
    transform: Sequence[float] = PIXELS,
    crs: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a FeatureCollection with one feature per object, in the order of ids, as QuPath imports it.

    The properties of a feature are ``objectType`` (``detection``), ``name`` (the id), ``classification`` (name and
    colour), ``measurements`` (area, centroid) and ``id``, ``label``, ``touches_edge``; the geometry of a stack's object
    has QuPath's ``plane``.

    Args:
        path: The file; it appears whole or not at all.
        pictures: One, or the planes of a stack.
        window: Size of a window; it never changes the result.
        transform: (a, b, c, d, e, f) of ``x' = a x + b y + c``, ``y' = d x + e y + f`` from pixels to the coordinates
            written, as rasterio orders them. Pixel (0, 0) covers 0 to 1 along both axes.
        crs: Name of the coordinate system, e.g. ``urn:ogc:def:crs:EPSG::32633``, where it is not pixels; written as
            GDAL does.
        overwrite: Replace what is there.

    Raises:
        ContractError: The objects are those of a volume, or the transformation is no plane's.
        ImageError: The ids that are read are not those of the objects.
        OutputError: The file exists already, or cannot be written.
    """
    for picture in pictures:
        if (axes := len(picture.found.shape)) != 2:
            raise ContractError(f"GeoJSON holds outlines in a plane, these objects have {axes} axes; use a table")
    a, b, c, d, e, f = (float(v) for v in transform)
    turn = a * e - b * d
    if not (np.isfinite([a, b, c, d, e, f]).all() and turn):
        raise ContractError(f"transform {tuple(transform)} maps the plane to a line; give (a, b, c, d, e, f)")
    plain = (a, b, c, d, e, f) == PIXELS

    def place(ring: Ring) -> list[list[float]]:
        closed = [*ring, ring[0]]
        if plain:
            return [[x, y] for y, x in closed]
        mapped = [[a * x + b * y + c, d * x + e * y + f] for y, x in closed]
        return mapped if turn > 0 else mapped[::-1]  # outer rings turn the same way in every coordinate system

    # Objects end in an order that depends on the windows; features are put in the order of ids when all are there.
    begins = np.cumsum([0, *(len(picture.found) for picture in pictures)])
    spans = np.zeros((begins[-1], 2), np.int64)
    with open_whole(path, overwrite=overwrite) as stream, tempfile.TemporaryFile(dir=Path(path).parent) as drafts:
        for picture, begin in zip(pictures, begins.tolist(), strict=False):
            for number, polygons in outlines(picture.found, picture.read, window=window):
                text = json.dumps(_feature(picture, number, [[place(ring) for ring in rings] for rings in polygons]))
                data = text.encode()
                spans[begin + number - 1] = drafts.tell(), len(data)
                drafts.write(data)
        _assemble(stream, drafts, spans, crs)


def _assemble(stream: IO[str], drafts: IO[bytes], spans: Ints, crs: str | None) -> None:
    head = {"type": "FeatureCollection"} | ({"crs": {"type": "name", "properties": {"name": crs}}} if crs else {})
    stream.write(json.dumps(head)[:-1] + ', "features": [')
    for k, (offset, size) in enumerate(spans.tolist()):
        drafts.seek(offset)
        stream.write((",\n" if k else "\n") + drafts.read(size).decode())
    stream.write("\n]}\n")


def _feature(picture: Outlined, number: int, polygons: list[Any]) -> dict[str, Any]:
    found, k = picture.found, number - 1
    touches_edge = any(found.start[k] == 0) or any(found.stop[k] == found.shape)
    label = int(found.label[k])
    y, x = found.centroid[k].tolist()
    measurements = {"area px": int(found.area_px[k]), "centroid x px": x, "centroid y px": y}
    if found.pixel_area is not None:
        measurements[f"area {found.area_unit}"] = measurements["area px"] * found.pixel_area
    means = found.means[k].tolist() if found.channels else []  # of pixels without a number there is none
    measurements |= {f"mean {name}": m for name, m in zip(found.channels, means, strict=False) if isfinite(m)}
    single = len(polygons) == 1
    plane = {} if picture.plane is None else {"plane": {"c": -1, "z": picture.plane[0], "t": picture.plane[1]}}
    return {
        "type": "Feature",
        "geometry": {
            "type": "Polygon" if single else "MultiPolygon",
            "coordinates": polygons[0] if single else polygons,
            **plane,
        },
        "properties": {
            "objectType": "detection",
            "name": str(number),
            "classification": {"name": found.class_name(label), "color": list(COLOURS[(label - 1) % len(COLOURS)])},
            "measurements": measurements,
            "id": number,
            "label": label,
            "touches_edge": touches_edge,
        },
    }


def outlines(
    found: Objects, read: Read, *, window: Sequence[int] | None = None
) -> Iterator[tuple[int, list[list[Ring]]]]:
    """(id, polygons) of every object, when its last window was read; a polygon is its outer ring and its holes.

    Corners are (y, x) between pixels: pixel (0, 0) has corners (0, 0) to (1, 1). Outer rings run clockwise as seen on a
    screen, holes the other way. See :func:`write_geojson` for arguments and errors.
    """
    shape = found.shape
    size = window_for(shape) if window is None else [min(int(w), n) for w, n in zip(window, shape, strict=True)]
    columns = ceil(shape[1] / size[1])
    last = (found.stop - 1) // np.array(size) @ np.array([columns, 1])  # of the windows that an object lies in
    ending = np.argsort(last, kind="stable")
    begin = 0
    waiting: dict[int, list[Edges]] = {}
    for count, (i, j) in enumerate(np.ndindex(ceil(shape[0] / size[0]), columns)):
        start = (i * size[0], j * size[1])
        stop = (min(start[0] + size[0], shape[0]), min(start[1] + size[1], shape[1]))
        ids = read_window(read, start, stop)
        if int(ids.max()) > len(found):
            raise ImageError(
                f"the ids hold {int(ids.max())}, and there are {len(found)} objects; they belong to another mask"
            )
        edges = _edges(ids, start)
        ends = last[edges[:, 0] - 1] == count
        for number, rows in _by_object(edges[~ends]):
            waiting.setdefault(number, []).append(rows)
        end = int(np.searchsorted(last[ending], count, side="right"))
        done = np.sort(ending[begin:end] + 1).tolist()
        begin = end
        carried = [rows for number in done for rows in waiting.pop(number, ())]
        traced = _polygons(_without_inner(np.concatenate([edges[ends], *carried]), shape), shape)
        if list(traced) != done:
            odd = min(set(done) ^ set(traced))
            raise ImageError(f"the ids do not hold object {odd} where it was found; they belong to another mask")
        yield from traced.items()


def _edges(ids: Array, start: Sequence[int]) -> Edges:
    """The sides between a window's pixels of different ids, and those at its border: rows of id, start (y, x), direction."""
    padded = np.pad(ids, 1).astype(np.int32)
    found = []
    for low, high, forward, back in (
        (padded[:-1, 1:-1], padded[1:, 1:-1], 0, 2),  # the object below a side has it go east, the one above west
        (padded[1:-1, :-1], padded[1:-1, 1:], 3, 1),  # right of it north, left of it south
    ):
        differ = low != high
        for pixels, direction in ((high, forward), (low, back)):
            y, x = np.nonzero(differ & (pixels > 0))
            from_end = np.array([int(direction == 3), int(direction == 2)])  # where the side's far corner is the start
            at = np.stack([y, x], axis=1) + from_end + np.array(start)
            found.append(np.column_stack([pixels[y, x], at, np.full(len(y), direction)]).astype(np.int32))
    return np.concatenate(found)


def _by_object(edges: Edges) -> Iterator[tuple[int, Edges]]:
    edges = edges[np.argsort(edges[:, 0], kind="stable")]
    begins = np.flatnonzero(np.diff(edges[:, 0], prepend=0))
    for rows in np.split(edges, begins[1:]) if len(edges) else ():
        yield int(rows[0, 0]), rows


def _keys(rank: Ints, at: Edges, direction: Edges, shape: Sequence[int]) -> Ints:
    """One number per edge of the rank-th object that leaves the corner ``at``; they sort by object, y, x, direction."""
    corner = (rank * (shape[0] + 1) + at[:, 0]) * (shape[1] + 1) + at[:, 1]
    return corner * 4 + direction


def _without_inner(edges: Edges, shape: Sequence[int]) -> Edges:
    """The edges but for those that two windows gave in opposite directions: inside of an object. Sorted by key."""
    _, rank = np.unique(edges[:, 0], return_inverse=True)
    back = edges[:, 3] >= 2
    low = edges[:, 1:3] + STEP[edges[:, 3]] * back[:, None]
    sides = _keys(rank, low, edges[:, 3] % 2, shape)
    _, side, count = np.unique(sides, return_inverse=True, return_counts=True)
    once = count[side] == 1
    edges = edges[once]
    return edges[np.argsort(_keys(rank[once], edges[:, 1:3], edges[:, 3], shape))]


def _polygons(edges: Edges, shape: Sequence[int]) -> dict[int, list[list[Ring]]]:
    """The polygons of every object whose edges these are (sorted by key)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers, rank = np.unique(edges[:, 0], return_inverse=True)
    corners = [*map(tuple, edges[:, 1:3].tolist())]
    following = _following(edges, rank, shape).tolist()
    direction = edges[:, 3].tolist()
    ring_of = [-1] * len(edges)
    rings: list[Ring] = []
    owners: list[int] = []
    for first in range(len(edges)):
        if ring_of[first] >= 0:
            continue
        ring, k = [], first
        while ring_of[k] < 0:
            ring_of[k] = len(rings)
            then = following[k]
            if direction[then] != direction[k]:
                ring.append(corners[then])
            k = then
        rings.append(ring[-1:] + ring[:-1])  # its first edge leaves its uppermost, leftmost corner
        owners.append(int(edges[first, 0]))

    # Along a row of pixels upright sides come in pairs, with a run of the object between: both belong to one part of it.
    upright = np.flatnonzero(edges[:, 3] % 2)
    rows = edges[upright, 1] - (edges[upright, 3] == 3)
    upright = upright[np.lexsort((edges[upright, 2], rows, rank[upright]))]
    left, right = np.array(ring_of, np.int64)[upright].reshape(-1, 2).T
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(rings), len(rings)))
    _, part = connected_components(graph, directed=False)
    polygons: dict[int, list[Ring]] = {}
    owner: dict[int, int] = {}
    for ring, p, number in zip(rings, part.tolist(), owners, strict=True):
        owner[p] = number
        polygons.setdefault(p, []).extend(_simple(ring))
    found: dict[int, list[list[Ring]]] = {int(n): [] for n in numbers}
    for p, parts in polygons.items():
        found[owner[p]].append(sorted(parts, key=_turns_left))  # the outer ring, then holes
    return found


def _following(edges: Edges, rank: Ints, shape: Sequence[int]) -> Ints:
    """The edge that goes on from each: the one to the right where two leave a corner, so that parts stay apart there."""
    keys = _keys(rank, edges[:, 1:3], edges[:, 3], shape)
    ends = edges[:, 1:3] + STEP[edges[:, 3]]
    any_way = np.searchsorted(keys, _keys(rank, ends, np.zeros_like(edges[:, 3]), shape))
    wanted = _keys(rank, ends, (edges[:, 3] + 1) % 4, shape)
    to_the_right = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[to_the_right] == wanted, to_the_right, any_way)


def _simple(ring: Ring) -> Iterator[Ring]:
    """The rings that a ring consists of which passes corners twice: holes that open to the outside at a corner."""
    path: Ring = []
    position: dict[tuple[int, int], int] = {}
    for corner in ring:
        if corner in position:
            begin = position[corner]
            yield path[begin:]
            for left in path[begin + 1 :]:
                del position[left]
            del path[begin + 1 :]
        else:
            position[corner] = len(path)
            path.append(corner)
    yield path


def _turns_left(ring: Ring) -> bool:
    """Whether a ring runs against the clock on a screen: a hole."""
    ends = ring[1:] + ring[:1]
    return sum(x * v - u * y for (y, x), (v, u) in zip(ring, ends, strict=True)) < 0
