"""A model as the model line sees it: the ONNX file as given, its graph with sizes freed, its contract, its spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..contract.contract import Contract, Normalization
from ..contract.words import format_normalization
from ..engine.engine import Engine
from ..engine.spec import EngineSpec, InputSpec
from ..errors import BackendError, ContractError, GraphError
from ..images.levels import um_text
from .runner import baseline_name, baseline_runner

if TYPE_CHECKING:
    import onnx

    from ..graph.report import GraphReport

    Look = Callable[[GraphReport, Contract], None]  # at a model and what is declared of it, before anything is run

LABEL_OPS = (  # last operators whose results are decisions already
    "ArgMax", "ArgMin", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Xor", "Not",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """An opened model.

    Attributes:
        given: The ONNX file as given; a copy with its weights inside where they lay in files beside it.
        graph: FP32 graph (quantised, where the file is) with free spatial sizes and batch where that is provably the same
            network.
        report: What ``inspect`` says of ``graph``.
        contract: Options over contract file over the model's metadata; task and thresholds not yet resolved.
        freed: What was made free.
        fixed: Why something could not be.
        left_out: Outputs of the file that ``graph`` does not have, each with the reason, in a sentence.
        members: Names of the networks that are averaged, where there are several.
        rewritten: What of the file was brought to another form, in sentences.
        precision: What the file computes in. Of ``fp16`` and ``bf16`` the graph is widened to FP32; ``int8`` (quantised
            by another tool) runs as given.
        own: The file's own arithmetic, its sizes as free as those of ``graph``, where that was widened.
    """

    given: Path
    graph: Path
    report: GraphReport
    contract: Contract
    freed: tuple[str, ...]
    fixed: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    precision: str = "fp32"
    own: Path | None = None

    @property
    def quantised(self) -> bool:
        """Whether the file is quantised already: then it is its own baseline."""
        return self.precision == "int8"

    @property
    def exact(self) -> bool:
        """Whether tiles of the network equal the whole image."""
        return all(o.exact for o in self.report.outputs)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why they do not, of all outputs."""
        return tuple(dict.fromkeys(reason for o in self.report.outputs for reason in o.reasons))

    @property
    def spatial(self) -> int:
        """Spatial axes: 2 for images, 3 for volumes."""
        return len(self.report.sizes)

    @property
    def channels(self) -> int:
        """Channels of all inputs together."""
        return sum(i.channels for i in self.input_specs())

    def input_specs(self) -> tuple[InputSpec, ...]:
        """The inputs as a spec holds them.

        Raises:
            ContractError: One leaves its number of channels open.
        """
        specs = []
        for i in self.report.inputs:
            channels = i.shape[i.axes.index("C")] if "C" in i.axes else 1
            if channels is None:
                raise ContractError(
                    f"input {i.name} of {self.given.name} leaves its number of channels open; export it with a fixed number"
                )
            specs.append(InputSpec(i.name, i.axes, channels, i.dtype))
        return tuple(specs)


def open_model(
    path: str | Path,
    work: Path,
    *,
    options: Contract | None = None,
    contract: Path | None = None,
    look: Look | None = None,
) -> Model:
    """Opens an ONNX file, a bioimage.io package or its ``rdf.yaml``.

    Args:
        path: The file.
        work: Folder for the freed graph (it lives as long as the model is used).
        options: What the user says of the input; wins over everything else.
        contract: JSON file of the contract; wins over the model's metadata.
        look: Is given the report of the file with the outputs that are predicted, and what is declared of them, before
            anything is run; what it raises is raised here.

    Raises:
        GraphError, ContractError: see their messages.
    """
    from ..contract import json as contract_io
    from ..contract.bioimageio import contract_from_rdf
    from ..contract.metadata import contract_from_metadata
    from ..graph import file as onnx_file
    from ..graph.given import settle

    given, declared = Path(path), Contract()
    if given.suffix.lower() in (".yaml", ".yml", ".zip") or given.is_dir():
        declared, given = contract_from_rdf(
            given, make_folder(work / "package"), normalization=options.normalization if options else None
        )
    proto = onnx_file.load_model(given)
    if _keeps_weights_beside(proto):
        given = _take_weights_in(proto, given, work)
    proto, rewritten = settle(proto)
    declared = declared.over(contract_from_metadata({p.key: p.value for p in proto.metadata_props}))
    if contract is not None:
        declared = contract_io.contract_from_file(contract).over(declared)
    if options is not None:
        declared = options.over(declared)
    return replace(_free_sizes(proto, given, work, declared, look), rewritten=rewritten)


