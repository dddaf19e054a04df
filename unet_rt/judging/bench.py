"""A user's own network on a user's own image: engines beside the libraries used directly. A judge: it never prints.

Everybody has a process of its own and gets the same pixels (a window of the image, in memory, with the whole image's
statistics), the same tile and the same threads. Two things are timed, each in rounds of all in turn: a tile (float32 array
to float32 array), and the window from its pixels to its labels. Baselines tile by hand, as a script would, or with MONAI's
sliding window.

Label agreement is that with FP32 on the whole of a smaller window, where the network allows it; the seam error is what
tiling alone changes: each contender in tiles against itself untiled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
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
from ..engine.parity import ImageParity
from ..engine.spec import EngineSpec
from ..errors import BackendError, ContractError, ImageError
from ..prediction.plan import image_grid
from ..prediction.request import normalization_of
from ..system import facts, limits, timing
from ..system.json import Record
from ..tiling.axis import per_axis
from ..tiling.grid import TileGrid, square_tile, tile_grid
from .contenders import BASELINES, EngineOptions, Entry, baseline_entries, build_engines, why_missing
from .process import ContenderProcess, Task
from .rounds import take_rounds

RUNS = 7  # rounds counted: from six on their range is a 95 % interval
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
        waited: Share of its time in which it wanted a processor that other work had, in the window; None where not known.
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
    waited: float | None = None


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
    tile: int | Sequence[int] | None = None,
    threads: int = 0,
    runs: int = RUNS,
    seconds: float = 120.0,
    say: Say | None = None,
) -> BenchReport:
    """Times an engine, or the engines of an ONNX file, beside the libraries used directly.

    Args:
        model: An engine folder; or an ONNX file, of which engines are built for every backend and precision here.
        image: A path or an array; None: drawn microscopy, on which speeds are sound and agreement proves little.
        samples: Images to build lower precisions from (ONNX files only); None: FP32 engines alone.
        baselines: Names out of ``BASELINES``; None: those that are installed.
        module: The network as a ``torch.nn.Module`` in evaluation mode, for eager PyTorch; MONAI runs it, too. It runs in a
            process of its own, which imports its class; a function without arguments that makes it does as well.
        contract: The input contract, as far as the model does not declare it (ONNX files only).
        axes, channels, series, nodata: How images are to be read.
        tile: Tile in pixels per axis, a number for all axes; None: chosen by build and for the window.
        threads: Of everybody; 0: by affinity and quota.
        runs: Rounds counted, of each of the two timings.
        seconds: For each of the two timings, rounds that are taken again included.
        say: Receives progress in sentences.

    Raises:
        BackendError: A baseline was named that is unknown or missing.
        ContractError: Options that do not belong to an engine, or a contract that is not complete.
        EngineError, GraphError, ImageError, TileError: see their messages.
    """
    say, read = say or (lambda _: None), ReadOptions(axes, channels, series, nodata)
    wanted, skipped = _choose_baselines(baselines, module)
    path, notes = Path(model), list[str]()
    size = None if tile is None else per_axis(tile, 1)
    with ExitStack() as resources:
        work = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="unet-rt-bench-")))
        if (path / "spec.json").exists() or (not path.exists() and path.suffix == ".urt"):
            if samples is not None or contract not in (None, Contract()):
                raise ContractError(
                    f"{path} is an engine, which has its contract and is built already; samples, normalisation and task "
                    "are for ONNX files"
                )
            folder = read_folder(path)
            title = f"unet-rt {folder.spec.backend} {folder.spec.precision}"
            engines = [Entry(title, folder.spec, threads, path)]
            opened = open_model(folder.file("model"), work, options=folder.spec.contract)
        else:
            opened = open_model(path, work, options=contract)
            if size is None and opened.exact:
                size = square_tile(opened.report.sizes, opened.report.outputs, UNNAMED_TILE_PX)
            engines, unbuilt = build_engines(path, EngineOptions(samples, contract, read, size, threads), work, say)
            skipped |= unbuilt
            if samples is None:
                notes.append("engines in FP32 alone: lower precisions are built from images, --samples IMAGES")
        spec = engines[0].spec
        timed, judged = (_choose_window(spec, image, read, most) for most in (TIMED_PX, JUDGED_PX))
        if image is None:
            notes.append(NO_IMAGE)
        names = [name for name in wanted if name not in skipped]
        if spec.device != "cpu" and names:
            notes.append("baselines run on the CPU")
        others, unfit = baseline_entries(names, opened.graph, spec, module, threads)
        reference = resources.enter_context(baseline_engine(opened, spec, threads=threads))
        with timed.source(spec.contract) as source:
            grid = image_grid(spec, source, tile=None if size is None else per_axis(size, spec.spatial))
        contenders = [resources.enter_context(closing(ContenderProcess(entry))) for entry in (*engines, *others)]
        for contender in contenders:
            say(f"loading {contender.name}")
            contender.open()
        course = _Course(timed, judged, grid, runs, seconds, threads, say)
        report = _measure(str(model), contenders, reference, course)
        return replace(report, skipped=skipped | unfit, notes=(*notes, *report.notes))


@dataclass(frozen=True)
class _Course:
    """What every contender is given, and how often.

    Attributes:
        timed: The window that is timed.
        judged: The window that labels are compared on.
        grid: Tiles of the timed window.
        runs: Rounds counted.
        seconds: For each of the two timings.
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


