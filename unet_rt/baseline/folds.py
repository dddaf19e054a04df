"""Several trained folds as one graph: the mean of their probabilities (of their values, for a regression).

Everything after this sees one network: one halo (the largest of the members'), one search, one proof of parity, one engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.compose
import onnx.inliner
from onnx import TensorProto, helper

from ..contract.contract import Contract
from ..contract.metadata import contract_to_metadata
from ..contract.task import first_contract, resolve_task
from ..engine.folder import sha256
from ..errors import ContractError, GraphError
from ..graph.file import LARGEST
from ..graph.passes.outputs import keep_outputs
from ..tiling.grid import square_tile
from .model import Model, baseline_engine, make_folder, open_model
from .results import tile_of
from .samples import draw_generated
from .tiles import untiled_spec

if TYPE_CHECKING:
    from .model import Look

MEMBERS_KEY = "ensemble.members"  # metadata: JSON list of name and SHA-256 of every member
SOFTMAX_OPSET = 13  # before it, Softmax flattens the axes behind its own
LOOK_PX = 256 * 256  # tile area on which a member is run to tell logits from probabilities


def merge(members: Sequence[Model], path: Path) -> None:
    """Writes the graph that averages what its members say, with the members' contract and hashes in its metadata.

    The members share the inputs; of each, the first output counts. Logits pass a softmax over the channels (multi-class)
    or a sigmoid (binary, multi-label) before they are averaged, so the merged graph returns probabilities.

    Args:
        members: Two or more, as :func:`unet_rt.baseline.model.open_model` opens them.
        path: The file to write.

    Raises:
        ContractError: The members do not agree on what goes in and what comes out; the difference is named.
        GraphError: Their graphs cannot be one: operator sets differ, or it would pass 2 GB; one is quantised.
    """
    for member in members:
        if member.quantised:
            raise GraphError(
                f"{member.given.name} is quantised already, and several networks are averaged in FP32; give the FP32 "
                "graph that it was made from, or build it alone"
            )
    contracts = [_settle_contract(member) for member in members]
    for member, contract in zip(members[1:], contracts[1:], strict=True):
        _check_contract(members[0], contracts[0], member, contract)
        _check_graph(members[0], member)
    protos = [onnx.load(str(member.graph)) for member in members]
    for member, proto in zip(members, protos, strict=True):
        keep_outputs(proto, [member.report.outputs[0].name])
    for member, proto in zip(members[1:], protos[1:], strict=True):
        _check_types(members[0], protos[0], member, proto)
        _check_opsets(members[0], protos[0], member, proto)
    size = sum(member.graph.stat().st_size for member in members)
    if size > LARGEST:
        raise GraphError(
            f"{len(members)} networks of {size / 1e9:.2f} GB together pass the {LARGEST / 1e9:.2f} GB that "
            "one ONNX file holds; build fewer of them as one engine"
        )
    contract = contracts[0]
    merged = _join(members, protos, contract)
    values = contract.task == "regression"
    declared = replace(contract, output_is="values" if values else "probabilities")
    digests = [{"name": member.given.name, "sha256": sha256(member.given)} for member in members]
    helper.set_model_props(merged, {**contract_to_metadata(declared), MEMBERS_KEY: json.dumps(digests)})
    onnx.save_model(merged, str(path))


def _settle_contract(member: Model) -> Contract:
    """The first output's contract with task and values decided; where it leaves them open, by a drawn image."""
    report = member.report
    contract = first_contract(member.contract, [output.name for output in report.outputs])
    sample = None
    if contract.task is None or contract.output_is is None:
        spec = untiled_spec(member)
        tile = square_tile(spec.sizes, spec.outputs, LOOK_PX)
        drawn = draw_generated(contract, member.input_specs(), member.spatial, count=1)[0]
        engine = baseline_engine(member, spec)
        try:
            sample = engine.run(tile_of(drawn, spec, tile, 0))[0]
        finally:
            engine.close()
    return resolve_task(contract, report.outputs[0].channels, report.final_ops[0], sample)


