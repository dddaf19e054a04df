"""A user's own network on a user's own image: engines beside the libraries used directly. A judge: it never prints.

Everybody gets the same pixels (a window of the image, in memory, with the whole image's statistics), the same tile and
the same threads. Two things are timed, each in one interleaved run: a tile (float32 array to float32 array), and the
window from its pixels to its labels. Baselines tile by hand, as a script would, or with MONAI's sliding window.

Label agreement is that with FP32 on the whole of a smaller window, where the network allows it; the seam error is what
tiling alone changes: each contender in tiles against itself untiled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import backends
from .baseline.model import Model, baseline_engine, open_model
from .baseline.results import raw_result, tile_of
from .baseline.samples import Sample, draw, sample_images, synthetic
from .baseline.tiles import seam_tile, whole_grid
from .contract.contract import Contract
from .engine import parity as parity_module
from .engine.engine import Engine
from .engine.folder import read_folder
from .engine.load import load
from .engine.spec import EngineSpec
from .errors import BackendError, ContractError, ImageError, ParityError
from .images.normalize import normalised
from .prediction.host import run
from .prediction.predict import normalization_of, plan
from .prediction.work import Work
from .system import facts, limits, timing
from .tiling.decision import decide
from .tiling.grid import TileGrid, square_tile, tile_grid
from .tiling.stitch import blend_weight

Array = npt.NDArray[Any]
Say = Callable[[str], None]

PROBE_PX = 512 * 512  # tile area where the user names none
TIMED_PX = 2048 * 2048  # pixels of the window that is timed
JUDGED_PX = 1024 * 1024  # pixels of the window that labels are compared on
LIBRARIES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "eager": "eager PyTorch"}
MONAI = {"monai": "constant", "monai-gaussian": "gaussian"}  # name -> MONAI's mode
MONAI_OVERLAP = 0.25  # MONAI's default
BASELINES = (*LIBRARIES, *MONAI)


@dataclass(frozen=True)
class BenchRow:
    """One contender.

    Attributes:
        name: Library and precision; "unet-rt ..." for engines.
        engine: Whether it is an engine of unet-rt.
        tile: Times of one tile.
        window: Times of the whole window, from pixels to labels; ``peak_bytes`` is what the first run took.
        mpx_per_s: Megapixels of the window per second.
        label_agreement: Share of labels equal to FP32's; None for a regression.
        relative_error: Largest error over the 1st to 99th percentile range of FP32's values.
        seam: Share of labels (regression: largest error over the range) that tiling alone changes; None where the
            network has no whole-image result.
        speed: How many times as fast as the first baseline it is, end to end.
    """

    name: str
    engine: bool
    tile: timing.Timing
    window: timing.Timing
    mpx_per_s: float
    label_agreement: float | None
    relative_error: float
    seam: float | None
    speed: timing.Ratio


@dataclass(frozen=True)
class BenchReport:
    """What ``bench`` measured.

    Attributes:
        model: The engine folder or ONNX file.
        image: Name of the window that was timed.
        shape: Its spatial shape in pixels.
        tile: Of everybody, in pixels.
        tiles: Tiles of the window, for all but MONAI.
        threads: Of everybody.
        baseline: Name of the contender whose speed is 1.
        rows: Contenders, slowest first.
        skipped: Name -> why it was not run.
        notes: What else is worth saying.
    """

    model: str
    image: str
    shape: tuple[int, ...]
    tile: tuple[int, ...]
    tiles: int
    threads: int
    baseline: str
    rows: tuple[BenchRow, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "machine": facts.describe()}


@dataclass(frozen=True)
class _Contender:
    """``run``: (1, C, *tile) -> (1, K, *tile_out); ``tiled``: network's own values (K, *spatial) of a window in tiles."""

    name: str
    spec: EngineSpec
    run: Callable[[Array], Array]
    labels: Callable[[Sample, TileGrid], Array]
    tiled: Callable[[Sample, TileGrid], Array]
    is_engine: bool = False


