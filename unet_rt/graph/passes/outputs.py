"""Outputs that nobody will ask for, taken out of a graph with the nodes and weights that only they need.

A segmentation network with a classifier beside it returns an image and a few numbers; the numbers are none of a tiler's
business, and the global pooling on their way would keep the graph from every other size.

Cases: any outputs of the graph, nodes inside branches among what they need; everything else is left alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..file import nodes_behind
from .fold import drop_unused

if TYPE_CHECKING:
    import onnx


def keep_outputs(model: onnx.ModelProto, names: Collection[str]) -> int:
    """Rewrites ``model`` in place to return these outputs alone; returns the number of nodes that went (0: none)."""
    for k in reversed(range(len(model.graph.output))):
        if model.graph.output[k].name not in names:
            del model.graph.output[k]
    kept = nodes_behind(list(model.graph.node), names)
    gone = [k for k in range(len(model.graph.node)) if k not in kept]
    for k in reversed(gone):
        del model.graph.node[k]
    if gone and not any(a.type in (a.GRAPH, a.GRAPHS) for node in model.graph.node for a in node.attribute):
        drop_unused(model)  # which does not look into branches
    return len(gone)