def _measure(model: str, contenders: Sequence[ContenderProcess], reference: Engine, course: _Course) -> BenchReport:
    """Memory, times and agreement of every contender."""
    timed, grid, say = course.timed, course.grid, course.say
    untiled, small = _judged_grids(reference.spec, course.judged)
    x = tile_of(timed, reference.spec, grid.tile, course.threads)
    peaks = list[int]()
    for contender in contenders:  # first of all: later runs find memory allocated
        say(f"memory of {contender.name}")
        own, judged = (_grid_of(contender.spec, w, g) for w, g in ((timed, grid), (course.judged, small)))
        whole = untiled if contender.spec.runs_whole else None
        contender.prepare(Task(x, timed, course.judged, own, judged, whole))
        peaks.append(contender.first_run())
    say(f"timing a tile of {len(contenders)} contenders")
    tiles = take_rounds([c.run_tile for c in contenders], runs=course.runs, seconds=course.seconds)
    say(f"timing {timed.name}")
    windows = take_rounds([c.run_window for c in contenders], runs=course.runs, seconds=course.seconds, warm_up=0)
    agreements = _compare_labels(contenders, reference, course)
    names = [c.name for c in contenders]
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
            timing.ratio(windows.timings[first], window),
            waited,
        )
        for contender, tile, window, waited, peak, (found, seam) in zip(
            contenders, tiles.timings, windows.timings, windows.waited, peaks, agreements, strict=True
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
        (
            *(() if reference.spec.runs_whole else (no_whole,)),
            *tiles.notes(names, "tile"),
            *windows.notes(names, "window"),
        ),
    )


def _judged_grids(spec: EngineSpec, judged: SampleWindow) -> tuple[TileGrid, TileGrid]:
    """The judged window in one tile, as far as the network allows it, and in tiles small enough to have seams."""
    small = tile_grid(
        judged.shape,
        seam_tile(spec, judged.shape),
        spec.sizes,
        spec.used_outputs(),
        overlap=spec.overlap,
        placement=spec.placement,
    )
    return (whole_grid(spec, judged.shape) if spec.runs_whole else small), small


def _compare_labels(
    contenders: Sequence[ContenderProcess], reference: Engine, course: _Course
) -> list[tuple[ImageParity, float | None]]:
    """Of every contender agreement with FP32 on the judged window, and what tiling alone changes, where that is known."""
    judged, spec = course.judged, reference.spec
    wanted = raw_result(reference, judged, _judged_grids(spec, judged)[0], course.threads)
    agreements = list[tuple[ImageParity, float | None]]()
    for contender in contenders:
        course.say(f"labels of {contender.name}")
        got = contender.values(untiled=False)
        found, seam = parity_module.compare(wanted, got, spec.contract, judged.name), None
        if contender.spec.runs_whole:
            seam = parity_module.compare(contender.values(untiled=True), got, spec.contract, judged.name).changed
        agreements.append((found, seam))
    return agreements


def _grid_of(spec: EngineSpec, sample: SampleWindow, grid: TileGrid) -> TileGrid:
    """The tiles of an engine with the halo that is its own."""
    outputs = spec.used_outputs()
    return tile_grid(sample.shape, grid.tile, spec.sizes, outputs, overlap=spec.overlap, placement=spec.placement)