def bench_model(
    model: str | Path,
    *,
    image: Any = None,
    samples: Any = None,
    baselines: Sequence[str] | None = None,
    module: Any = None,
    contract: Contract | None = None,
    axes: str | None = None,
    channels: Sequence[int] | None = None,
    tile: Sequence[int] | None = None,
    threads: int = 0,
    runs: int = 5,
    seconds: float = 120.0,
    say: Say | None = None,
) -> BenchReport:
    """Times an engine, or the engines of an ONNX file, beside the libraries used directly.

    Args:
        model: An engine folder; or an ONNX file, of which engines are built for every backend and precision here.
        image: A path or an array; None: drawn microscopy, on which speeds are sound and agreement proves little.
        samples: Images to build lower precisions from (ONNX files only); None: FP32 engines alone.
        baselines: Names out of ``BASELINES``; None: those that are installed.
        module: The network as a ``torch.nn.Module`` in evaluation mode, for eager PyTorch; MONAI runs it, too.
        contract: The input contract, as far as the model does not declare it (ONNX files only).
        axes, channels: How images are to be read.
        tile: Tile in pixels per axis; None: chosen by build and for the window.
        threads: Of everybody; 0: by affinity and quota.
        runs: Rounds counted, per interleaved run.
        seconds: For each of the two interleaved runs.
        say: Receives progress in sentences.

    Raises:
        BackendError: A baseline was named that is unknown or missing.
        ContractError: Options that do not belong to an engine, or a contract that is not complete.
        EngineError, GraphError, ImageError, TileError: see their messages.
    """
    say = say or (lambda _: None)
    wanted = BASELINES if baselines is None else tuple(baselines)
    skipped: dict[str, str] = {}
    for name in wanted:
        reason = _missing(name, module)
        if reason is not None and baselines is not None:
            raise BackendError(f"baseline {name}: {reason}")
        if reason is not None:
            skipped[name] = reason
    path = Path(model)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unet-rt-bench-")))
        notes: list[str] = []
        if (path / "spec.json").exists() or (not path.exists() and path.suffix == ".urt"):
            if samples is not None or contract not in (None, Contract()):
                raise ContractError(
                    f"{path} is an engine, which has its contract and is built already; samples, normalisation and task "
                    "are for ONNX files"
                )
            engine = stack.enter_context(load(path, threads=threads or None))
            engines = {f"unet-rt {engine.spec.backend} {engine.spec.precision}": engine}
            opened = open_model(read_folder(path).file("model"), work, options=engine.spec.contract)
        else:
            opened = open_model(path, work, options=contract)
            if tile is None and opened.exact:
                tile = square_tile(opened.report.sizes, opened.report.outputs, PROBE_PX)
            engines = _engines(path, samples, contract, tile, axes, channels, threads, work, skipped, say)
            for engine in engines.values():
                stack.callback(engine.close)
            if samples is None:
                notes.append("engines in FP32 alone: lower precisions are built from images, --samples IMAGES")
        spec = next(iter(engines.values())).spec
        windows = [_window(spec, image, axes, channels, most, notes) for most in (TIMED_PX, JUDGED_PX)]
        names = [name for name in wanted if name not in skipped]
        if spec.device != "cpu" and names:
            notes.append("baselines run on the CPU")
        contenders = [_engine_contender(name, engine, threads) for name, engine in engines.items()]
        reference = stack.enter_context(baseline_engine(opened, spec, threads=threads))
        contenders += _baseline_contenders(names, opened, spec, module, threads, skipped, stack)
        with windows[0].source(spec.contract) as source:
            grid = plan(spec, source, tile=tile)
        return _measured(str(model), contenders, reference, windows, grid, runs, seconds, threads, skipped, notes, say)


