"""Fixed sizes of a graph made free, where that is provably the same network.

Exporters write the size of their example image into the graph. Often nothing but the declaration is fixed; sometimes a
baked ``interpolate(size=...)`` or pooling kernel survives and silently computes something else at other sizes. So the
declaration goes only if the walks at three sizes agree, and, where a backend is at hand, if the freed graph on a larger
canvas gives the same numbers. Baked sizes are first written so that they follow the image, where that can be
(``passes/free_sizes``, ``passes/free_crops``); what was written so must give the same bits at the size of the export.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import UnetRtError, first_line
from ..tiling.field import OutputField
from .analysis import Analysis, analyse_model
from .file import Value
from .layout import free_export

Array = NDArray[Any]
Run = Callable[[onnx.ModelProto, Sequence[Array]], Sequence[Array]]

_INPUT_DTYPES = {
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    10: np.float16,
    11: np.float64,
}


def free_spatial(model: onnx.ModelProto, run: Run | None = None) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Free the spatial sizes and the batch size of a graph as far as that is provable.

    Args:
        model: The model, with its weights. It is not changed.
        run: Runs a model once on a list of inputs (NumPy arrays in graph-input order) and gives its outputs; without
            it sizes are freed by analysis alone, and the batch size stays.

    Returns:
        The freed model (``model`` itself if nothing was freed), and why other sizes stay fixed.

    Raises:
        GraphError: The graph cannot be read.
    """
    analysis, source = analyse_model(model)  # source: what loses its sizes
    reasons = list(analysis.reasons_fixed)
    spatial = [
        axis
        for axis, declared, accepted in zip(_axes(analysis), analysis.declared, analysis.sizes, strict=True)
        if declared is not None and accepted.fixed is None
    ]
    result = model
    if spatial:
        freed = _declare_free(source, analysis, spatial)
        why = "" if run is None else _differs(model, source, freed, analysis, spatial, run)
        if why:
            reasons += [f"{axis} is fixed: {why}; {free_export(analysis.letters)}" for axis in spatial]
        else:
            result = freed
    if analysis.batch is not None:
        why = _batch_is_bound(analysis)
        if not why and run is None:
            why = "no backend is at hand to prove that rows do not mix"
        if not why and run is not None:
            freed = _declare_free(result, analysis, ["N"])
            why = _differs_in_batch(model, freed, analysis, run)
            result = result if why else freed
        if why:
            reasons.append(f"N is fixed to {analysis.batch}: {why}")
    return result, tuple(reasons)


def _axes(analysis: Analysis) -> str:
    letters = next(x for x in analysis.letters.values() if any(a in "ZYX" for a in x))
    return "".join(a for a in letters if a in "ZYX")


def _declare_free(model: onnx.ModelProto, analysis: Analysis, axes: Sequence[str]) -> onnx.ModelProto:
    """A copy of the model whose inputs and outputs declare ``axes`` free."""
    freed = onnx.ModelProto()
    freed.CopyFrom(model)
    del freed.graph.value_info[:]
    letters = {**analysis.letters, **{o.name: o.axes for o in analysis.outputs}}
    inputs = {v.name for v in analysis.graph.inputs}
    for value in [*freed.graph.input, *freed.graph.output]:
        own = letters.get(value.name)
        shape = value.type.tensor_type.shape
        if own is None or len(own) != len(shape.dim):
            continue
        for letter, dim in zip(own, shape.dim, strict=True):
            if letter in axes:
                # Outputs may have another scale: names of their own.
                dim.dim_param = letter if value.name in inputs or letter == "N" else f"{value.name}_{letter}"
    return freed


def _batch_is_bound(analysis: Analysis) -> str:
    """Why the graph does not run at twice its batch size; empty if it does."""
    batch = analysis.batch or 1
    state = analysis.walk(analysis.exported, 2 * batch)
    if state.broken:
        return f"with {2 * batch} rows, {state.broken[0]}"
    for output in analysis.outputs:
        tensor = state.tensors[output.name]
        if tensor.axes is None or not output.axes.startswith("N") or tensor.shape[0] != 2 * batch:
            return f"output '{output.name}' does not follow the number of rows"
    return ""


