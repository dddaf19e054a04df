"""Which settings of ONNX Runtime are fastest on a GPU, tried at build."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BackendError
from ...system import timing as timing_module
from ..session import Array, arrays_for
from .cuda import RUNS_BEFORE_GRAPH, CudaSession
from .settings import CudaOptions, GraphPort, Settings, Trial

log = logging.getLogger("unet_rt")

# A variant is kept only if it is faster than what is in hand by more than this: less is noise.
_GAIN = 0.02
_TRIAL_S = 90.0  # after this no further stage of the trial begins: a stage compiles plans for every convolution


# Building -------------------------------------------------------------------------------------------------------------


def tune(
    model: Path,
    graph: Path,
    *,
    precision: str,
    device: str,
    tiles: Sequence[Sequence[int]] = (),
    batches: Sequence[int] = (),
    islands: Sequence[str] = (),
) -> Settings:
    """Writes ``graph`` in ``precision``, and returns the settings that the trial found fastest for it on ``device``.

    Args:
        model: The FP32 graph.
        graph: Where to write; one file, weights included.
        precision: ``"fp32"`` or ``"fp16"``.
        device: ``"cuda:N"``.
        tiles: Spatial sizes that will run, largest first; the trial uses the first, or about 512 px a side.
        batches: Batch sizes that will run; the trial uses the largest, or 1.
        islands: Nodes kept in float32.
    """
    import onnx

    from ...graph.passes.half import half
    from ...graph.passes.up_conv import up_conv

    shapes = trial_shapes(model, tiles, batches)
    proto = onnx.load(str(model))
    if precision == "fp16":
        half(proto, islands=islands)
    inputs, outputs = name_sizes(proto)
    untried = Settings(input_shapes=shapes, inputs=inputs, outputs=outputs)
    variants = {False: graph.with_name(f"{graph.name}.plain")}
    try:
        onnx.save_model(proto, str(variants[False]))
        if up_conv(proto):
            variants[True] = graph.with_name(f"{graph.name}.rewritten")
            onnx.save_model(proto, str(variants[True]))
        settings = _search(variants, precision, device, untried)
        variants[settings.options.up_conv].replace(graph)
    finally:
        for path in variants.values():
            path.unlink(missing_ok=True)
    return settings


def name_sizes(proto: Any) -> tuple[tuple[GraphPort, ...], tuple[GraphPort, ...]]:
    """Gives every free size of an input a name of its own; returns inputs and outputs.

    Exporters call two sizes alike, or none. The names elsewhere go: ONNX Runtime infers them again.
    """
    import onnx

    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in stored]
    for value in inputs:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value <= 0:
                dim.Clear()
                dim.dim_param = f"{value.name}:{axis}"
    for value in proto.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value <= 0:
                dim.Clear()
    del proto.graph.value_info[:]

    def named(value: Any) -> GraphPort:
        kind = value.type.tensor_type
        shape = (n.dim_value if n.dim_value > 0 else n.dim_param or None for n in kind.shape.dim)
        return GraphPort(value.name, tuple(shape), onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name)

    return tuple(named(value) for value in inputs), tuple(named(value) for value in proto.graph.output)


def trial_shapes(model: Path, tiles: Sequence[Sequence[int]], batches: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Input shapes that settings are compared at."""
    from ...graph.report import inspect
    from ...tiling.grid import square_tile

    report = inspect(str(model))
    tile = tuple(tiles[0]) if tiles else square_tile(report.sizes, report.outputs, 512**2)
    batch = report.batch or max(batches, default=1)
    shapes = []
    for port in report.inputs:
        spatial = iter(tile)
        shape = []
        for axis, size in zip(port.axes, port.shape, strict=True):
            if axis == "N":
                shape.append(batch)
            elif axis == "C":
                shape.append(1 if size is None else size)
            else:
                shape.append(next(spatial))
        shapes.append(tuple(shape))
    return tuple(shapes)


