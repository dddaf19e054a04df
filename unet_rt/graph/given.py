"""A file as other tools write it, brought to the form that the rest works with: values at its ends, images out.

What is rewritten never changes an answer: see the passes. Precision is another matter (``passes/widen.py``).
"""

from __future__ import annotations

import os

import onnx

from ..errors import GraphError
from .analysis import Analysis, analyse
from .file import read_graph
from .layout import input_axes
from .passes.inputs import take_weights_off
from .passes.pixels import give_images
from .passes.values import give_values, label_nodes
from .tensor import Walk
from .walk import walk

_WALKED_PX = 64


def settle(
    model: onnx.ModelProto, folder: str | os.PathLike[str] | None = None
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A model in the form that the rest works with, and what was rewritten, in sentences.

    Args:
        model: The model; it stays as it is.
        folder: Where its external data lies.

    Returns:
        The model itself where nothing had to be rewritten, a copy otherwise.
    """
    done = list[str]()
    weights = {t.name for t in model.graph.initializer}
    if any(value.name in weights for value in model.graph.input):
        model = _copy(model)
        count = take_weights_off(model)
        done.append(f"{count} weights that were listed among the inputs are none")
    if not label_nodes(model) and not _may_list_pixels(model):
        return model, tuple(done)
    try:
        analysis, state = _walk(model, folder)
    except GraphError:
        return model, tuple(done)  # whoever asks next says what is wrong with it
    copy = _copy(model)
    here = give_values(copy, state.tensors)
    fixed = all(size is not None for size in analysis.declared)
    here += give_images(copy, state.tensors, fixed)
    return (copy, (*done, *here)) if here else (model, tuple(done))


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _may_list_pixels(model: onnx.ModelProto) -> bool:
    """Whether an output is declared with fewer axes than the input; where nothing is declared, it may be."""
    ranks = [
        [len(v.type.tensor_type.shape.dim) if v.type.tensor_type.HasField("shape") else None for v in values]
        for values in (model.graph.input, model.graph.output)
    ]
    largest = max((n for n in ranks[0] if n is not None), default=0)
    return any(n is None or n < largest for n in ranks[1])


def _walk(model: onnx.ModelProto, folder: str | os.PathLike[str] | None) -> tuple[Analysis, Walk]:
    """What is known of every tensor, at sizes of which no two are alike where the model allows it."""
    analysis = analyse(read_graph(model, folder))
    sizes = tuple(
        declared or accepted.at_least(_WALKED_PX) + k * accepted.stride
        for k, (declared, accepted) in enumerate(zip(analysis.declared, analysis.sizes, strict=True))
    )
    given = input_axes(analysis.given, analysis.letters, analysis.channels, sizes, analysis.batch or 1)
    return analysis, walk(analysis.given, given, sizes, analysis.global_pools)