def _missing(name: str, module: Any) -> str | None:
    """Why a baseline cannot be run, None if it can.

    Raises:
        BackendError: No baseline of this name.
    """
    if name not in BASELINES:
        raise BackendError(f"there is no baseline {name!r}; choose from {', '.join(BASELINES)}")
    from .backends import eager

    if name in MONAI:
        return eager.monai_missing()
    reason = backends.get(name).missing()
    if reason is None and name == "eager" and module is None:
        return "a graph has no module to run; give the network's checkpoint with --checkpoint"
    return reason


def _engines(
    path: Path,
    samples: Any,
    contract: Contract | None,
    tile: Sequence[int] | None,
    axes: str | None,
    channels: Sequence[int] | None,
    threads: int,
    work: Path,
    skipped: dict[str, str],
    say: Say,
) -> dict[str, Engine]:
    """One engine per backend and precision of an ONNX file, by name.

    Raises:
        The error of the first, where none could be built.
    """
    from .building.build import build

    engines: dict[str, Engine] = {}
    failed: list[BackendError | ParityError] = []
    precisions = ("fp32", "bf16", "int8") if samples is not None else ("fp32",)
    for name in backends.require("cpu"):
        for precision in precisions:
            title = f"unet-rt {name} {precision}"
            say(f"building {title}")
            if precision not in backends.get(name).precisions("cpu"):
                skipped[title] = f"{name} has no {precision} on this CPU"
                continue
            try:
                engines[title] = build(
                    path,
                    samples=samples,
                    out=work / f"{name}-{precision}.urt",
                    contract=contract,
                    backend=name,
                    device="cpu",
                    precision=precision,
                    tile=tile,
                    threads=threads,
                    axes=axes,
                    channels=channels,
                    say=say,
                )
            except (BackendError, ParityError) as error:
                skipped[title] = str(error)
                failed.append(error.with_traceback(None))  # whose frames would keep all that the build held
    if not engines:
        raise failed[0]
    return engines


def _window(spec: EngineSpec, image: Any, axes: str | None, channels: Any, most_px: int, notes: list[str]) -> Sample:
    """The window of an image that is measured on."""
    from .images.open import open_image

    if image is None:
        note = "no image is given: drawn microscopy, on which labels prove nothing about this network; pass --image"
        if note not in notes:
            notes.append(note)
        side = round(most_px ** (1 / spec.spatial))
        return synthetic(spec.contract, spec.channels, spec.spatial, count=1, side=side)[0]
    images = sample_images(image)
    if len(images) > 1:
        raise ImageError(f"{len(images)} images are given, and one is measured on; choose one")
    with open_image(
        images[0], spec.contract, axes=axes, channels=channels, spatial=spec.spatial, network_channels=spec.channels
    ) as source:
        normalization_of(spec, source, None)
    return draw(
        images,
        spec.contract,
        spatial=spec.spatial,
        network_channels=spec.channels,
        axes=axes,
        channels=channels,
        count=1,
        max_px=most_px,
    )[0]


def _engine_contender(name: str, engine: Engine, threads: int) -> _Contender:
    contract = engine.spec.contract
    # where the task was left open, the values are all there is
    decision = decide(contract, engine.spec.outputs[0].channels, None if contract.has_labels else "raw")

    def labels(sample: Sample, grid: TileGrid) -> Array:
        lead = (decision.channels,) if decision.channels else ()
        result = np.empty((*lead, *grid.out_shape(0)), decision.dtype)

        def keep(work: Work, start: int, band: Array) -> None:
            rows = slice(start, start + band.shape[len(lead)])
            (result[:, rows] if lead else result[rows])[...] = band

        batch = engine.spec.run_batch
        with sample.source(engine.spec.contract) as source:
            run(engine, source, [Work(0, grid)], decision, keep, sample.affines, batch=batch, threads=threads)
        return result

    def tiled(sample: Sample, grid: TileGrid) -> Array:
        return raw_result(engine, sample, grid, threads)

    return _Contender(name, engine.spec, lambda x: engine.run(x)[0], labels, tiled, is_engine=True)


