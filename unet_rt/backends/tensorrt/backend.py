"""TensorRT and TensorRT-RTX: engines for NVIDIA GPUs, compiled ahead of time for fixed shapes.

One module for both libraries: ``tensorrt`` (11, and 10.12 or newer with explicit types) and ``tensorrt_rtx``; where both
are installed, the first. Precision is what the graph says: FP16 is a graph of float16, INT8 one of quantise-dequantise
pairs. A plan takes one or two tiles at a few batch sizes, and no other shape; it belongs to one GPU, driver and version.

Timings of kernels are shared by all builds of a process and not written anywhere; a plan of TensorRT-RTX carries the
kernels that were compiled when it was first run.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BackendError, EngineError
from ...graph.precision import copy_graph, precision_of
from ...system import facts
from ..session import BackendSettings
from . import plugin
from .build import compile_plan, profiles_for, title
from .inspect import check_engine, check_network, engine_convolutions
from .plan import Origin, PlanHeader, Profile, read_header, read_plan, write_plan
from .session import TensorRtSession

if TYPE_CHECKING:
    import onnx

    from ...kernels.device import Device


log = logging.getLogger("unet_rt")

any_tile = False
variant = ""

_LIBRARIES = ("tensorrt", "tensorrt_rtx")
_LEAST = {"tensorrt": (10, 12), "tensorrt_rtx": (1, 0)}
_INSTALL = (
    "pip install tensorrt-cu13 (its vendor serves the libraries; the default package index holds a placeholder), "
    "or, for GeForce and RTX cards, pip install tensorrt-rtx-cu13"
)
_PRECISIONS = ("fp32", "fp16", "int8")
# Largest difference between rows that are the same, and between batch sizes, relative to the largest output: far above
# what another order of summing makes, far below what a wrong kernel does.
_ROW_TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "int8": 1e-1}
_MEASURE_S = 0.2  # time spent on measuring one form of a graph


def missing(device: str = "cpu") -> str | None:
    """None if usable on ``device``; else what is missing and how to get it."""
    if device == "cpu":
        return "TensorRT runs on NVIDIA GPUs alone; use --device cuda on a machine that has one"
    reason = facts.cuda().missing  # first: some versions of the library crash where there is no driver
    if reason is not None:
        return f"TensorRT cannot use {device}: {reason}; use --device cpu"
    if _found() is None:
        return f"TensorRT is not installed; {_INSTALL}"
    _import()
    from ...kernels import device as device_layer

    return device_layer.missing_reason(facts.cuda_index(device))


def precisions(device: str = "cpu") -> tuple[str, ...]:
    """Precisions this backend computes in on ``device``: those of the graph."""
    return _PRECISIONS


def _found() -> str | None:
    return next((name for name in _LIBRARIES if importlib.util.find_spec(name) is not None), None)


def _import() -> Any:
    """The library, whichever is installed."""
    name = _found()
    if name is None:
        raise BackendError(f"TensorRT is not installed; {_INSTALL}")
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError, AttributeError) as error:
        raise BackendError(f"{name} is installed but cannot be imported ({error}); {_INSTALL}") from error
    if not hasattr(trt, "Builder"):
        raise BackendError(f"{name} is installed incompletely (it has no Builder); {_INSTALL}")
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < _LEAST[name]:
        least = ".".join(map(str, _LEAST[name]))
        raise BackendError(f"{name} {trt.__version__} is older than {least}; {_INSTALL}")
    return trt


def _open(device: str) -> tuple[Any, Device]:
    """Library and device, or what is missing."""
    reason = missing(device)
    if reason is not None:
        raise BackendError(reason)
    from ...kernels.device import Device

    return _import(), Device.open(facts.cuda_index(device))


def _origin(trt: Any, device: Device) -> Origin:
    capability = ".".join(map(str, device.compute_capability))
    return Origin(trt.__name__, trt.__version__, device.name, capability, str(device.driver_version))


def stale(blob: Path, device: str = "cuda:0") -> str | None:
    """Why a plan does not run here, None if it does: another GPU, driver, library or version, or no plan at all.

    What it answers is a reason to build again from the model, and to sit the exam again.

    Raises:
        BackendError: No GPU or no library here, so that nothing could be built.
    """
    trt, opened = _open(device)
    try:
        header = read_header(Path(blob))
    except EngineError as error:
        return str(error)
    different = header.origin.differences(_origin(trt, opened))
    return f"{Path(blob).name} belongs to {different}" if different else None


def build(
    model: Path,
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    blob: Path | None = None,
    tiles: Sequence[Sequence[int]] = (),
    batches: Sequence[int] = (),
) -> None:
    """Writes ``graph``, the graph in ``precision``, and ``blob``, its plan for ``tiles`` at ``batches``.

    Args:
        model: The FP32 graph; or a graph that was put into ``precision`` by a pass, with what it keeps higher.
        graph: Where to write the graph in the form that was the fastest; without operators of ours.
        precision: ``fp32``, ``fp16``; ``int8`` for a graph with quantise-dequantise pairs, the rest of it in FP16.
        device: ``cuda:N``.
        blob: Where to write the plan.
        tiles: Pixels per spatial axis; one or two sizes.
        batches: Tiles per run.

    Raises:
        BackendError: Parser or builder refuse, a layer runs in another precision, rows of a batch disagree.
        TileError: Shapes that the graph does not take.
    """
    if precision not in _PRECISIONS:
        raise BackendError(f"TensorRT has no {precision} here; use --precision {', '.join(_PRECISIONS)}")
    trt, opened = _open(device)
    if blob is None:
        raise BackendError("TensorRT writes a plan beside the graph, and no place for it was given; pass blob")
    maker = _Maker(trt, opened, _origin(trt, opened), precision, device)
    # Its kernel copies FP32 and FP16: INT8 tensors would have to be dequantised for it.
    forms = graph_forms(model, graph, precision, plugins=precision != "int8" and plugin.register(trt))
    import onnx

    first = next(iter(forms.values()))
    profiles = profiles_for(onnx.load(str(first), load_external_data=False), tiles, batches)
    with opened.activate():
        plans = _plans(maker, forms, profiles)
        chosen = min(plans, key=lambda name: plans[name].milliseconds)
        times = {name: round(plan.milliseconds, 4) for name, plan in plans.items()} if len(forms) > 1 else {}
        if len(plans) > 1:
            log.info("%s: %s", graph.name, ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items()))
        best = plans[chosen]
        if len(best.header.profiles) < len(profiles):
            best = maker.make(forms[chosen], profiles, chosen, measure=False)
    # Of a plan with the kernel of ours the graph is stored in standard operators, from which any library makes it again.
    if forms[chosen] != graph and chosen != "crop_concat":
        copy_graph(forms[chosen], graph)
    for file in forms.values():
        if file != graph:
            file.unlink(missing_ok=True)
    write_plan(Path(blob), replace(best.header, measured_ms=times), best.plan, best.kernels)


def _plans(maker: _Maker, forms: Mapping[str, Path], profiles: Sequence[Profile]) -> dict[str, _Plan]:
    """A plan of every form that can be built; of several the first profile alone, which they are measured at."""
    plans: dict[str, _Plan] = {}
    refused: BackendError | EngineError | None = None
    several = len(forms) > 1
    for name, file in forms.items():
        try:
            plans[name] = maker.make(file, profiles[:1] if several else profiles, name, measure=several)
        except (BackendError, EngineError) as error:
            refused = refused or error
            log.info("%s: the form %s is left out: %s", file.name, name, error)
    if refused is not None and not plans:
        raise refused if isinstance(refused, BackendError) else BackendError(str(refused)) from refused
    return plans


def graph_forms(model: Path, graph: Path, precision: str, *, plugins: bool) -> dict[str, Path]:
    """The graph in ``precision``, in the forms that are worth measuring, by name, each in a file beside ``graph``.

    ``native`` is the first: the graph as it came. ``up_conv`` has up-convolutions as 1 x 1 convolutions, ``crop_concat``
    has centre crops and concatenations as one node of ours (only where there are plugins).
    """
    import onnx

    from ...graph.passes.half import half, half_type_of
    from ...graph.passes.up_conv import up_conv

    found = precision_of(model)
    if found != precision and not (found == "fp32" and precision == "fp16"):
        way_out = "calibrate it first" if precision == "int8" else "give the FP32 graph"
        raise BackendError(f"{model.name} computes in {found}, {precision} was asked; {way_out}")

    def finished(proto: onnx.ModelProto) -> onnx.ModelProto:
        if precision != "fp32" and half_type_of(proto) is None:
            half(proto)
        return proto

    copy_graph(model, graph)
    native = onnx.load(str(model))
    forms: list[tuple[str, onnx.ModelProto]] = []
    shuffled = onnx.ModelProto()
    shuffled.CopyFrom(native)
    forms.append(("native", finished(native)))
    if up_conv(shuffled):
        forms.append(("up_conv", finished(shuffled)))
    if plugins:
        from ...graph.passes.crop_concat import crop_concat

        merged = onnx.ModelProto()
        merged.CopyFrom(forms[0][1])
        if crop_concat(merged):
            forms.append(("crop_concat", merged))
    files = {}
    for name, proto in forms:
        file = graph if name == "native" else graph.with_name(f"{graph.stem}.{name}{graph.suffix}")
        onnx.save(proto, str(file))
        files[name] = file
    return files


def islands(model: onnx.ModelProto) -> frozenset[str]:
    """Nodes that a graph keeps in FP32 on purpose."""
    import json

    from ...graph.passes.half import RECORD

    record = next((entry.value for entry in model.metadata_props if entry.key == RECORD), None)
    return frozenset() if record is None else frozenset(json.loads(record).get("islands", ()))


@dataclass(frozen=True)
class _Plan:
    """One form of the graph, built and looked at."""

    header: PlanHeader
    plan: bytes
    kernels: bytes
    milliseconds: float


@dataclass(frozen=True)
class _Maker:
    """Makes plans with one library on one GPU, in one precision; ``name`` is the device's."""

    trt: Any
    device: Device
    origin: Origin
    precision: str
    name: str

    def make(self, graph: Path, profiles: Sequence[Profile], variant: str, *, measure: bool) -> _Plan:
        """Builds a plan, reads its precision back, runs every profile, and compares rows and batch sizes."""
        import onnx

        major, minor = self.device.compute_capability
        compiled = compile_plan(
            self.trt, graph, profiles, gpu=self.origin.gpu, compute_capability=(int(major), int(minor))
        )
        proto = onnx.load(str(graph), load_external_data=False)
        check_network(compiled.convolutions, self.precision, islands(proto))
        header = PlanHeader(self.origin, self.precision, tuple(profiles), compiled.inputs, compiled.outputs, variant)
        with TensorRtSession(self.trt, header, compiled.plan, b"", self.device, self.name, 0) as session:
            told = engine_convolutions(session.inspect(), compiled.convolutions)
            layers = check_engine(told, compiled.convolutions, self.precision)
            if layers.get("unread"):
                log.info("%s: the engine tells no types of %d convolution(s)", graph.name, layers["unread"])
            check_rows(session, _ROW_TOLERANCE[self.precision])
            milliseconds = _measured_ms(session) if measure else 0.0
            kernels = session.kernels()
        return _Plan(replace(header, layers=layers), compiled.plan, kernels, milliseconds)


