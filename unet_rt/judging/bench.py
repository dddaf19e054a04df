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

from ..baseline.model import baseline_engine, open_model
from ..baseline.results import raw_result, tile_of
from ..baseline.samples import Sample, draw, sample_images, synthetic
from ..baseline.tiles import seam_tile, whole_grid
from ..contract.contract import Contract
from ..engine import parity as parity_module
from ..engine.engine import Engine
from ..engine.folder import read_folder
from ..engine.load import load
from ..engine.spec import EngineSpec
from ..errors import BackendError, ContractError, ImageError
from ..prediction.predict import normalization_of, plan
from ..system import facts, limits, timing
from ..tiling.grid import TileGrid, square_tile, tile_grid
from .contenders import BASELINES, Array, Contender, Say, _engines, baseline_contenders, engine_contender, missing

PROBE_PX = 512 * 512  # tile area where the user names none
TIMED_PX = 2048 * 2048  # pixels of the window that is timed
JUDGED_PX = 1024 * 1024  # pixels of the window that labels are compared on


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
        reason = missing(name, module)
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
        contenders = [engine_contender(name, engine, threads) for name, engine in engines.items()]
        reference = stack.enter_context(baseline_engine(opened, spec, threads=threads))
        contenders += baseline_contenders(names, opened, spec, module, threads, skipped, stack)
        with windows[0].source(spec.contract) as source:
            grid = plan(spec, source, tile=tile)
        return _measured(str(model), contenders, reference, windows, grid, runs, seconds, threads, skipped, notes, say)


def _window(spec: EngineSpec, image: Any, axes: str | None, channels: Any, most_px: int, notes: list[str]) -> Sample:
    """The window of an image that is measured on."""
    from ..images.open import open_image

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


def _measured(
    model: str,
    contenders: Sequence[Contender],
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
