"""A user's own network on a user's own image: engines beside the libraries used directly. A judge: it never prints.

Everybody gets the same pixels (a window of the image, in memory, with the whole image's statistics), the same tile and
the same threads. Two things are timed, each in one interleaved run: a tile (float32 array to float32 array), and the
window from its pixels to its labels. Baselines tile by hand, as a script would, or with MONAI's sliding window.

Label agreement is that with FP32 on the whole of a smaller window, where the network allows it; the seam error is what
tiling alone changes: each contender in tiles against itself untiled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from ..baseline.model import baseline_engine, open_model
from ..baseline.results import raw_result, tile_of
from ..baseline.samples import ReadOptions, SampleWindow, draw, draw_generated, sample_images
from ..baseline.tiles import seam_tile, whole_grid
from ..building.job import Say
from ..contract.contract import Contract
from ..engine import parity as parity_module
from ..engine.engine import Engine
from ..engine.folder import read_folder
from ..engine.load import load
from ..engine.parity import ImageParity
from ..engine.spec import EngineSpec
from ..errors import BackendError, ContractError, ImageError
from ..prediction.plan import image_grid
from ..prediction.request import normalization_of
from ..system import facts, limits, timing
from ..system.json import Record
from ..tiling.grid import TileGrid, square_tile, tile_grid
from .contenders import (
    BASELINES,
    Contender,
    EngineOptions,
    baseline_contenders,
    build_engines,
    engine_contender,
    why_missing,
)

UNNAMED_TILE_PX = 512 * 512  # tile area where the user names none
TIMED_PX = 2048 * 2048  # pixels of the window that is timed
JUDGED_PX = 1024 * 1024  # pixels of the window that labels are compared on
NO_IMAGE = "no image is given: drawn microscopy, on which labels prove nothing about this network; pass --image"


@dataclass(frozen=True)
class BenchRow:
    """What ``bench`` measured of one contender.

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
class BenchReport(Record):
    """What ``bench`` measured of an engine, or of a model's engines, beside the libraries used directly.

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
        """The report as JSON values, with the machine it was measured on."""
        return {**super().to_json(), "machine": facts.describe()}


def bench(
    model: str | Path,
    *,
    image: Any = None,
    samples: Any = None,
    baselines: Sequence[str] | None = None,
    module: Any = None,
    contract: Contract | None = None,
    axes: str | None = None,
    channels: Sequence[int] | str | None = None,
    series: int | str | None = None,
    nodata: float | None = None,
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
        axes, channels, series, nodata: How images are to be read.
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
    say, read = say or (lambda _: None), ReadOptions(axes, channels, series, nodata)
    wanted, skipped = _choose_baselines(baselines, module)
    path, notes = Path(model), list[str]()
    with ExitStack() as resources:
        work = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="unet-rt-bench-")))
        if (path / "spec.json").exists() or (not path.exists() and path.suffix == ".urt"):
            if samples is not None or contract not in (None, Contract()):
                raise ContractError(
                    f"{path} is an engine, which has its contract and is built already; samples, normalisation and task "
                    "are for ONNX files"
                )
            engine = load(path, threads=threads or None)
            engines = {f"unet-rt {engine.spec.backend} {engine.spec.precision}": engine}
            resources.enter_context(engine)
            opened = open_model(read_folder(path).file("model"), work, options=engine.spec.contract)
        else:
            opened = open_model(path, work, options=contract)
            if tile is None and opened.exact:
                tile = square_tile(opened.report.sizes, opened.report.outputs, UNNAMED_TILE_PX)
            engines, unbuilt = build_engines(path, EngineOptions(samples, contract, read, tile, threads), work, say)
            skipped |= unbuilt
            for engine in engines.values():
                resources.enter_context(engine)
            if samples is None:
                notes.append("engines in FP32 alone: lower precisions are built from images, --samples IMAGES")
        spec = next(iter(engines.values())).spec
        timed, judged = (_choose_window(spec, image, read, most) for most in (TIMED_PX, JUDGED_PX))
        if image is None:
            notes.append(NO_IMAGE)
        names = [name for name in wanted if name not in skipped]
        if spec.device != "cpu" and names:
            notes.append("baselines run on the CPU")
        contenders = [engine_contender(title, engine, threads) for title, engine in engines.items()]
        reference = resources.enter_context(baseline_engine(opened, spec, threads=threads))
        others, unfit = baseline_contenders(names, opened, spec, module, threads, resources)
        with timed.source(spec.contract) as source:
            grid = image_grid(spec, source, tile=tile)
        course = _Course(timed, judged, grid, runs, seconds, threads, say)
        report = _measure(str(model), [*contenders, *others], reference, course)
        return replace(report, skipped=skipped | unfit, notes=(*notes, *report.notes))


@dataclass(frozen=True)
class _Course:
    """What every contender is given, and how often.

    Attributes:
        timed: The window that is timed.
        judged: The window that labels are compared on.
        grid: Tiles of the timed window.
        runs: Rounds counted.
        seconds: For each of the two interleaved runs.
        threads: Of everybody; 0: by affinity and quota.
        say: Receives progress in sentences.
    """

    timed: SampleWindow
    judged: SampleWindow
    grid: TileGrid
    runs: int
    seconds: float
    threads: int
    say: Say


def _choose_baselines(baselines: Sequence[str] | None, module: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """The baselines that were named, or all; and of those that cannot be run, why.

    Raises:
        BackendError: One was named that is unknown or missing.
    """
    wanted = BASELINES if baselines is None else tuple(baselines)
    skipped = dict[str, str]()
    for name in wanted:
        reason = why_missing(name, module)
        if reason is not None and baselines is not None:
            raise BackendError(f"baseline {name}: {reason}")
        if reason is not None:
            skipped[name] = reason
    return wanted, skipped


def _choose_window(spec: EngineSpec, image: Any, read: ReadOptions, most_px: int) -> SampleWindow:
    """The window of an image that is measured on; of a drawn one where there is none."""
    from ..images.open import open_image

    if image is None:
        side = round(most_px ** (1 / spec.spatial))
        return draw_generated(spec.contract, spec.inputs, spec.spatial, count=1, side=side)[0]
    images = sample_images(image)
    if len(images) > 1:
        raise ImageError(f"{len(images)} images are given, and one is measured on; choose one")
    with open_image(
        images[0],
        spec.contract,
        read.reading,
        spatial=spec.spatial,
        network_channels=spec.channels,
    ) as source:
        normalization_of(spec, source, None)
    (window,) = draw(
        images,
        spec.contract,
        spatial=spec.spatial,
        network_channels=spec.channels,
        read=read,
        count=1,
        max_px=most_px,
    )
    return window


def _measure(model: str, contenders: Sequence[Contender], reference: Engine, course: _Course) -> BenchReport:
    """Memory, times and agreement of every contender."""
    timed, grid, say = course.timed, course.grid, course.say
    grids = [_grid_of(c.spec, timed, grid) for c in contenders]
    peaks = list[int]()
    for contender, own in zip(contenders, grids, strict=True):  # first of all: later runs find memory allocated
        say(f"memory of {contender.name}")
        with timing.MemoryWatch() as watch:
            contender.labels(timed, own)
        peaks.append(watch.grown)
    say(f"timing a tile of {len(contenders)} contenders")
    x = tile_of(timed, reference.spec, grid.tile, course.threads)
    per_tile = timing.interleave([partial(c.run, x) for c in contenders], runs=course.runs, seconds=course.seconds)
    say(f"timing {timed.name}")
    calls = [partial(c.labels, timed, own) for c, own in zip(contenders, grids, strict=True)]
    per_window = timing.interleave(calls, runs=course.runs, seconds=course.seconds, warm_up=0)
    agreements = _compare_labels(contenders, reference, course)
    first = next((k for k, c in enumerate(contenders) if not c.is_engine), 0)
    rows = [
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
        for contender, tile, window, peak, (found, seam) in zip(
            contenders, per_tile, per_window, peaks, agreements, strict=True
        )
    ]
    no_whole = "FP32 runs the same tiles: this network or graph has no whole-image result"
    return BenchReport(
        model,
        timed.name,
        timed.shape,
        grid.tile,
        grid.count,
        course.threads or limits.threads(),
        contenders[first].name,
        tuple(sorted(rows, key=lambda row: row.mpx_per_s)),
        {},
        () if reference.spec.runs_whole else (no_whole,),
    )


def _compare_labels(
    contenders: Sequence[Contender], reference: Engine, course: _Course
) -> list[tuple[ImageParity, float | None]]:
    """Of every contender agreement with FP32 on the judged window, and what tiling alone changes, where that is known."""
    judged, spec = course.judged, reference.spec
    small = tile_grid(
        judged.shape,
        seam_tile(spec, judged.shape),
        spec.sizes,
        spec.used_outputs(),
        overlap=spec.overlap,
        placement=spec.placement,
    )
    untiled = whole_grid(spec, judged.shape) if spec.runs_whole else small
    wanted = raw_result(reference, judged, untiled, course.threads)
    agreements = list[tuple[ImageParity, float | None]]()
    for contender in contenders:
        course.say(f"labels of {contender.name}")
        got = contender.tiled(judged, _grid_of(contender.spec, judged, small))
        found, seam = parity_module.compare(wanted, got, spec.contract, judged.name), None
        if spec.runs_whole:
            seam = parity_module.compare(contender.tiled(judged, untiled), got, spec.contract, judged.name).changed
        agreements.append((found, seam))
    return agreements


def _grid_of(spec: EngineSpec, sample: SampleWindow, grid: TileGrid) -> TileGrid:
    """The tiles of an engine with the halo that is its own."""
    outputs = spec.used_outputs()
    return tile_grid(sample.shape, grid.tile, spec.sizes, outputs, overlap=spec.overlap, placement=spec.placement)