def check_rows(session: TensorRtSession, tolerance: float) -> None:
    """Runs every profile on one tile, repeated: all rows must agree with each other, and with those of other batches.

    Libraries have been seen to answer differently for identical rows, and wrongly for batches above one.

    Raises:
        BackendError: Rows or batch sizes that disagree by more than ``tolerance`` of the largest output.
    """
    first: dict[tuple[int, ...], list[np.ndarray[Any, Any]]] = {}
    for profile in sorted(session.header.profiles, key=lambda p: p.batch):
        rows = len(profile.inputs[0]) == len(profile.tile) + 2
        inputs = [_pattern(shape, rows=rows) for shape in profile.inputs]
        outputs = session.run(inputs)
        baseline = first.setdefault(profile.tile, [y[:1] if rows else y for y in outputs])
        for index, (y, one) in enumerate(zip(outputs, baseline, strict=True)):
            a, b = np.asarray(y, np.float32), np.asarray(one, np.float32)
            if not np.isfinite(b).all():
                continue  # a range that the precision does not hold: the parity check sees and names it
            error = float(np.abs(a - b).max()) / max(float(np.abs(b).max()), 1e-6)
            if not error <= tolerance:
                raise BackendError(
                    f"{profile}: identical rows give answers that differ by {error:.2g} of the largest output "
                    f"{index} (allowed: {tolerance:g}), a fault of the library; use another --batch, or "
                    "--backend onnxruntime"
                )


