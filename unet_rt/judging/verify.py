"""An engine against its own ``model.onnx``: FP32, whole image, the user's pixels. A judge: it never prints."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..baseline.model import Model, baseline_engine, open_model
from ..baseline.promise import broken_exam, broken_promise
from ..baseline.results import raw_results
from ..baseline.samples import ReadOptions, SampleWindow, draw, sample_images
from ..baseline.tiles import judged_tile, whole_grid
from ..building.job import Say
from ..engine import exam
from ..engine import parity as parity_module
from ..engine.budget import Budget
from ..engine.engine import Engine
from ..engine.folder import EngineFolder, read_folder
from ..engine.load import load
from ..engine.parity import ImageParity, Verdict
from ..engine.spec import EngineSpec
from ..errors import ContractError, EngineError, GraphError, ImageError
from ..images.normalize import normalize_pixels
from ..system.json import Record
from ..tiling.axis import per_axis
from ..tiling.grid import TileGrid
from .speed import Speed, measure_speed
from .truth import Array, Truth, average_truths, compare_to_labels
from .worst import Difference, Picture, draw_picture

PROMISE_WINDOWS = 3  # windows on which the FP32 graph itself is held to what was judged of it


@dataclass(frozen=True)
class VerifyReport(Record):
    """What ``verify`` measured of an engine: whether it is inside its budget, and by which numbers.

    Attributes:
        engine: The folder.
        kind: ``exam`` (the tiles that travel with the engine) or ``images``.
        verdict: Inside the budget or not, with the worst image's numbers and every image's.
        budget: What was allowed.
        seams: Largest difference of the engine tiled to the same engine on the whole canvas, of any output: what tiling
            alone does; None where not measured (exam; networks that cannot be tiled exactly).
        growth: Largest difference between the canvas and the bare image, of any judged output, for networks that run on
            any size: what growing the image to an accepted size does, apart from tiling; None where it does not apply.
        truth: Agreement with labels, where they were given.
        picture: The worst tile, where something differed.
        speed: Beside the bare library, where a bound was given.
    """

    engine: Path
    kind: str
    verdict: Verdict
    budget: Budget
    seams: ImageParity | None = None
    growth: ImageParity | None = None
    truth: Truth | None = None
    picture: Path | None = None
    notes: tuple[str, ...] = field(default=())
    speed: Speed | None = None

    @property
    def accepted(self) -> bool:
        """Whether the engine is inside its budget, and as fast as it has to be."""
        return self.verdict.accepted and (self.speed is None or self.speed.accepted)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**super().to_json(), "accepted": self.accepted}


def verify(
    engine: str | Path,
    images: Any = None,
    *,
    labels: Any = None,
    head: str | None = None,
    baseline: str | Path | None = None,
    budget: Budget | None = None,
    axes: str | None = None,
    channels: Sequence[int] | str | None = None,
    series: int | str | None = None,
    nodata: float | None = None,
    count: int = 20,
    tile: int | Sequence[int] | None = None,
    picture: str | Path | None = None,
    picture_always: bool = True,
    speed: float | None = None,
    threads: int = 0,
    say: Say | None = None,
) -> VerifyReport:
    """Holds an engine against its FP32 graph, on images or on its own exam, and returns what was measured.

    Args:
        engine: Engine folder.
        images: Files, folders or arrays; None: the exam that travels with the engine.
        labels: Masks, files of the same names as the images (or a folder of them): the number of the class per pixel,
            anything but 0 for the foreground of a binary output, a channel per class for a multi-label one.
        head: The output that the labels belong to; None: the first. All outputs are held against the FP32 graph anyway.
        baseline: ONNX file to compare with, or an engine folder, whose FP32 graph is taken (that of the last release); None:
            the engine's own ``model.onnx``.
        budget: What is allowed; None: the budget on record.
        axes, channels, series, nodata: How images are to be read.
        count: At most so many windows are compared.
        tile: Tile for the engine, a number for all axes; None: smaller than the window, so that seams are part of the
            comparison.
        picture: Where to draw the window that differs most (PNG); nothing is drawn where nothing differs.
        picture_always: Draw it although the engine is inside its budget.
        speed: How many times as long as ONNX Runtime alone, on the FP32 graph and in the same run, the engine may take for
            a tile; None: not measured.
        threads: Of backend and kernels.
        say: Receives progress in sentences.

    Raises:
        EngineError, ImageError, ContractError, BackendError: see their messages. A missed budget is not an error: look
        at ``accepted``.
    """
    say = say or (lambda _: None)
    with load(engine, threads=threads or None, accept_unverified=True) as loaded:
        folder = loaded.folder
        if folder is None:
            raise EngineError(f"{engine} is not a folder")
        allowed = (budget or exam.recorded_budget(folder)).of(loaded.spec.precision)
        chosen = loaded.spec.head(head)
        if head is not None and labels is None:
            raise ContractError("head says which output labels belong to, and there are none; pass --labels as well")
        if images is None:
            if baseline is not None:
                raise ImageError(
                    "a baseline without images: an engine's exam holds its own answers; pass --images as well"
                )
            if labels is not None:
                raise ImageError("labels without images; pass --images as well")
            if speed is not None:
                raise ImageError("speed is measured on a tile of an image; pass --images as well")
            return _verify_exam(loaded, folder, allowed, threads)
        with tempfile.TemporaryDirectory(prefix="unet-rt-verify-") as work, ExitStack() as resources:
            source = folder.file("model") if baseline is None else _baseline_graph(Path(baseline))
            model = open_model(source, Path(work), options=loaded.spec.contract)
            _check_baseline(model, loaded.spec, source)
            reference = resources.enter_context(baseline_engine(model, loaded.spec, threads=threads))
            notes = list[str]()
            samples = draw(
                sample_images(images, notes.append),
                loaded.spec.contract,
                spatial=loaded.spec.spatial,
                network_channels=loaded.spec.channels,
                read=ReadOptions(axes, channels, series, nodata),
                count=count,
                note=notes.append,
            )
            tile = None if tile is None else per_axis(tile, loaded.spec.spatial)
            pair = _Pair(loaded, reference, model, chosen, allowed, tile, threads, own_graph=baseline is None)
            target = Picture(Path(picture) if picture else None, picture_always)
            report = _verify_images(pair, samples, labels, target, say)
            beside = None if speed is None else measure_speed(loaded, model, samples[0], speed, threads)
            return replace(report, notes=(*report.notes, *notes), speed=beside)


@dataclass(frozen=True)
class _Pair:
    """An engine and its FP32 graph, and by which rules they are compared.

    Attributes:
        engine: What is verified.
        reference: Its FP32 graph, opened.
        model: What the graph says of itself.
        head: Index of the output that labels belong to.
        budget: What is allowed.
        tile: Of the engine; None: smaller than the window.
        threads: Of backend and kernels.
        own_graph: The FP32 graph is the engine's own, which was judged exact or not.
    """

    engine: Engine
    reference: Engine
    model: Model
    head: int
    budget: Budget
    tile: Sequence[int] | None
    threads: int
    own_graph: bool


@dataclass(frozen=True)
class _Comparison:
    """One window: the baseline's and the engine's values of every output, and how far they agree.

    Attributes:
        sample: The window.
        grid: The tiles of the engine.
        wanted, got: Of every output (K, *spatial), float32.
        images: Agreement of every output.
        seams: The engine in tiles against itself untiled; empty where there is no whole-image result.
        growth: The baseline on the image itself against that on its canvas; empty where it does not apply.
    """

    sample: SampleWindow
    grid: TileGrid
    wanted: list[Array]
    got: list[Array]
    images: list[ImageParity]
    seams: list[ImageParity]
    growth: list[ImageParity]


def _baseline_graph(path: Path) -> Path:
    """The FP32 graph to compare with: a file, or that of an engine."""
    return read_folder(path).file("model") if path.is_dir() else path


def _check_baseline(model: Model, spec: EngineSpec, path: Path) -> None:
    """GraphError where a baseline takes or returns other channels than the engine."""
    theirs, ours = [[o.channels for o in outputs] for outputs in (model.report.outputs, spec.outputs)]
    if (theirs, model.channels, model.spatial) != (ours, spec.channels, spec.spatial):
        there, here = (" and ".join(map(str, counts)) for counts in (theirs, ours))
        raise GraphError(
            f"{path}: a network of {model.spatial} spatial axes from {model.channels} to {there} channel(s), the engine one "
            f"of {spec.spatial} from {spec.channels} to {here}; compare with a graph of the same network"
        )


def _verify_exam(engine: Engine, folder: EngineFolder, budget: Budget, threads: int) -> VerifyReport:
    """What the tiles that travel with the engine say of it, and the first of them of the graph it was made from."""
    tiles = folder.exam()
    if tiles is None:
        raise EngineError(f"{folder.path} carries no exam; pass images with --images")
    verdict = parity_module.judge(exam.sit(engine, tiles).images, budget)
    with tempfile.TemporaryDirectory(prefix="unet-rt-verify-") as work:
        broken = broken_exam(folder.file("model"), engine.spec, tiles["input"][0], Path(work), threads)
    if broken:
        verdict = replace(verdict, accepted=False, reasons=(broken, *verdict.reasons))
    return VerifyReport(folder.path, "exam", verdict, budget)


def _broken_equality(spec: EngineSpec, seams: Sequence[ImageParity], budget: Budget) -> str:
    """Why tiles of the engine are not as equal to its whole image as its record says; "" where they are."""
    judged = [one for one in seams if one.judged]
    if spec.equal is None or spec.halo_limit is not None or not judged:
        return ""
    changes = [one.label_change for one in judged if one.label_change is not None]
    error, difference = max(one.max_abs for one in judged), max(one.relative for one in judged)
    allowed = budget.of(spec.precision)
    return spec.equal.broken_by(error, difference, max(changes) if changes else None, allowed, spec.precision)


def _verify_images(
    pair: _Pair, samples: Sequence[SampleWindow], labels: Any, picture: Picture, say: Say
) -> VerifyReport:
    """What windows of the user's images say."""
    spec, budget = pair.engine.spec, pair.budget
    found, seams, growth = list[ImageParity](), list[ImageParity](), list[ImageParity]()
    truths, worst, broken = list[Truth](), None, ""
    for k, sample in enumerate(samples):
        say(f"{k + 1}/{len(samples)}: {sample.name}")
        here = _compare(pair, sample)
        found, seams, growth = found + here.images, seams + here.seams, growth + here.growth
        worst = _choose_worse(pair, worst, here)
        if pair.own_graph and k < PROMISE_WINDOWS and not broken:
            broken = broken_promise(pair.reference, pair.model, sample, here.wanted, here.grid, pair.threads)
        if labels is not None:
            contract = spec.contract_of(pair.head)
            truths.append(
                compare_to_labels(sample, labels, here.wanted[pair.head], here.got[pair.head], contract, budget)
            )
    truth, verdict = None, parity_module.judge(found, budget)
    if truths:
        truth = average_truths(truths, spec.outputs[pair.head].name if len(spec.outputs) > 1 else "")
        if truth.drop > budget.truth:
            reason = f"{truth.image}: {truth.drop:.4f} below FP32 against the labels, budget {budget.truth:g}"
            verdict = replace(verdict, accepted=False, reasons=(*verdict.reasons, reason))
    broken = broken or _broken_equality(spec, seams, budget)
    if broken:
        verdict = replace(verdict, accepted=False, reasons=(broken, *verdict.reasons))
    no_whole = "the baseline runs the same tiles: this network or graph has no whole-image result"
    return VerifyReport(
        pair.engine.folder.path if pair.engine.folder else Path(),
        "images",
        verdict,
        budget,
        _largest(seams, budget),
        _largest(growth, budget),
        truth,
        draw_picture(picture, worst, spec, verdict, say),
        () if spec.runs_whole else (no_whole,),
    )