def _free_sizes(proto: onnx.ModelProto, given: Path, work: Path, contract: Contract, look: Look | None) -> Model:
    """The model with the outputs that can be predicted, and sizes free where that is provably the same network."""
    import onnx

    from ..graph.free import free_spatial
    from ..graph.passes.outputs import keep_outputs
    from ..graph.passes.widen import widen
    from ..graph.report import check_images, inspect

    as_given = inspect(proto)
    check_images(as_given)
    left_out = _left_out(as_given)
    if left_out:
        keep_outputs(proto, {output.name for output in as_given.outputs} - set(left_out))
    if look is not None:
        seen = inspect(proto) if left_out else as_given
        look(seen, _settle_whole_numbers(contract, seen, given))
    own = None
    if as_given.precision in ("fp16", "bf16"):
        own = onnx.ModelProto()
        own.CopyFrom(proto)
        widen(proto)
    freed_proto, fixed = free_spatial(proto, baseline_runner(_baseline_of(as_given.precision)))
    graph = work / "graph.onnx"
    onnx.save_model(freed_proto, str(graph))
    report = _of_its_size(inspect(graph), fixed)
    before, after = as_given.inputs[0], report.inputs[0]
    freed = tuple(
        f"{axis} ({was} px)" if axis != "N" else f"batch ({was})"
        for axis, was, now in zip(before.axes, before.shape, after.shape, strict=True)
        if was is not None and now is None
    )
    axes = report.inputs[0].axes
    sizes = _size_per_axis(contract.pixel_size_um, sum(axis in "ZYX" for axis in axes))
    contract = replace(contract, axes=axes, pixel_size_um=sizes)
    contract = _settle_whole_numbers(contract, report, given)
    return Model(
        given,
        graph,
        report,
        contract,
        freed,
        fixed,
        tuple(left_out.values()),
        precision=as_given.precision,
        own=None if own is None else _save_own(own, report, work / "own.onnx"),
    )


def _save_own(own: onnx.ModelProto, report: GraphReport, path: Path) -> Path:
    """Writes the file's own arithmetic with sizes as free as those of the widened graph that ``report`` is of."""
    import onnx

    from ..graph.free import free_spatial

    if all(s.fixed is None for s in report.sizes):
        own, _ = free_spatial(own)  # the widened graph has proven it
    onnx.save_model(own, str(path))
    return path


def _settle_whole_numbers(contract: Contract, report: GraphReport, given: Path) -> Contract:
    """The contract of a network that takes whole numbers: grey levels as they are, which it normalises itself.

    Raises:
        ContractError: Another normalisation is declared.
    """
    whole = next((i for i in report.inputs if i.dtype.startswith(("int", "uint"))), None)
    if whole is None:
        return contract
    declared = contract.normalization
    if declared is not None and declared.method != "none":
        raise ContractError(
            f"input {whole.name} of {given.name} takes {whole.dtype}, whole grey levels, which the network normalises "
            f"itself; normalisation {format_normalization(declared)} would make fractions of them: use --normalize none"
        )
    return replace(contract, normalization=declared or Normalization("none"))


def _size_per_axis(size_um: tuple[float, ...], spatial: int) -> tuple[float, ...]:
    """Pixel size of training along each spatial axis; one number stands for all of them."""
    if len(size_um) not in (0, 1, spatial):
        raise ContractError(
            f"the pixel size of training, {um_text(size_um)} um, has {len(size_um)} numbers, and the network has {spatial} "
            f"spatial axes; give one number, or {spatial} (--pixel-size)"
        )
    return size_um * spatial if len(size_um) == 1 else size_um


