"""Weights that a file lists among its inputs, taken off them.

``keep_initializers_as_inputs`` and files of IR version 3 declare every weight as an input with a default. A library then
has to expect other weights at every run, and folds and fuses nothing.

Cases: inputs that an initialiser has the name of; everything else is left alone. IR versions below 4 demand them, so that
the version rises to 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

LEAST_IR = 4  # where initialisers need be no inputs


def take_weights_off(model: onnx.ModelProto) -> int:
    """Rewrites ``model`` in place; returns the number of inputs that went (0 when called again)."""
    graph = model.graph
    weights = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    gone = [k for k, value in enumerate(graph.input) if value.name in weights]
    for k in reversed(gone):
        del graph.input[k]
    if gone:
        model.ir_version = max(model.ir_version, LEAST_IR)
    return len(gone)