def _search(variants: Mapping[bool, Path], precision: str, device: str, untried: Settings) -> Settings:
    """Greedy: layout, bias and the form of up-convolutions first, then cuDNN's heuristics, then recording.

    Every stage times the best so far and its changes in turn, on the same input; a change whose result is not that of
    the first setting is left out.
    """
    begun = time.perf_counter()
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in untried.input_shapes]
    fused = [{"prefer_nhwc": True, "fuse_conv_bias": True, "up_conv": True in variants}] if precision == "fp16" else []
    stages: list[list[dict[str, Any]]] = [
        [{}, {"prefer_nhwc": True}, *fused],
        [{"search": "EXHAUSTIVE"}, *([{"up_conv": True}] if True in variants else [])],
        [{"cuda_graph": True}],
    ]
    trials: list[Trial] = []
    best: tuple[CudaOptions, _Contender] | None = None
    expected: list[Array] | None = None
    for stage in stages:
        if not stage or (best is None and trials) or time.perf_counter() - begun > _TRIAL_S:
            continue
        running = {} if best is None else {best[0]: best[1]}
        try:
            for changes in stage:
                options = replace(CudaOptions() if best is None else best[0], **changes)
                if options in running:
                    continue
                try:
                    settings = replace(untried, options=options)
                    contender = _Contender(variants[options.up_conv], precision, device, settings, inputs)
                except BackendError as error:
                    trials.append(Trial(options, note=str(error)))
                    continue
                running[options] = contender
                note, expected = _judge(contender, expected, precision)
                if note:
                    trials.append(Trial(options, note=note))
                    running.pop(options).close()
            timings = timing_module.interleave([c.run for c in running.values()], runs=15, seconds=4.0, rest_s=0.0)
        except BaseException:
            for contender in running.values():
                contender.close()
            raise
        times = {options: timing.median_s * 1e3 for options, timing in zip(running, timings, strict=True)}
        trials += [Trial(options, ms) for options, ms in times.items()]
        now = None if best is None else best[0]
        if times:
            fastest = min(times, key=times.__getitem__)
            if now is None or times[fastest] < times[now] * (1 - _GAIN):
                now = fastest
        for options, contender in running.items():
            if options != now:
                contender.close()
        best = None if now is None else (now, running[now])
    if best is None:
        raise BackendError(f"ONNX Runtime runs the graph with no setting on {device}: {trials[0].note}")
    best[1].close()
    for trial in trials:
        log.info("onnxruntime %s %s: %s", device, trial.options.text, trial.note or f"{trial.ms:.3f} ms")
    return replace(untried, options=best[0], trials=tuple(trials))


def _judge(contender: _Contender, expected: list[Array] | None, precision: str) -> tuple[str, list[Array] | None]:
    """Warms a setting up, and says what is wrong with its result ("" where nothing is)."""
    try:
        for _ in range(RUNS_BEFORE_GRAPH + 3):  # plans, memory, and the recording, and a run of that
            contender.run()
        outputs = contender.outputs()
    except BackendError as error:
        return str(error), expected
    if expected is None:
        return "", outputs
    apart = max(_apart(a, b) for a, b in zip(expected, outputs, strict=True))
    allowed = 2.0**-5 if precision == "fp16" else 2.0**-14  # TF32 is off by 2^-11 or so
    return ("" if apart <= allowed else f"its result differs by {apart:.2g} of the range"), expected


def _apart(expected: Array, found: Array) -> float:
    """Largest difference over the range of the expected values; infinite where something is not finite."""
    a, b = expected.astype(np.float64), found.astype(np.float64)
    if not np.isfinite(b).all():
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))


class _Contender:
    """A session with fixed arrays on the device: what is timed is the run alone."""

    def __init__(self, graph: Path, precision: str, device: str, settings: Settings, inputs: Sequence[Array]) -> None:
        self.session = CudaSession(graph, precision, device, settings=settings)
        try:
            arrays = arrays_for(self.session.ports, inputs)
            handle, stream = self.session.gpu, self.session.stream
            with handle.activate():
                self.inputs = [handle.empty(a.shape, a.dtype) for a in arrays]
                for array, target in zip(arrays, self.inputs, strict=True):
                    pinned = handle.pinned(array.shape, array.dtype)
                    pinned[...] = array
                    handle.copy_in(target, pinned, stream)
                    stream.synchronize()
            shapes = self.session.output_shapes([a.shape for a in arrays])
            with handle.activate():
                dtypes = self.session.output_dtypes
                self.targets = [handle.empty(s, d) for s, d in zip(shapes, dtypes, strict=True)]
        except BaseException:
            self.session.close()
            raise

    def run(self) -> None:
        self.session.run_device(self.inputs, self.targets)
        with self.session.gpu.activate():
            self.session.stream.synchronize()

    def outputs(self) -> list[Array]:
        handle, stream = self.session.gpu, self.session.stream
        found = []
        with handle.activate():
            for target in self.targets:
                pinned = handle.pinned(target.shape, np.dtype(target.dtype))
                handle.copy_out(pinned, target, stream)
                stream.synchronize()
                found.append(np.array(pinned))
        return found

    def close(self) -> None:
        self.session.close()
        with self.session.gpu.activate():
            for array in (*self.inputs, *self.targets):
                array.free()
