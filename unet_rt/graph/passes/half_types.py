"""What ONNX defines for the half types: operators, opsets, and what stays float32 in any case."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import onnx


HalfType = Literal["fp16", "bf16"]


# Reductions whose result grows with the number of samples: a sum over a map of 256 x 256 leaves float16 at a mean of 1.
SUMMING = frozenset({"CumSum", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceSum", "ReduceSumSquare"})


# Inputs that stay float32 although ONNX would allow a half type, by operator.
FLOAT_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}


QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})


# Other domains have no definitions to ask; these operators compute in one type, that of their first input.
OTHER_DOMAINS = frozenset({"FusedConv", "NhwcConv", "NhwcFusedConv", "NhwcMaxPool", "CropConcat"})


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operator set that a graph is written in."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)


def schema_of(node: onnx.NodeProto, opset: int) -> Any:
    """ONNX's definition of an operator, None for those of other domains."""
    from onnx import defs

    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        return defs.get_schema(node.op_type, opset, "")
    except defs.SchemaError:
        return None


def types_of(schema: Any, index: int, *, output: bool = False) -> tuple[str, frozenset[str]]:
    """Type variable of an input or output, and the types that it may have."""
    formals = schema.outputs if output else schema.inputs
    formal = formals[min(index, len(formals) - 1)]  # the last may be variadic
    return formal.type_str, frozenset(formal.types)


def lift_opset(model: onnx.ModelProto, to: HalfType) -> None:
    """Raises the opset to the lowest that defines all of the graph's operators for the half type, where there is one."""
    from onnx import defs, version_converter

    opset, wanted = opset_of(model), f"tensor({TYPE_NAMES[to]})"
    needed = opset
    for op in {node.op_type for node in model.graph.node if node.domain in ("", "ai.onnx")}:
        position = 1 if op in QDQ else 0  # the scale
        for version in range(opset, defs.onnx_opset_version() + 1):
            try:
                schema = defs.get_schema(op, version, "")
            except defs.SchemaError:
                break
            if len(schema.inputs) <= position:
                break
            allowed = types_of(schema, position)[1]
            if "tensor(float)" not in allowed:
                break
            if wanted in allowed:
                needed = max(needed, version)
                break
    if needed == opset:
        return
    try:
        lifted = version_converter.convert_version(model, needed)
    except (RuntimeError, ValueError):
        return  # no converter for one of the operators: nodes without the half type become islands
    kept = {p.key: p.value for p in model.metadata_props}
    model.CopyFrom(lifted)
    for key, value in kept.items():
        if key not in {p.key for p in model.metadata_props}:
            model.metadata_props.add(key=key, value=value)


TYPE_NAMES = {"fp16": "float16", "bf16": "bfloat16"}