def _compare(pair: _Pair, sample: SampleWindow) -> _Comparison:
    """The engine in tiles against its FP32 graph on the whole of one window, where that has a result."""
    spec, threads = pair.engine.spec, pair.threads
    small = spec.grid(sample.shape, pair.tile or judged_tile(spec, sample.shape))
    grid = whole_grid(spec, sample.shape) if spec.runs_whole else small
    wanted = raw_results(pair.reference, sample, grid, threads)
    got = raw_results(pair.engine, sample, small, threads)
    images = parity_module.compare_outputs(wanted, got, spec, sample.name)
    if not spec.runs_whole:
        return _Comparison(sample, small, wanted, got, images, [], [])
    untiled = raw_results(pair.engine, sample, grid, threads)
    seams = parity_module.compare_outputs(untiled, got, spec, sample.name)
    return _Comparison(sample, small, wanted, got, images, seams, _compare_growth(pair, sample, wanted))


def _choose_worse(pair: _Pair, worst: Difference | None, window: _Comparison) -> Difference | None:
    """The judged output that uses most of its budget: that of the windows so far, or one of this."""
    for k, image in enumerate(window.images):
        used = parity_module.budget_share(image, pair.budget)
        if image.judged and (worst is None or used > worst.used):
            contract = pair.engine.spec.contract_of(k)
            worst = Difference(used, window.sample, window.wanted[k], window.got[k], contract)
    return worst


def _largest(images: Sequence[ImageParity], budget: Budget) -> ImageParity | None:
    """The largest difference: outputs of labels and of values by their budgets, below that by the values."""
    return max(images, key=lambda i: (parity_module.budget_share(i, budget), i.max_abs), default=None)


def _compare_growth(pair: _Pair, sample: SampleWindow, wanted: Sequence[Array]) -> list[ImageParity]:
    """The network on the image itself against the one on its canvas, ``wanted``: every judged output.

    Empty where the network does not run at the image's size, or that is the canvas.
    """
    spec = pair.reference.spec
    shrinks = all(any(sum(f.shrink) for f in output.field) for output in spec.outputs)
    if shrinks or spec.canvas_shape(sample.shape) == sample.shape:
        return []
    try:
        pair.model.report.activation_bytes(sample.shape)
    except GraphError:
        return []  # the graph does not run at this size: there is nothing to compare
    bare = pair.reference.run(normalize_pixels(sample.pixels, sample.numbers)[None])
    return [
        parity_module.compare_output(bare[k][0], wanted[k], spec, k, sample.name)
        for k in parity_module.judged_outputs(spec)
        if bare[k].shape[1:] == wanted[k].shape  # at another scale the canvas may have a sample more
    ]