def _take_weights_in(proto: onnx.ModelProto, given: Path, work: Path) -> Path:
    """A copy of the file with the weights that lay beside it: an engine folder's graph is whole without neighbours.

    Raises:
        GraphError: They are too large for one file, or cannot be read.
    """
    import onnx

    from ..graph import file as onnx_file

    size = onnx_file.stored_bytes(proto)
    if size > onnx_file.LARGEST:
        raise GraphError(
            f"{given} has {size:,} bytes of graph and weights, and an engine keeps them in one file, which holds "
            f"{onnx_file.LARGEST:,}; it can be inspected but not built: take a smaller network"
        )
    try:
        onnx.external_data_helper.load_external_data_for_model(proto, str(given.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise GraphError(
            f"the weights of {given} cannot be read: {error}; keep the .data file beside the .onnx it belongs to"
        ) from error
    whole = make_folder(work / "given") / given.name
    onnx.save_model(proto, str(whole))
    return whole


def _of_its_size(report: GraphReport, fixed: tuple[str, ...]) -> GraphReport:
    """The report of a graph whose sizes stay as declared: the analysis took them for free, and no proof bore it out."""
    image = next(i for i in report.inputs if any(axis in "ZYX" for axis in i.axes))
    declared = [n for axis, n in zip(image.axes, image.shape, strict=True) if axis in "ZYX"]
    taken = [n is not None and s.fixed is None for n, s in zip(declared, report.sizes, strict=True)]
    if not any(taken):
        return report
    sizes = tuple(replace(s, fixed=n) for n, s in zip(declared, report.sizes, strict=True))
    return replace(
        report,
        sizes=sizes,
        outputs=tuple(replace(o, exact=False, reasons=(*o.reasons, fixed[0])) for o in report.outputs),
    )


def _left_out(report: GraphReport) -> dict[str, str]:
    """Outputs that are not predicted, and why: those that are no images, and labels beside what they were taken from."""
    names = {output.name for output in report.images}
    labels = {o.name for o, final in zip(report.outputs, report.final_ops, strict=True) if final in LABEL_OPS} & names
    if labels == names:
        labels = set()  # there is nothing else: the task is where it is refused
    why = {output.name: "; ".join(output.reasons) or "it has other axes" for output in report.outputs}
    return {
        output.name: f"output {output.name} is left out: "
        + ("it holds labels, not values" if output.name in labels else f"it is no image ({why[output.name]})")
        for output in report.outputs
        if output.name in labels or output.name not in names
    }


def make_folder(path: Path) -> Path:
    """The folder, made where it is not there yet."""
    path.mkdir(exist_ok=True)
    return path


def _keeps_weights_beside(proto: onnx.ModelProto) -> bool:
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    return any(uses_external_data(tensor) for tensor in _get_all_tensors(proto))


def _baseline_of(precision: str) -> str:
    """The backend of the baseline: for quantised files the one that runs them as given, whatever operators they hold."""
    return "onnxruntime" if precision == "int8" else baseline_name()


def baseline_engine(model: Model, spec: EngineSpec, *, threads: int = 0) -> Engine:
    """The model on the CPU, in FP32 or as it was quantised: what every engine is compared with.

    Same contract, halo and overlap as ``spec``.

    Raises:
        BackendError: Nothing that runs it is installed.
    """
    from .. import backends

    name = _baseline_of(model.precision)
    if (missing := backends.get(name).missing()) is not None:
        raise BackendError(missing)
    session = backends.get(name).load(model.graph, precision="fp32", device="cpu", threads=threads)
    return Engine(replace(spec, backend=name, precision="fp32", device="cpu"), session)


def own_engine(model: Model, spec: EngineSpec, *, threads: int = 0) -> Engine | None:
    """The file's own arithmetic in ONNX Runtime, where the graph was widened; None where it was not.

    Raises:
        BackendError: ONNX Runtime is not installed, or does not run it.
    """
    from .. import backends
    from ..graph.report import inspect

    if model.own is None:
        return None
    session = backends.get("onnxruntime").load(model.own, precision="fp32", device="cpu", threads=threads)
    batch = inspect(model.own).batch
    return Engine(replace(spec, backend="onnxruntime", precision="fp32", device="cpu", batch=batch), session)