def _check_contract(a: Model, contract: Contract, b: Model, other: Contract) -> None:
    here, there = asdict(contract), asdict(other)
    for key in here:
        if key != "value_range" and here[key] != there[key]:
            raise _difference(a, here[key], b, there[key], key.replace("_", " "))


def _check_graph(a: Model, b: Model) -> None:
    def declared(model: Model) -> list[tuple[str, int, str]]:
        return [(i.axes, i.channels, i.dtype) for i in model.input_specs()]

    if declared(a) != declared(b):
        raise _difference(a, declared(a), b, declared(b), "inputs (axes, channels, dtype)")
    one, other = a.report.outputs[0], b.report.outputs[0]
    if (one.axes, one.channels) != (other.axes, other.channels):
        raise _difference(
            a, (one.axes, one.channels), b, (other.axes, other.channels), "output (axes, number of channels)"
        )
    sizes = [tuple((str(f.scale), sum(f.shrink)) for f in output.field) for output in (one, other)]
    if sizes[0] != sizes[1]:
        raise _difference(a, sizes[0], b, sizes[1], "output size (samples per pixel, samples lost, per axis)")


def _check_types(a: Model, proto: onnx.ModelProto, b: Model, other: onnx.ModelProto) -> None:
    here, there = (TensorProto.DataType.Name(_element_type(o)) for o in (proto, other))
    if here != there:
        raise _difference(a, here, b, there, "output (element type)")


def _element_type(proto: onnx.ModelProto) -> int:
    return int(proto.graph.output[0].type.tensor_type.elem_type)


def _difference(a: Model, here: Any, b: Model, there: Any, what: str) -> ContractError:
    return ContractError(
        f"networks of one engine must agree in {what}: {a.given.name} has {here}, {b.given.name} {there}; export them "
        "alike, or declare what holds for all of them"
    )


def _check_opsets(a: Model, proto: onnx.ModelProto, b: Model, other: onnx.ModelProto) -> None:
    here, there = _opsets(proto), _opsets(other)
    if here != there:
        one, two = (", ".join(f"{domain or 'ai.onnx'} {n}" for domain, n in o.items()) for o in (here, there))
        raise GraphError(f"{a.given.name} uses opset {one}, {b.given.name} {two}; export them with the same opset")


def _opsets(proto: onnx.ModelProto) -> dict[str, int]:
    """Versions by domain, of the domains that nodes use."""
    inlined = onnx.inliner.inline_local_functions(proto) if proto.functions else proto
    used = {node.domain for node in inlined.graph.node} | {""}
    return {o.domain: o.version for o in inlined.opset_import if o.domain in used}


def _join(members: Sequence[Model], protos: Sequence[onnx.ModelProto], contract: Contract) -> onnx.ModelProto:
    inputs = _merge_inputs(members)
    first = members[0].report
    nodes, initializers, sparse, value_info, results = [], [], [], [], []
    for k, (member, proto) in enumerate(zip(members, protos, strict=True)):
        prefix = f"member{k}/"
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        graph = onnx.compose.add_prefix(proto, prefix).graph
        names = zip(member.report.inputs, first.inputs, strict=True)
        _rename_inputs(graph, {prefix + own.name: shared.name for own, shared in names})
        nodes += graph.node
        initializers += graph.initializer
        sparse += graph.sparse_initializer
        value_info += graph.value_info
        node = _as_probabilities(prefix, graph.output[0].name, contract, first.outputs[0].axes, _opsets(proto)[""])
        nodes += node
        results.append(node[0].output[0] if node else graph.output[0].name)

    total = results[0]
    for k, result in enumerate(results[1:], 1):
        nodes.append(helper.make_node("Add", [total, result], [f"ensemble/sum{k}"], f"ensemble/sum{k}"))
        total = f"ensemble/sum{k}"
    initializers.append(helper.make_tensor("ensemble/count", _element_type(protos[0]), [], [float(len(members))]))
    output = protos[0].graph.output[0].name
    nodes.append(helper.make_node("Div", [total, "ensemble/count"], [output], "ensemble/mean"))
    graph = helper.make_graph(
        nodes,
        "ensemble",
        inputs,
        [_merge_output(output, protos)],
        initializer=initializers,
        value_info=value_info,
        sparse_initializer=sparse,
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in _opsets(protos[0]).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=max(proto.ir_version for proto in protos))