def _baseline_contenders(
    names: Sequence[str],
    model: Model,
    spec: EngineSpec,
    module: Any,
    threads: int,
    skipped: dict[str, str],
    stack: ExitStack,
) -> list[_Contender]:
    """Eager PyTorch first, where it is: its speed is 1."""
    from .backends import eager, openvino
    from .backends.onnxruntime import cpu as onnxruntime
    from .backends.session import Called, SessionBase

    def engine(name: str) -> Engine:
        """With a session of its own, so that the memory it takes is its contender's."""
        if name == "eager" and module is not None:
            session: SessionBase = eager.load(module, threads=threads)
        else:
            bare = onnxruntime.bare if name == "onnxruntime" else openvino.bare
            session = Called(bare(model.graph, threads), LIBRARIES[name], threads)
        engine = Engine(replace(spec, backend=name, precision="fp32", device="cpu"), session)
        stack.callback(engine.close)
        return engine

    libraries = [name for name in LIBRARIES if name in names]
    libraries.sort(key=lambda name: name != "eager")
    found = [
        _by_hand(LIBRARIES[name] + (" FP32" if name == "eager" else " FP32, bare"), engine(name)) for name in libraries
    ]
    for name in (n for n in MONAI if n in names):
        if any(f.scale != 1 or any(f.shrink) for f in spec.outputs[0].field):
            skipped[name] = "the output is not of the input's size, and MONAI's sliding window would resample it"
        elif not libraries:
            skipped[name] = "it needs a network to run; name one of eager, onnxruntime, openvino beside it"
        else:
            over = libraries[0]
            title = f"MONAI sliding window ({MONAI[name]}), {LIBRARIES[over]} FP32"
            found.append(_monai(title, MONAI[name], engine(over), module if over == "eager" else None))
    return found


def _by_hand(name: str, engine: Engine, tiled: Callable[[Sample, TileGrid], Array] | None = None) -> _Contender:
    contract = engine.spec.contract
    values = tiled or (lambda sample, grid: tiles_by_hand(engine, sample, grid))

    def labels(sample: Sample, grid: TileGrid) -> Array:
        raw = values(sample, grid)
        return parity_module.labels(raw, contract) if contract.has_labels else raw

    return _Contender(name, engine.spec, lambda x: engine.run(x)[0], labels, values)


def tiles_by_hand(engine: Engine, sample: Sample, grid: TileGrid) -> Array:
    """What a script does with a library: pad, normalise, run one tile after the other, put the results together.

    Returns:
        The network's own values (K, *spatial), float32.
    """
    spec = engine.spec
    width = [(a.canvas.before, a.canvas.size - a.canvas.before - a.canvas.image) for a in grid.axes]
    how: dict[str, Any] = {"mirror": "reflect", "edge": "edge", "constant": "constant"}
    canvas = normalised(
        np.pad(sample.pixels, [(0, 0), *width], mode=how[spec.contract.border or "mirror"]), sample.numbers
    )
    result = np.zeros((spec.outputs[0].channels, *grid.out_shape(0)), np.float32)
    total = np.zeros(grid.out_shape(0), np.float32)
    weight = blend_weight(grid.tile_out_shape(0), spec.blend) if grid.blended else None
    for index in grid.rows():
        place = grid.placement(index, 0)
        origins = grid.origins(index) + [a.canvas.before for a in grid.axes]
        for origin, source, target, size in zip(origins, place.source, place.target, place.size, strict=True):
            tile = canvas[(slice(None), *(slice(o, o + t) for o, t in zip(origin, grid.tile, strict=True)))]
            values = engine.run(tile[None])[0][0]
            kept = tuple(slice(a, a + n) for a, n in zip(source, size, strict=True))
            there = tuple(slice(a, a + n) for a, n in zip(target, size, strict=True))
            if weight is None:
                result[(slice(None), *there)] = values[(slice(None), *kept)]
            else:
                result[(slice(None), *there)] += values[(slice(None), *kept)] * weight[kept]
                total[there] += weight[kept]
    return result if weight is None else result / total