def _pattern(shape: Sequence[int], *, rows: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Smooth pixels, the same in every row: any will do, as rows are compared with each other."""
    sample = tuple(shape[1:]) if rows else tuple(shape)
    coarse = np.random.default_rng(0).random([-(-n // 8) for n in sample], np.float32)
    for axis, n in enumerate(sample):
        coarse = np.repeat(coarse, 8, axis=axis).take(np.arange(n), axis=axis)
    return np.repeat(coarse[None], shape[0], axis=0) if rows else coarse


def _measured_ms(session: TensorRtSession) -> float:
    """Milliseconds of one run of the first profile, by the best of three series of runs."""
    device = session.opened
    with device.activate():
        shapes = session.header.profiles[0].inputs
        pairs = [*zip(shapes, session.input_dtypes, strict=True)]
        inputs = [device.empty(shape, dtype) for shape, dtype in pairs]
        pairs = [*zip(session.output_shapes(shapes), session.output_dtypes, strict=True)]
        outputs = [device.empty(shape, dtype) for shape, dtype in pairs]
        try:
            for array in inputs:
                device.zero(array, session.stream)
            best, count = float("inf"), 1
            for _ in range(4):
                session.run_device(inputs, outputs)  # the second one records
                session.stream.synchronize()
                started = time.perf_counter()
                for _ in range(count):
                    session.run_device(inputs, outputs)
                session.stream.synchronize()
                each = (time.perf_counter() - started) / count
                if count > 1:
                    best = min(best, each)
                count = max(2, min(1000, int(_MEASURE_S / 3 / max(each, 1e-6))))
            return best * 1e3
        finally:
            session.forget([*inputs, *outputs])
            for array in (*inputs, *outputs):
                array.free()


def load(
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    threads: int = 0,
    blob: Path | None = None,
    settings: BackendSettings | None = None,
) -> TensorRtSession:
    """Session of a plan that ``build`` wrote.

    Raises:
        EngineError: A plan of another machine or version (see :func:`stale`), of another precision, or damaged.
        DeviceMemoryError: The GPU has no room for its weights.
        BackendError: No GPU, or no library.
    """
    trt, opened = _open(device)
    if blob is None:
        raise EngineError(f"{Path(graph).name} has no plan beside it; build the engine again on this machine")
    header, plan, kernels = read_plan(Path(blob))
    different = header.origin.differences(_origin(trt, opened))
    if different:
        raise EngineError(f"{Path(blob).name} belongs to {different}; build the engine again on this machine")
    if header.precision != precision:
        raise EngineError(f"{Path(blob).name} is a plan in {header.precision}, {precision} was asked; build it again")
    return TensorRtSession(trt, header, plan, kernels, opened, device, threads)


__all__ = ["build", "load", "missing", "precisions", "stale", "title"]