def _as_probabilities(prefix: str, name: str, contract: Contract, axes: str, opset: int) -> list[onnx.NodeProto]:
    """The node that makes a member's output probabilities; none where it has them, or values."""
    if contract.output_is != "logits":
        return []
    result = f"{prefix}probabilities"
    if contract.task != "multiclass":
        return [helper.make_node("Sigmoid", [name], [result], result)]
    if opset < SOFTMAX_OPSET:
        raise GraphError(
            f"the networks use opset {opset}, whose Softmax takes no single axis; export them with opset "
            f"{SOFTMAX_OPSET} or newer, or with a Softmax at the end"
        )
    return [helper.make_node("Softmax", [name], [result], result, axis=axes.index("C"))]


def _merge_inputs(members: Sequence[Model]) -> list[onnx.ValueInfoProto]:
    """The inputs of all: of one size where any member has one size only."""
    found = []
    for k, shared in enumerate(members[0].report.inputs):
        shape: list[int | str] = []
        for j, axis in enumerate(shared.axes):
            sizes = {member.report.inputs[k].shape[j]: member for member in members}
            sizes.pop(None, None)
            if len(sizes) > 1:
                (here, a), (there, b), *_ = sizes.items()
                raise GraphError(
                    f"{a.given.name} takes {here} along {axis}, {b.given.name} {there}, and neither can be changed; "
                    "export them with the same size"
                )
            fixed = next(iter(sizes), None)
            shape.append(f"{shared.name}_{axis}" if fixed is None else fixed)
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(shared.dtype))
        found.append(helper.make_tensor_value_info(shared.name, dtype, shape))
    return found


def _merge_output(name: str, protos: Sequence[onnx.ModelProto]) -> onnx.ValueInfoProto:
    shapes = [[d.dim_value or None for d in p.graph.output[0].type.tensor_type.shape.dim] for p in protos]
    shape = [dims[0] if len(set(dims)) == 1 else None for dims in zip(*shapes, strict=True)]
    known = [f"{name}_{k}" if n is None else n for k, n in enumerate(shape)]
    return helper.make_tensor_value_info(name, _element_type(protos[0]), known)


def _rename_inputs(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Has nodes, those of subgraphs included, take other tensors."""
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = names.get(name, name)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _rename_inputs(inner, names)


def open_models(
    paths: Sequence[Path],
    work: Path,
    *,
    options: Contract | None = None,
    contract: Path | None = None,
    look: Look | None = None,
) -> Model:
    """Opens one network, or several (the folds of a cross-validation) as the mean of what they say.

    Arguments and errors are those of :func:`open_model` (``look`` is at the first network); networks that do not agree are
    a ContractError or GraphError.
    """
    if len(paths) == 1:
        return open_model(paths[0], work, options=options, contract=contract, look=look)

    members = [
        open_model(path, make_folder(work / f"member{k}"), options=options, contract=contract, look=None if k else look)
        for k, path in enumerate(paths)
    ]
    merged = work / "ensemble.onnx"
    merge(members, merged)
    # Its metadata hold what options and contract say of the members.
    opened = open_model(merged, work)
    others = members[0].report.outputs[1:]
    left_out = (
        *members[0].left_out,
        *(f"output {o.name} is left out: folds are averaged in the first" for o in others),
    )
    return replace(opened, left_out=left_out, members=tuple(member.given.name for member in members))