def _texture(value: Value, letters: str, sizes: dict[str, int], seed: int) -> Array:
    """Pixels with structure at several scales; dtype and shape as the input wants them."""
    shape = tuple(sizes.get(a) or n or 1 for a, n in zip(letters, value.shape or (), strict=True))
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 0.5, shape)
    for k, letter in enumerate(letters):
        if letter in "ZYX":
            image = np.cumsum(image, axis=k) / np.sqrt(np.arange(1, shape[k] + 1)).reshape(
                [-1] + [1] * (len(shape) - k - 1)
            )
    image = (image - image.mean()) / max(float(image.std()), 1e-6) + rng.normal(0, 0.3, shape)
    dtype = _INPUT_DTYPES.get(value.dtype, np.float32)
    if np.issubdtype(dtype, np.integer):
        image = np.clip(64 + 32 * image, 0, 127)
    return np.asarray(image, dtype=dtype)


def _inputs(analysis: Analysis, sizes: dict[str, int], seed: int) -> list[Array]:
    result = []
    for k, value in enumerate(analysis.graph.inputs):
        own = {**sizes, "C": analysis.channels[value.name]}
        result.append(_texture(value, analysis.letters[value.name], own, seed + k))
    return result


def _differs(
    model: onnx.ModelProto,
    source: onnx.ModelProto,
    freed: onnx.ModelProto,
    analysis: Analysis,
    axes: Sequence[str],
    run: Run,
) -> str:
    """Why the freed graph is not the original, as far as numbers can tell; empty if it is."""
    tile = analysis.exported
    if source is not model:
        images = _inputs(analysis, {"N": analysis.batch or 1, **dict(zip(_axes(analysis), tile, strict=True))}, 0)
        for output, a, b in zip(analysis.outputs, run(model, images), run(source, images), strict=True):
            if not np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.floating)):
                return f"written so that its sizes follow the image, output '{output.name}' has other bits at {tile} px"
    try:
        why, proven = "", False
        if all(sizes.accepts(n) for sizes, n in zip(analysis.sizes, tile, strict=True)):
            why, proven = _differs_in_space(model, freed, analysis, axes, run)
        return why or ("" if proven else _differs_beyond(model, freed, analysis, axes, run))
    except (UnetRtError, RuntimeError, ValueError) as error:
        return f"the graph does not run at other sizes: {first_line(error)}"


def _differs_in_space(
    model: onnx.ModelProto, freed: onnx.ModelProto, analysis: Analysis, axes: Sequence[str], run: Run
) -> tuple[str, bool]:
    """Why the freed graph on a canvas of twice the size is not the original at its own size; empty if it is.

    And whether something of every output was compared: halos as large as the tile leave nothing.
    """
    names = _axes(analysis)
    tile = analysis.exported
    canvas = [
        t.at_most(t.at_least(2 * n)) if a in axes else n for a, n, t in zip(names, tile, analysis.sizes, strict=True)
    ]
    images = _inputs(analysis, {"N": analysis.batch or 1, **dict(zip(names, canvas, strict=True))}, 0)
    whole = run(freed, images)
    compared = [0] * len(whole)
    for where in ("low", "middle", "high"):
        origin = []
        for n, c, t in zip(tile, canvas, analysis.sizes, strict=True):
            middle = (c - n) // 2 // t.stride * t.stride
            origin.append({"low": 0, "middle": middle, "high": c - n}[where])
        given = run(model, _cut(analysis, images, origin, tile))
        for k, (output, small, large) in enumerate(zip(analysis.outputs, given, whole, strict=True)):
            a, b = _cores(output, names, small, large, origin, tile, canvas)
            compared[k] += a.size
            if why := _unequal(a, b, analysis.rounding.bound(canvas)):
                return f"at {canvas} px output '{output.name}' {why}", False
    return "", all(compared)


def _differs_beyond(
    model: onnx.ModelProto, freed: onnx.ModelProto, analysis: Analysis, axes: Sequence[str], run: Run
) -> str:
    """Why a freed graph is not the original, where that is no tile of it that keeps anything; empty if it is.

    It is the original at its own size, and along each axis tiles that are large enough to keep something are the whole: the
    walks have shown of every node that no size is baked into it, and this shows that they are right.
    """
    names, tile = _axes(analysis), analysis.exported
    images = _inputs(analysis, {"N": analysis.batch or 1, **dict(zip(names, tile, strict=True))}, 0)
    for output, a, b in zip(analysis.outputs, run(model, images), run(freed, images), strict=True):
        if why := _unequal(a, b, analysis.rounding.bound(tile)):
            return f"at {tile} px output '{output.name}' {why}"
    for k, sizes in ((names.index(a), analysis.sizes[names.index(a)]) for a in axes):
        edges = max(
            math.ceil((sum(o.field[k].halo) + sum(o.field[k].shrink)) / o.field[k].scale) for o in analysis.outputs
        )
        long, canvas = list(tile), list(tile)
        long[k] = sizes.at_least(edges + 2 * sizes.stride)
        canvas[k] = long[k] + 3 * sizes.stride
        if not sizes.accepts(canvas[k]):
            return f"its halo leaves nothing of tiles up to {sizes.at_most(canvas[k])} px that could prove other sizes"
        images = _inputs(analysis, {"N": analysis.batch or 1, **dict(zip(names, canvas, strict=True))}, 0)
        whole = run(freed, images)
        for place in (0, canvas[k] - long[k]):
            origin = [place if axis == k else 0 for axis in range(len(names))]
            given = run(freed, _cut(analysis, images, origin, long))
            for output, small, large in zip(analysis.outputs, given, whole, strict=True):
                a, b = _cores(output, names, small, large, origin, long, canvas)
                why = _unequal(a, b, analysis.rounding.bound(canvas)) if a.size else "keeps nothing of a tile"
                if why:
                    return f"at {canvas} px output '{output.name}' {why}"
    return ""


