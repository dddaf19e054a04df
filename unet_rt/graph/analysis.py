"""The analysis of a graph: for each output its stride, halo and exactness, and the sizes it takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from ..errors import GraphError
from ..tiling.field import OutputField, TileSizes
from .file import Graph, read_graph, restrict
from .layout import input_axes, layout, spatial_letters
from .line import LONGEST
from .passes.free_crops import free_crops
from .passes.free_sizes import free_sizes
from .rounding import NO_ROUNDING, Rounding
from .sizes import Search
from .tensor import Walk
from .walk import walk

# ------------------------------------------------------------------------------------------------------------ analysis


@dataclass(frozen=True)
class Analysis:
    """Everything that the walks tell.

    ``given`` is the whole graph, ``graph`` that of ``outputs``: those that are images, where any are; ``others`` are not.
    ``letters`` are the axes of each input, ``channels`` its channel count, ``declared`` the spatial sizes in the file,
    ``limits`` what the outputs are exact up to, and why, ``rounding`` what float32 rounds.
    """

    given: Graph
    graph: Graph
    letters: Mapping[str, str]
    channels: Mapping[str, int]
    declared: tuple[int | None, ...]
    outputs: tuple[OutputField, ...]
    sizes: tuple[TileSizes, ...]
    batch: int | None
    density: float
    freed: tuple[str, ...]
    reasons_fixed: tuple[str, ...]
    global_pools: frozenset[str]
    others: tuple[OutputField, ...] = ()
    limits: tuple[str, ...] = ()
    rounding: Rounding = NO_ROUNDING

    @property
    def exported(self) -> tuple[int, ...]:
        """The size that was exported at, per spatial axis, and one to try where none is declared."""
        return tuple(size or tile.at_least(64) for size, tile in zip(self.declared, self.sizes, strict=True))

    def walk(self, sizes: Sequence[int], batch: int = 1) -> Walk:
        given = input_axes(self.graph, self.letters, self.channels, tuple(sizes), batch)
        return walk(self.graph, given, tuple(sizes), self.global_pools)


def analyse_model(
    model: onnx.ModelProto, folder: str | os.PathLike[str] | None = None
) -> tuple[Analysis, onnx.ModelProto]:
    """The analysis of a model, and the model it is of: that given, or a copy whose nodes follow the size of the image.

    The copy is taken where it is exact and the model, whose nodes hold the size of its export, is not.
    """
    analysis = analyse(read_graph(model, folder))
    if all(size is None for size in analysis.declared) or all(output.exact for output in analysis.outputs):
        return analysis, model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = {} if model.functions else analysis.walk(analysis.exported, analysis.batch or 1).tensors
    if not free_sizes(copy, tensors) + free_crops(copy):
        return analysis, model
    candidate = analyse(read_graph(copy, folder))
    return (candidate, copy) if all(output.exact for output in candidate.outputs) else (analysis, model)


def analyse(graph: Graph) -> Analysis:
    """Find stride, accepted sizes and fields of a graph.

    Outputs that are no images (a class, a few numbers) have no say in which sizes the others accept.
    """
    found = _analyse(graph)
    spatial = len(found.declared)
    images = [value for value, o in zip(graph.outputs, found.outputs, strict=True) if len(o.field) == spatial]
    if not images or len(images) == len(graph.outputs):
        return found
    others = tuple(o for o in found.outputs if len(o.field) != spatial)
    return replace(_analyse(restrict(graph, images)), given=graph, others=others)


def _search(
    graph: Graph,
    letters: Mapping[str, str],
    channels: Mapping[str, int],
    declared: tuple[int | None, ...],
    batch: int,
) -> Search:
    """The sizes and fields of a graph; for all sizes where the declared one alone is not as others are.

    An encoder makes 17 samples of 65 px, and a quarter of all multiples of 4.
    """
    search = Search(graph, letters, channels, declared, batch)
    search.find_sizes()
    fixed = tuple(n for n in declared if n is not None)
    if not search.lawful and len(fixed) == len(declared) and not search.at(fixed).broken:
        free = Search(graph, letters, channels, (None,) * len(declared), batch, search.global_pools)
        free.find_sizes()
        if free.lawful:
            free.find_fields()
            if all(o.exact for o in free.outputs):
                return free
    search.find_fields()
    return search


def _analyse(graph: Graph) -> Analysis:
    letters, channels = {}, {}
    for value in graph.inputs:
        letters[value.name], channels[value.name] = layout(graph, value)
    image = next((v for v in graph.inputs if spatial_letters(letters[v.name])), None)
    if image is None:
        shapes = ", ".join(f"{v.name} {list(v.shape or ())}" for v in graph.inputs)
        raise GraphError(f"no input of the graph has spatial axes ({shapes}); a network for images takes e.g. NCYX")
    axes = spatial_letters(letters[image.name])
    dims = dict(zip(letters[image.name], image.shape or (None,) * len(letters[image.name]), strict=True))
    declared = tuple(dims[a] for a in axes)
    for axis, size in zip(axes, declared, strict=True):
        if size is not None and size > LONGEST:
            raise GraphError(f"input {image.name} declares {size} px along {axis}, beyond any image; export it again")
    batch = dims.get("N")
    search = _search(graph, letters, channels, declared, batch or 1)
    sizes = tuple(
        TileSizes(s, r, m) for s, r, m in zip(search.strides, search.remainders, search.minimum(), strict=True)
    )
    outputs = tuple(search.outputs)
    limits = []
    for k, bound in enumerate(search.exact_up_to()):
        if bound is not None and all(o.exact for o in outputs):
            sizes = (*sizes[:k], replace(sizes[k], exact_up_to=bound.high), *sizes[k + 1 :])
            limits.append(f"{axes[k]} up to {bound.high} px: above, {bound.node[1]} computes something else")
    freed, reasons = [], []
    at_fault = list(dict.fromkeys(r for o in outputs for r in o.reasons))
    for k, (axis, size) in enumerate(zip(axes, declared, strict=True)):
        if size is None:
            continue
        if all(o.exact for o in outputs) and (sizes[k].accepts(size) or search.declared != declared):
            freed.append(f"{axis} ({size} px)")
            continue
        why = at_fault[0] if at_fault else f"{size} px is not among the sizes that the graph runs at"
        reasons.append(f"{axis} is fixed to {size} px: {why}")
        one = sizes[k]
        sizes = (*sizes[:k], TileSizes(one.stride, size % one.stride, size, size), *sizes[k + 1 :])
    return Analysis(
        graph,
        graph,
        letters,
        channels,
        declared,
        outputs,
        sizes,
        batch,
        search.density,
        tuple(freed),
        tuple(reasons),
        search.global_pools,
        limits=tuple(limits),
        rounding=search.rounding,
    )