def _monai(name: str, mode: str, engine: Engine, module: Any) -> _Contender:
    from .backends import eager

    predictor = module if module is not None else (lambda x: engine.run(x)[0])

    def tiled(sample: Sample, grid: TileGrid) -> Array:
        if grid.count == 1:
            return tiles_by_hand(engine, sample, grid)  # untiled: nothing of MONAI is in it
        x = normalised(sample.pixels, sample.numbers)[None]
        values: Array = eager.sliding_window(predictor, x, grid.tile, overlap=MONAI_OVERLAP, mode=mode)[0]
        return values

    return _by_hand(name, engine, tiled)


def _measured(
    model: str,
    contenders: Sequence[_Contender],
    reference: Engine,
    windows: Sequence[Sample],
    grid: TileGrid,
    runs: int,
    seconds: float,
    threads: int,
    skipped: dict[str, str],
    notes: list[str],
    say: Say,
) -> BenchReport:
    timed, judged = windows
    spec = reference.spec
    x = tile_of(timed, spec, grid.tile, threads)
    grids = [_grid_of(c.spec, timed, grid) for c in contenders]
    peaks = []
    for contender, own in zip(contenders, grids, strict=True):  # first of all: later runs find memory allocated
        say(f"memory of {contender.name}")
        with timing.MemoryWatch() as watch:
            contender.labels(timed, own)
        peaks.append(watch.grown)
    say(f"timing a tile of {len(contenders)} contenders")
    per_tile = timing.interleave([_call(c.run, x) for c in contenders], runs=runs, seconds=seconds)
    say(f"timing {timed.name}")
    calls = [_call(c.labels, timed, own) for c, own in zip(contenders, grids, strict=True)]
    per_window = timing.interleave(calls, runs=runs, seconds=seconds, warm_up=0)
    small = tile_grid(
        judged.shape, seam_tile(spec, judged.shape), spec.sizes, spec.used_outputs(), overlap=spec.overlap
    )
    untiled = whole_grid(spec, judged.shape) if spec.runs_whole else small
    wanted = raw_result(reference, judged, untiled, threads)
    if not spec.runs_whole:
        notes.append("FP32 runs the same tiles: this network or graph has no whole-image result")
    first = next((k for k, c in enumerate(contenders) if not c.is_engine), 0)
    rows = []
    for contender, tile, window, peak in zip(contenders, per_tile, per_window, peaks, strict=True):
        say(f"labels of {contender.name}")
        got = contender.tiled(judged, _grid_of(contender.spec, judged, small))
        found = parity_module.compare(wanted, got, spec.contract, judged.name)
        seam = None
        if spec.runs_whole:
            alone = parity_module.compare(contender.tiled(judged, untiled), got, spec.contract, judged.name)
            seam = alone.changed
        rows.append(
            BenchRow(
                contender.name,
                contender.is_engine,
                tile,
                replace(window, peak_bytes=peak),
                prod(timed.shape) / 1e6 / window.median_s,
                None if found.label_change is None else 1 - found.label_change,
                found.relative,
                seam,
                timing.ratio(per_window[first], window),
            )
        )
    return BenchReport(
        model,
        timed.name,
        timed.shape,
        grid.tile,
        grid.count,
        threads or limits.threads(),
        contenders[first].name,
        tuple(sorted(rows, key=lambda row: row.mpx_per_s)),
        skipped,
        tuple(notes),
    )


def _grid_of(spec: EngineSpec, sample: Sample, grid: TileGrid) -> TileGrid:
    """The tiles of an engine with the halo that is its own."""
    return tile_grid(sample.shape, grid.tile, spec.sizes, spec.used_outputs(), overlap=spec.overlap)


def _call(function: Callable[..., Array], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)
