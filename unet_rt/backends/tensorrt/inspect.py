"""In which precision convolutions run: as the network asks for it, and as the built engine tells.

Both are read because neither suffices. A network of explicit types says what must be; builders have been seen to ignore
what was asked without a word. What an engine tells of a fused layer is the types of its inputs, outputs and weights.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...errors import BackendError

# How the libraries name element types: "Half", "Row major linear FP16 format", "... vectorized row major Int8 format".
_TYPES = {
    "fp32": re.compile(r"\b(Float|FP32)\b"),
    "fp16": re.compile(r"\b(Half|FP16)\b", re.IGNORECASE),
    "bf16": re.compile(r"\b(BFloat16|BF16)\b", re.IGNORECASE),
    "int8": re.compile(r"\bINT8\b", re.IGNORECASE),
}
_PROFILE = re.compile(r" \[profile \d+\]$")  # of layers that exist once per profile
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def network_convolutions(trt: Any, network: Any) -> dict[str, str]:
    """Precision of every convolution of a parsed network, by the name of its ONNX node.

    ``int8``: its weights are dequantised just before it, which the builder fuses into a convolution of int8.
    """
    kinds = {trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION}
    types = {trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}
    dequantised, found = set(), {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.DEQUANTIZE:
            dequantised.add(layer.get_output(0).name)
        if layer.type in kinds:
            read = layer.get_input(0)
            # Weights tell: pixels may come through layers that only move them.
            given = [layer.get_input(k) for k in range(layer.num_inputs)]  # None: weights that the layer holds itself
            quantised = any(tensor is not None and tensor.name in dequantised for tensor in given)
            found[_node(layer)] = "int8" if quantised else types.get(read.dtype, str(read.dtype))
    return found


def node_names(network: Any) -> frozenset[str]:
    """The ONNX nodes that a parsed network's layers came from."""
    return frozenset(_node(network.get_layer(index)) for index in range(network.num_layers))


def _node(layer: Any) -> str:
    named = _ONNX_LAYER.search(getattr(layer, "metadata", "") or "")
    return named.group(1) if named else str(layer.name)


def engine_convolutions(text: str, convolutions: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Element types that the engine's layers tell for ``convolutions``; none where a layer says nothing.

    Args:
        text: The engine inspector's JSON, built with detailed verbosity.
        convolutions: Those of the network, by node name.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise BackendError(
            f"the engine's description of itself is not JSON ({error}), so its precision is not known; report this"
        ) from error
    layers = document.get("Layers", []) if isinstance(document, dict) else document
    found: dict[str, frozenset[str]] = dict.fromkeys(convolutions, frozenset())
    for layer in layers:
        if not isinstance(layer, dict):  # names alone: the engine was built without details
            continue
        for name in _nodes(layer, convolutions):
            found[name] |= _layer_types(layer)
    return found


def _nodes(layer: Mapping[str, Any], convolutions: Mapping[str, str]) -> list[str]:
    """Convolutions that a layer of the engine holds: by its metadata, or by its name where it has none."""
    names = _ONNX_LAYER.findall(str(layer.get("Metadata", "")))
    if not names:
        names = [part.strip() for part in _PROFILE.sub("", str(layer.get("Name", ""))).split(" + ")]
    return [name for name in dict.fromkeys(names) if name in convolutions]


def _layer_types(layer: Mapping[str, Any]) -> frozenset[str]:
    tensors = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
    texts = [str(tensor.get("Format/Datatype", "")) for tensor in tensors if isinstance(tensor, dict)]
    weights = layer.get("Weights")
    if isinstance(weights, dict):
        texts.append(str(weights.get("Type", "")))
    return frozenset(label for label, pattern in _TYPES.items() if any(pattern.search(text) for text in texts))


def check_network(convolutions: Mapping[str, str], precision: str, islands: frozenset[str] = frozenset()) -> None:
    """Holds the parsed network against the precision asked.

    Args:
        convolutions: From :func:`network_convolutions`.
        precision: What was asked.
        islands: Nodes that the graph keeps in FP32 on purpose.

    Raises:
        BackendError: A layer of another precision, or none of the one asked.
    """
    if not convolutions:
        return
    allowed = {"fp32": {"fp32"}, "fp16": {"fp16"}, "bf16": {"bf16"}, "int8": {"int8", "fp16", "bf16", "fp32"}}[
        precision
    ]
    strays = {name: found for name, found in convolutions.items() if found not in allowed and name not in islands}
    if strays:
        name, found = next(iter(strays.items()))
        raise BackendError(
            f"{precision} was asked, and {len(strays)} of {len(convolutions)} convolutions would run in another "
            f"precision (first: {name} in {found}); build with --precision {found}, or give the FP32 graph"
        )
    if precision not in convolutions.values():
        raise BackendError(
            f"{precision} was asked, and none of {len(convolutions)} convolutions would run in it; "
            "calibrate the graph first, or build with --precision fp16"
        )


def check_engine(
    found: Mapping[str, frozenset[str]], convolutions: Mapping[str, str], precision: str
) -> dict[str, int]:
    """Holds the built engine against what the network asked for, layer by layer.

    Returns:
        How many convolutions run in which precision; ``unread``: the engine tells nothing of them.

    Raises:
        BackendError: A layer that shows no trace of its precision, or an INT8 engine without INT8.
    """
    counts: Counter[str] = Counter()
    strays = {}
    for name, wanted in convolutions.items():
        types = found.get(name, frozenset())
        if not types:
            counts["unread"] += 1
        elif wanted in types:
            counts[wanted] += 1
        elif wanted == "int8" and types & {"fp16", "bf16"}:
            counts["fp16" if "fp16" in types else "bf16"] += 1  # allowed: a layer without an INT8 kernel
        else:
            strays[name] = "/".join(sorted(types))
    if strays:
        name, types_text = next(iter(strays.items()))
        raise BackendError(
            f"{precision} was asked, and the engine runs {len(strays)} of {len(convolutions)} convolutions in another "
            f"precision (first: {name}, asked {convolutions[name]}, runs in {types_text}); "
            "build with --precision fp32, or report this with the library's version"
        )
    if precision == "int8" and not counts["int8"] and counts["unread"] < len(convolutions):
        raise BackendError(
            f"int8 was asked, and the engine runs none of {len(convolutions)} convolutions in it; "
            "build with --precision fp16"
        )
    return dict(counts)