def _cut(analysis: Analysis, images: Sequence[Array], origin: Sequence[int], tile: Sequence[int]) -> list[Array]:
    """A tile of every input."""
    names = _axes(analysis)
    return [
        np.ascontiguousarray(image[_window(analysis.letters[v.name], names, origin, tile)])
        for image, v in zip(images, analysis.graph.inputs, strict=True)
    ]


def _window(letters: str, names: str, origin: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    spans = {a: slice(o, o + n) for a, o, n in zip(names, origin, size, strict=True)}
    return tuple(spans.get(a, slice(None)) for a in letters)


def _cores(
    output: OutputField,
    names: str,
    small: Array,
    large: Array,
    origin: Sequence[int],
    tile: Sequence[int],
    canvas: Sequence[int],
) -> tuple[Array, Array]:
    """What the tile and the canvas have in common, without the halo at inner edges."""
    inner, outer = [slice(None)] * small.ndim, [slice(None)] * large.ndim
    fields = iter(output.field)
    for k, letter in enumerate(output.axes):
        if letter not in names:
            continue
        f, axis = next(fields), names.index(letter)
        start = f.halo[0] if origin[axis] > 0 else 0
        stop = small.shape[k] - (f.halo[1] if origin[axis] + tile[axis] < canvas[axis] else 0)
        shift = int(origin[axis] * f.scale)
        inner[k] = slice(start, max(start, stop))
        outer[k] = slice(start + shift, max(start, stop) + shift)
    return small[tuple(inner)], large[tuple(outer)]


def _unequal(a: Array, b: Array, rounding: float) -> str:
    if a.shape != b.shape:
        return f"has the shape {list(b.shape)} where {list(a.shape)} is due"
    if not a.size:
        return ""
    if np.issubdtype(a.dtype, np.integer) or a.dtype == np.bool_:
        share = float((a != b).mean())
        return f"differs in {share:.2%} of its labels" if share > 1e-3 else ""
    bound = rounding * max(float(np.abs(a).max()), float(np.finfo(np.float32).tiny))
    error = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    return f"differs by {error:.3g} (allowed: {bound:.3g})" if not error <= bound else ""


def _differs_in_batch(model: onnx.ModelProto, freed: onnx.ModelProto, analysis: Analysis, run: Run) -> str:
    """Why two different rows at once are not each row alone; empty if they are."""
    names, batch = _axes(analysis), analysis.batch or 1
    tile = analysis.exported
    sizes = {"N": 1, **dict(zip(names, tile, strict=True))}
    rows = [_inputs(analysis, sizes, seed) for seed in (0, 1000)]
    axis = [letters.find("N") for letters in analysis.letters.values()]
    both = [np.concatenate([p, q], k) if k >= 0 else p for p, q, k in zip(*rows, axis, strict=True)]
    try:
        together = run(freed, both)
    except (UnetRtError, RuntimeError, ValueError) as error:
        return f"the graph does not run with 2 rows: {first_line(error)}"
    for r, row in enumerate(rows):
        repeated = [np.concatenate([p] * batch, k) if k >= 0 else p for p, k in zip(row, axis, strict=True)]
        alone = run(model, repeated)
        for output, one, two in zip(analysis.outputs, alone, together, strict=True):
            if two.shape[0] != 2:
                return f"output '{output.name}' gives {two.shape[0]} rows for 2"
            if why := _unequal(one[:1], two[r : r + 1], analysis.rounding.bound(tile)):
                return f"beside another row, output '{output.name}' {why}"
    return ""
