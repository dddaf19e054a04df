"""The model line in one function: candidates are measured, held against FP32 on real pixels, and one becomes the engine."""

from __future__ import annotations

import logging
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from math import floor, prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from . import backends, bench, exam, machine, parity
from .activations import overflowing, probe, tensors
from .cache import Asked, EngineCache, asked_first, asked_of, copy_folder, differs
from .calibration import Method, draw_tiles, input_ranges, split
from .contract import Contract
from .engine import Engine, EngineFolder, EngineSpec, Precision, check_target, read_folder, sha256, write_folder
from .errors import (
    BackendError,
    ContractError,
    EngineError,
    GraphError,
    ImageError,
    OutputError,
    ParityError,
    TileError,
)
from .field import size_text
from .model import (
    Model,
    baseline_engine,
    baseline_name,
    blended_spec,
    check_fp32,
    judged_tile,
    keeps,
    kept_share,
    largest_halo,
    open_models,
    seam_tile,
    square_tile,
    untiled_spec,
    whole_grid,
)
from .normalize import normalised
from .parity import BatchParity, Budget, ImageParity, Verdict
from .passes.half import half
from .passes.qdq import FORMS
from .predict import MEMORY_SHARE
from .samples import Sample, draw, raw_result, raw_results, sample_images, synthetic, tile_of
from .search import Deadline, LayerCost, Mixture, Quantiser, plain_and_ends, put_back
from .stitch import Blend
from .tiles import TileGrid, tile_grid

log = logging.getLogger("unet_rt")
Array = npt.NDArray[Any]
Say = Callable[[str], None]

PROBE_PX = 512 * 512  # tile area at which backends and precisions are compared
TILE_AREAS = (512**2, 1024**2, 1536**2, 2048**2)  # tile areas tried with the winner
LARGEST_RUN_S = 60.0  # a tile that is expected to take longer is not tried
SLOW_RUN_S = 8.0  # a tile that is expected to take longer runs once, without warm-up: its first run is 5 % slower
EXACT_COST = 1.5  # computed over kept pixels up to which the exact halo is the default
GPU_BATCHES = (1, 4, 16)  # tiles per run that are tried on a GPU
EXAM_TILES = 8
CALIBRATION_PX = 320 * 320  # tile area at which activations are looked at
CALIBRATION_FLOP = 1e12  # of all calibration tiles together: half a minute of two cores
AS_FAST = 0.95  # of the fastest speed: about the spread of measurements
Key = tuple[str, Precision, str]  # backend, precision, variant
SEARCH_MINUTES = 10.0
# How the time for the search is dealt out: the windows that parity is judged on are chosen so that the verdicts of all
# candidates take PARITY_SHARE of it; INT8 ends when the second and third share are used up, tiles when nearly all is.
PARITY_SHARE = 0.4
INT8_ENDS = 0.6
PUT_BACK_ENDS = 0.75
TILES_END = 0.95
TILED_COST = 1.6  # of a verdict over the baseline's own run: tiles have halos
INT8_RUNS = 2.0  # that INT8 costs per backend, in runs of the baseline: plain, its ends, mixtures
FEWEST_WINDOWS = 3
LEAST_OF_RANGE = 0.02  # of the declared grey levels that samples should cover: 0 to 1 is not 0 to 255


@dataclass(frozen=True)
class Candidate:
    """One measured way to run the model; ``verdict`` is None and ``note`` says why where it could not be tried.

    ``latency_ms`` is that of a run of ``batch`` tiles; ``variant`` says what is not INT8 in an INT8 graph.
    """

    backend: str
    precision: Precision
    tile: tuple[int, ...]
    batch: int = 1
    latency_ms: float | None = None
    spread_ms: tuple[float, float] | None = None
    kept_mpx_per_s: float | None = None
    peak_mb: float | None = None
    verdict: Verdict | None = None
    note: str = ""
    variant: str = ""

    def to_json(self) -> dict[str, Any]:
        data = {key: value for key, value in vars(self).items() if key != "verdict"}
        return {**data, "tile": list(self.tile), "verdict": None if self.verdict is None else self.verdict.to_json()}


@dataclass(frozen=True)
class BuildReport:
    """What build did and why.

    Attributes:
        folder: The engine folder.
        spec: Its spec.
        candidates: The measured table; ``chosen`` is the index of the engine in it.
        samples: How many windows parity was judged on; ``kind`` is ``samples`` or ``synthetic``.
        first: What the first sample looks like to the network: range, mean, deviation after normalisation, class shares.
        seams: Seam error per halo that was tried, where the halo was measured.
        whole_mismatch: For networks that cannot be tiled exactly: the difference to the whole image (reported, not judged).
        notes: Decisions, in sentences.
        warnings: What should be looked at.
        advice: The command that would make it faster or safer, without the options that were given (the command line
            puts its own in); "" where there is none.
        layers: Where plain INT8 missed the budget: what returning each layer to FP32 won and cost.
    """

    folder: Path
    spec: EngineSpec
    candidates: tuple[Candidate, ...]
    chosen: int
    kind: Literal["samples", "synthetic"]
    samples: int
    first: dict[str, Any]
    seams: dict[int, float] = field(default_factory=dict)
    whole_mismatch: ImageParity | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    advice: str = ""
    layers: tuple[LayerCost, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "spec": self.spec.to_json(),
            "candidates": [c.to_json() for c in self.candidates],
            "chosen": self.chosen,
            "kind": self.kind,
            "samples": self.samples,
            "first": self.first,
            "seams": {str(k): v for k, v in self.seams.items()},
            "whole_mismatch": None if self.whole_mismatch is None else self.whole_mismatch.to_json(),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "advice": self.advice,
            "layers": [layer.to_json() for layer in self.layers],
        }


def build(
    model: str | Path | Sequence[str | Path],
    *,
    samples: Any = None,
    out: str | Path | None = None,
    budget: Budget | None = None,
    contract: Contract | str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    tile: Sequence[int] | None = None,
    halo: str | int = "auto",
    overlap: Sequence[int] | None = None,
    blend: Blend = "gaussian",
    threads: int = 0,
    axes: str | None = None,
    channels: Sequence[int] | None = None,
    keep_exam: bool = True,
    overwrite: bool = False,
    cache: str | Path | None = None,
    search_minutes: float = SEARCH_MINUTES,
    say: Say | None = None,
    report: Callable[[BuildReport], None] | None = None,
) -> Engine:
    """Builds an engine folder and returns the loaded engine.

    Where ``out`` already holds the engine that the same model, samples and options made on this machine, or ``cache``
    does, that one is loaded and nothing is built.

    Args:
        model: ONNX file, bioimage.io package or ``rdf.yaml``; several (folds) become one engine of their mean probability.
        samples: A path, several paths, or arrays: images like those the network will see. None: generated ones, which
            prove FP32 only.
        out: The folder; default: the model's name with ``.urt``, ``ensemble.urt`` for several.
        budget: What may differ from FP32.
        contract: A :class:`Contract` (wins over the model's metadata), or the path of its JSON.
        backend: ``auto`` or a backend's name.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        precision: ``auto``, ``fp32``, ``fp16`` (GPUs), ``bf16`` or ``int8`` (with layers in FP32 where the budget needs it).
        tile: Tile in pixels per axis; None: measured (exact networks), trained tile (others).
        halo: ``auto``, ``exact``, ``measured``, or a number of samples.
        overlap: Pixels shared by blended tiles per axis; default half a tile. Not for exact networks.
        blend: Weights of blended tiles.
        threads: Of backend and kernels; 0: by affinity and quota.
        axes, channels: How samples are to be read.
        keep_exam: Whether a few tiles travel with the engine.
        overwrite: Replace an existing engine, whatever it was built from.
        cache: Folder that keeps engines by everything that decided them (see :mod:`unet_rt.cache`).
        search_minutes: Time for the search; what there is no time for is said in the report. At least one verdict per
            candidate is reached in any case.
        say: Receives progress in sentences.
        report: Receives the :class:`BuildReport`; not called where nothing was built.

    Raises:
        ParityError: No candidate is inside the budget.
        GraphError, ContractError, TileError, ImageError, BackendError, OutputError: see their messages.
    """
    from .engine import load

    deadline = Deadline(time.monotonic(), 60 * search_minutes)
    if not 0 < search_minutes < float("inf"):
        raise ContractError(f"search_minutes={search_minutes} is not a time; pass minutes above 0")
    say = _timed(say or log.info, deadline)
    paths = [Path(model)] if isinstance(model, str | Path) else [Path(one) for one in model]
    if not paths:
        raise ContractError("no model is given; pass an ONNX file, or several of them")
    path = paths[0] if len(paths) == 1 else Path("ensemble.onnx")
    folder = Path(out) if out is not None else Path(path.name).with_suffix(".urt")
    where, names = _backends(backend, device)
    precisions = _precisions(precision, where)
    budget = budget or Budget()
    asked = asked_first(
        {
            "budget": vars(budget),
            "backends": names,
            "precision": precision,
            "tile": tile,
            "halo": halo,
            "overlap": overlap,
            "blend": blend,
            "threads": threads or machine.threads(),
            "exam": keep_exam,
            "minutes": search_minutes,
        },
        where,
    )
    same = None if overwrite else _same_engine(folder, asked)
    if same is None:
        check_target(folder, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="unet-rt-build-") as temporary, ExitStack() as opened_engines:
        work = Path(temporary)
        options = contract if isinstance(contract, Contract) else None
        file = Path(contract) if isinstance(contract, str | Path) else None
        opened = open_models(paths, work, options=options, contract=file)
        check_fp32(opened.graph, path.name)
        if samples is None and "fp32" not in precisions:
            what = "to calibrate and to prove parity on" if "int8" in precisions else "to prove parity on"
            raise ContractError(f"precision {precision} needs samples {what}; pass --samples IMAGES")
        if samples is None:
            precisions = ("fp32",)
        builder = opened_engines.enter_context(closing(_Build(opened, work, budget, threads, say, where, deadline)))
        builder.read_samples(samples, axes, channels)
        builder.asked = {**asked, **asked_of(opened.given, builder.model.contract, builder.samples)}
        kept = EngineCache(cache) if cache is not None else None
        if _reused(folder, same, kept, builder.asked, overwrite=overwrite, say=say):
            return load(folder, threads=threads or None)
        precisions = builder.calibration_samples(names, precisions, explicit=precision != "auto")
        builder.resolve_task()
        builder.deal_time(names, precisions)
        builder.choose_tiling(tile, halo, overlap, blend)
        builder.try_candidates(names, precisions, explicit=backend != "auto" or precision != "auto")
        builder.choose(tile)
        command = ["unet-rt", "build", *map(str, paths)]
        try:
            result = builder.write(folder, keep_exam=keep_exam, overwrite=overwrite, command=command)
        except OutputError:
            if overwrite or not _holds(folder, builder.asked):
                raise
            say(f"{folder} was built by another process meanwhile")  # from the same: either engine is what was asked
            return load(folder, threads=threads or None)
        _keep(kept, folder, builder.asked, say)
    if report is not None:
        report(result)
    return load(folder, threads=threads or None)


def _timed(say: Say, deadline: Deadline) -> Say:
    """Progress beside the time that it took and may take."""
    return lambda text: say(f"{deadline.spent:.0f} of {deadline.seconds:.0f} s: {text}")


def _same_engine(folder: Path, asked: Asked) -> EngineFolder | None:
    """The engine in ``folder`` that may be what was asked, as far as that is known yet.

    Raises:
        OutputError: It is another one.
    """
    try:
        found = read_folder(folder)
    except EngineError:
        return None
    other = differs(found, asked)
    if other:
        raise OutputError(_another(folder, other))
    return found


def _holds(folder: Path, asked: Asked) -> bool:
    """Whether a folder holds the engine that was asked for."""
    try:
        return not differs(read_folder(folder), asked)
    except EngineError:
        return False


def _another(folder: Path, other: Sequence[str]) -> str:
    return (
        f"{folder} exists, and was built from another {', '.join(other)}; pass --overwrite to replace it, or choose "
        "another --out"
    )


def _reused(
    folder: Path, same: EngineFolder | None, kept: EngineCache | None, asked: Asked, *, overwrite: bool, say: Say
) -> bool:
    """Whether ``folder`` holds what was asked: since an earlier build, or from the cache."""
    if same is not None:
        other = differs(same, asked)
        if other:
            raise OutputError(_another(folder, other))
        say(f"{folder} is up to date")
        _keep(kept, folder, asked, say)
        return True
    found = None if kept is None else kept.get(asked)
    if found is None:
        return False
    try:
        copy_folder(found, folder, overwrite=overwrite)
    except (EngineError, OutputError) as error:
        say(f"not taken from the cache: {error}")
        return False
    say(f"{folder} comes from the cache")
    return True


def _keep(kept: EngineCache | None, folder: Path, asked: Asked, say: Say) -> None:
    """Puts a finished engine into the cache; what stands in the way of that does not take the engine back."""
    if kept is None:
        return
    try:
        kept.put(read_folder(folder), asked)
    except (EngineError, OutputError, OSError) as error:
        say(f"not kept in the cache: {error}")


def _backends(backend: str, device: str) -> tuple[str, list[str]]:
    """The device, and the backends to try on it."""
    where = backends.device(device)
    if backend == "auto":
        return where, backends.require(where)
    module = backends.get(backend)
    if device == "auto" and where != "cpu" and module.missing(where) is not None and module.missing() is None:
        where = "cpu"  # a backend for CPUs was asked by name on a machine with a GPU
    missing = module.missing(where)
    if missing is not None:
        raise BackendError(missing)
    return where, [backend]


def _precisions(precision: str, device: str) -> tuple[Precision, ...]:
    if precision == "auto":
        return ("fp32", "bf16", "int8") if device == "cpu" else ("fp32", "fp16")
    for known in get_args(Precision):
        if precision == known:
            return (known,)
    raise ContractError(f"precision {precision!r} is not one of auto, {', '.join(get_args(Precision))}")


class _Build:
    """The steps of one build, in the order in which ``build`` calls them; each fills in what the next needs."""

    def __init__(
        self,
        model: Model,
        work: Path,
        budget: Budget,
        threads: int,
        say: Say,
        device: str = "cpu",
        deadline: Deadline | None = None,
    ):
        self.deadline = deadline or Deadline(time.monotonic(), 60 * SEARCH_MINUTES)
        self.asked: Asked = {}
        self.parity_seconds = PARITY_SHARE * self.deadline.seconds  # for the baseline on the samples
        self.left_out: list[str] = []  # what there was no time for
        self.model, self.work, self.budget, self.threads, self.say = model, work, budget, threads, say
        self.spec = replace(untiled_spec(model), device=device)
        self.baseline = baseline_engine(model, self.spec, threads=threads)
        self.notes: list[str] = []
        if model.members:
            what = "value" if model.contract.task == "regression" else "probability"
            self.notes.append(f"the mean {what} of {len(model.members)} networks: {', '.join(model.members)}")
        self.notes += [f"{what} made free: the graph allows any accepted size there" for what in model.freed]
        self.notes += [f"size stays fixed: {why}" for why in model.fixed]
        self.notes += model.left_out
        self.warnings: list[str] = []
        self.seams: dict[int, float] = {}
        self.batches_judged = {1}  # tiles per run
        self.files: dict[Engine, tuple[Path, Path | None]] = {}  # graph and plan of every engine
        self.count = 0  # of graphs made by a pass
        self.islands: frozenset[str] | None = None  # nodes that FP16 would overflow in; None: not looked for yet
        self.quantiser: Quantiser | None = None
        self.calibrating: list[Sample] = []
        self.calibration_whole: list[list[Array]] = []  # the baseline's outputs on them
        self.kept: dict[Engine, frozenset[str]] = {}  # layers in FP32 of every INT8 engine
        self.whole: list[list[Array]] = []  # the baseline's outputs on every sample
        self.rows: dict[Key, tuple[BatchParity, ...]] = {}  # of every candidate, per batch size and output
        self.wanted_tile: list[Array] = []  # the baseline's outputs on the tile that they were judged on
        self.mismatch: ImageParity | None = None
        self.first: dict[str, Any] = {}

    # 1 ---------------------------------------------------------------------------------------------------------------

    def read_samples(self, samples: Any, axes: str | None, channels: Sequence[int] | None) -> None:
        contract = self.model.contract
        self.kind: Literal["samples", "synthetic"] = "synthetic" if samples is None else "samples"
        spatial, wanted = self.model.spatial, self.model.channels
        if samples is None:
            self.samples = synthetic(contract, wanted, spatial)
            self.value_range = self.input_range = None
            return
        images = sample_images(samples)
        if contract.normalization is None:
            self._without_normalization(images, axes, channels)
        contract = self.model.contract
        self.samples = draw(
            images,
            contract,
            spatial=spatial,
            network_channels=wanted,
            axes=axes,
            channels=channels,
            note=self.notes.append,
        )
        lows, highs = zip(*((float(s.pixels.min()), float(s.pixels.max())) for s in self.samples), strict=True)
        self.value_range = (min(lows), max(highs))
        seen = np.stack([input_ranges(sample) for sample in self.samples])
        self.input_range = np.stack([seen[..., 0].min(axis=0), seen[..., 1].max(axis=0)], axis=1).tolist()
        if len(images) < 3:
            self.notes.append(f"parity rests on {len(images)} image(s); three or more prove more")
        self.say(f"samples: {len(self.samples)} windows; {self.samples[0].reading}")

    def calibration_samples(
        self, names: Sequence[str], precisions: Sequence[Precision], *, explicit: bool
    ) -> tuple[Precision, ...]:
        """Sets windows aside to calibrate INT8 on, if it is to be tried; returns the precisions that can be."""
        device = self.spec.device
        usable = any("int8" in backends.get(name).precisions(device) and name in FORMS for name in names)
        if "int8" not in precisions or (not usable and not explicit):
            return tuple(p for p in precisions if p != "int8")
        try:
            self.calibrating, self.samples, note = split(self.samples)
        except ImageError as error:
            if explicit:
                raise
            self.notes.append(f"INT8 was not tried: {error}")
            return tuple(p for p in precisions if p != "int8")
        self.notes.append(note)
        return tuple(precisions)

    def _without_normalization(self, images: Sequence[Any], axes: str | None, channels: Sequence[int] | None) -> None:
        from .contract import Normalization
        from .contract_io import missing_normalization
        from .image import open_image

        with open_image(
            images[0],
            self.model.contract,
            axes=axes,
            channels=channels,
            spatial=self.model.spatial,
            network_channels=self.model.channels,
        ) as source:
            if source.dtype.kind in "iu":
                raise missing_normalization(source)
        self.model = replace(self.model, contract=replace(self.model.contract, normalization=Normalization("none")))
        self.notes.append("no normalisation is declared and the samples are floating point: used as they are")

    # 2 ---------------------------------------------------------------------------------------------------------------

    def resolve_task(self) -> None:
        from .contract_io import resolve_heads

        report = self.model.report
        tile = square_tile(self.spec.sizes, self.spec.outputs, 256 * 256)
        values = [self.baseline.run(tile_of(s, self.spec, tile, self.threads)) for s in self.samples[:4]]
        contract = resolve_heads(
            self.model.contract,
            [(o.name, o.channels, final) for o, final in zip(report.outputs, report.final_ops, strict=True)],
            [np.concatenate(ys) for ys in zip(*values, strict=True)],
            # generated tiles tell nothing of what the values mean, and need not: parity of FP32 is held on the values
            left_open=self._leave_open if self.kind == "synthetic" else None,
        )
        if self.value_range is not None and contract.value_range is None:
            contract = replace(contract, value_range=self.value_range)
        elif self.value_range is not None and contract.value_range is not None:
            self._compare_ranges(contract.value_range, self.value_range)
        self.notes += [
            f"output {head.name} is not judged, only measured: neither heads of the contract nor its last operator say "
            "what it means"
            for head in contract.heads
            if head.task is None
        ]
        self.spec = replace(self.spec, contract=contract)
        self.baseline.spec = replace(self.baseline.spec, contract=contract)

    def _leave_open(self, readings: str) -> None:
        self.warnings.append(f"{readings}; until then predict gives the values themselves (--output raw), and no mask")

    def _compare_ranges(self, declared: tuple[float, float], seen: tuple[float, float]) -> None:
        """A warning where samples hold other grey levels than the model declares: most often another bit depth."""
        beyond = seen[0] < declared[0] or seen[1] > declared[1]
        if beyond or seen[1] - seen[0] < LEAST_OF_RANGE * (declared[1] - declared[0]):
            self.warnings.append(
                f"the samples run from {seen[0]:g} to {seen[1]:g}, and the model declares {declared[0]:g} to "
                f"{declared[1]:g}: look at their bit depth and --normalize first, results are proven for what was passed"
            )

    def _describe_first(self) -> None:
        """What the first sample looks like to the network, and what it makes of it: all of the sample."""
        contract, raw = self.spec.contract_of(0), self.whole[0][0]
        x = normalised(self.samples[0].pixels, self.samples[0].numbers)
        self.first = {
            "name": self.samples[0].name,
            "reading": self.samples[0].reading,
            "input_range": [float(x.min()), float(x.max())],
            "input_mean": float(x.mean()),
            "input_std": float(x.std()),
        }
        if not contract.has_labels:
            self.first["output_range"] = [float(raw.min()), float(raw.max())]
            if raw.max() == raw.min():
                self.warnings.append(
                    f"the output is constant ({raw.max():g}): check --normalize first, then --channels"
                )
            return
        masks = parity.labels(raw, contract)
        shares = {key: float(mask.mean()) for key, mask in parity.class_masks(masks, contract, len(raw))}
        self.first["class_share"] = shares
        if masks.min() == masks.max():
            self.warnings.append(
                f"the mask of {self.samples[0].name} is constant ({int(masks.max())} everywhere): most often the "
                "normalisation is not the one of the training; check --normalize first, then --channels, --task, --output-is"
            )
        elif parity.saturated(raw, contract) > 0.999:
            self.warnings.append(
                f"the output of {self.samples[0].name} is saturated (nearly every probability is 0 or 1 to six digits): "
                "check --normalize first, then --output-is"
            )

    def deal_time(self, names: Sequence[str], precisions: Sequence[Precision]) -> None:
        """How long the baseline may run on samples, so that as many can be judged for every candidate."""
        floats = len(names) * sum(p != "int8" for p in precisions)
        runs = 1 + TILED_COST * floats + INT8_RUNS * len(names) * ("int8" in precisions)
        self.parity_seconds = PARITY_SHARE * self.deadline.seconds / runs

    # 3 ---------------------------------------------------------------------------------------------------------------

    def choose_tiling(
        self, tile: Sequence[int] | None, halo: str | int, overlap: Sequence[int] | None, blend: Blend
    ) -> None:
        if not self.model.exact:
            if halo not in ("auto",):
                raise TileError(
                    f"--halo {halo}: this network cannot be tiled exactly ({self.model.reasons[0]}); its tiles are blended"
                )
            self.spec = blended_spec(self.spec, tile, self.model.given, blend=blend, overlap=overlap)
            self.notes.append(
                f"not exact: {self.model.reasons[0]}; tile {size_text(self.spec.tile)} px is part of the model, "
                f"blended ({blend}) with overlap {size_text(self.spec.overlap or ())} px"
            )
        else:
            if overlap is not None:
                raise TileError("--overlap is for networks that cannot be tiled exactly; this one needs none")
            probe = tuple(tile) if tile is not None else square_tile(self.spec.sizes, self.spec.outputs, PROBE_PX)
            self._check_tile(probe)
            self.spec = replace(self.spec, tile=probe)
            self._choose_halo(halo, fixed_tile=tile is not None)
        self.baseline.spec = replace(self.spec, backend=self.baseline.spec.backend, device="cpu")
        self._whole_results()
        self._describe_first()

    def _check_tile(self, tile: Sequence[int]) -> None:
        self.spec.grid((1,) * self.model.spatial, tile)
        tile_grid(tile, tile, self.spec.sizes, self.spec.outputs)  # raises for sizes that the graph does not accept

    def _choose_halo(self, halo: str | int, *, fixed_tile: bool) -> None:
        exact = largest_halo(self.spec)
        if isinstance(halo, int) or halo.isdigit():
            limit = int(halo)
            if limit < 0:
                raise TileError(f"halo {limit} is negative; use 0 or more samples, exact or measured")
            note = f"halo {min(limit, exact)} samples as given; {exact} would be exact"
            if limit < exact:
                if self.kind == "samples" and self.spec.free_size and self._seams_can_be_seen(limit):
                    self._seam(limit)
                    note += f"; {self._seam_text(limit)}"
                self.spec = replace(self.spec, halo="given", halo_limit=limit)
            self.notes.append(note)
        elif halo == "measured":
            self._measure_halo()
        elif halo in ("auto", "exact"):
            largest = (
                self.spec.tile
                if fixed_tile or not self.spec.free_size
                else square_tile(self.spec.sizes, self.spec.outputs, TILE_AREAS[-1])
            )
            share = kept_share(self.spec, largest)
            cost = f"{1 / share:.2f} times the work" if share else "more than such a tile holds"
            if halo == "exact" or (share and 1 / share <= EXACT_COST):
                self.notes.append(f"exact halo ({exact} samples): {cost} at tiles of {size_text(largest)} px")
            elif self.kind == "synthetic" or not self._seams_can_be_seen():
                self.notes.append(
                    f"exact halo ({exact} samples) costs {cost} at tiles of {size_text(largest)} px; "
                    "with --samples larger than a tile a smaller one is measured"
                )
            else:
                self.notes.append(
                    f"the exact halo ({exact} samples) costs {cost} at tiles of {size_text(largest)} px, so it was measured"
                )
                self._measure_halo()
        else:
            raise TileError(f"--halo {halo!r} is not exact, measured or a number of samples")
        if not keeps(self.spec, self.spec.tile):
            tile = square_tile(self.spec.sizes, self.spec.used_outputs(), PROBE_PX)
            if fixed_tile:
                raise TileError(
                    f"a tile of {size_text(self.spec.tile)} px keeps nothing beside its halo; "
                    f"use {size_text(tile)} or more, or --halo measured"
                )
            self.spec = replace(self.spec, tile=tile)

    def _seam_grids(self, sample: Sample, limit: int) -> list[TileGrid]:
        """Up to three arrangements of tiles small enough for a sample to have seams, where the halo allows it.

        More than one, because what a seam changes depends on where it runs: objects may lie beside all seams of one.
        """
        spec = replace(self.spec, halo="measured", halo_limit=limit)
        outputs = spec.used_outputs()
        first = seam_tile(spec, sample.shape)
        tiles = {first}
        for share in (0.6, 0.8):
            tile = tuple(s.at_most(int(t * share)) for t, s in zip(first, spec.sizes, strict=True))
            if spec.free_size and keeps(spec, tile):
                tiles.add(tile)
        return [tile_grid(sample.shape, tile, spec.sizes, outputs) for tile in sorted(tiles)]

    def _seams_can_be_seen(self, limit: int = 8) -> bool:
        """Whether tiles with a halo of ``limit`` samples cut at least one sample: what no seam shows is not measured."""
        return any(grid.count > 1 for sample in self.samples for grid in self._seam_grids(sample, limit))

    def _seam(self, limit: int) -> float:
        """What the seams of a halo of ``limit`` samples change on the worst sample; remembered in ``seams``."""
        self._whole_results()
        error = 0.0
        for sample, whole in zip(self.samples, self.whole, strict=True):
            for grid in self._seam_grids(sample, limit):
                results = raw_results(self.baseline, sample, grid, self.threads)
                found = parity.compare_outputs(whole, results, self.spec, sample.name)
                error = max(error, *(one.changed for one in found if one.judged))
        self.seams[limit] = error
        return error

    def _seam_text(self, limit: int) -> str:
        what = "the output by {:.2e} of its range" if not self.spec.contract.has_labels else "{:.2e} of labels"
        return f"seams change {what.format(self.seams[limit])} on the worst sample"

    def _measure_halo(self) -> None:
        """The smallest halo, in steps of 8 samples, whose seams change no more labels than the seam budget allows."""
        if self.kind == "synthetic":
            raise ContractError("--halo measured needs images to measure on; pass --samples IMAGES")
        if not self._seams_can_be_seen():
            raise ImageError("the samples are no larger than one tile, so seams cannot be measured; pass larger ones")
        self._whole_results()  # which may leave samples out, to keep the search short
        exact = largest_halo(self.spec)
        steps = -(-exact // 8)  # of 8 samples; the exact halo is the end of the range
        seen = next((k for k in reversed(range(steps)) if self._seams_can_be_seen(8 * k)), -1)
        self.say(f"measuring the halo on {len(self.samples)} samples")
        low, high = 0, seen + 1
        while low < high:
            middle = (low + high) // 2
            if self._seam(middle * 8) <= self.budget.seam:
                high = middle
            else:
                low = middle + 1
        if high > seen:
            note = (
                f"no halo below the exact {exact} samples is inside the seam budget {self.budget.seam:g}: exact it is"
            )
            if seen + 1 < steps:
                note = (
                    f"no halo up to {8 * max(seen, 0)} samples is inside the seam budget {self.budget.seam:g}, and the "
                    f"samples are too small to see the seams of larger ones: the exact {exact} it is; larger samples may "
                    "allow less"
                )
            self.notes.append(note)
            return
        limit = high * 8
        self.spec = replace(self.spec, halo="measured", halo_limit=limit)
        self.notes.append(
            f"measured halo {limit} samples (exact: {exact}): {self._seam_text(limit)}, budget {self.budget.seam:g}"
        )

    def _whole_results(self) -> None:
        """The baseline on every sample; for a network that cannot be tiled exactly, also what tiling it changes."""
        if self.whole:
            return
        kept, spent = [], 0.0
        for k, sample in enumerate(self.samples):
            with _Stopwatch() as watch:
                self.whole.append(self._baseline_results(sample))
            kept.append(sample)
            spent += watch.seconds
            self.say(f"baseline {k + 1}/{len(self.samples)}: {sample.name}")
            least = FEWEST_WINDOWS if self.kind == "samples" else 1
            if k + 1 >= least and spent * (k + 2) / (k + 1) > self.parity_seconds and k + 1 < len(self.samples):
                self.left_out.append(f"parity is judged on {k + 1} of {len(self.samples)} sample windows")
                break
        self.samples = kept
        if not self.spec.exact and self.spec.free_size:
            sample = self.samples[0]
            grid = whole_grid(replace(self.spec, overlap=None), sample.shape)
            untiled = raw_result(self.baseline, sample, grid, self.threads)
            self.mismatch = parity.compare(untiled, self.whole[0][0], self.spec.contract_of(0), sample.name)

    def _baseline_results(self, sample: Sample) -> list[Array]:
        """What every engine is compared with: whole where there is a whole-image result, in the same tiles otherwise."""
        spec = self.spec
        grid = whole_grid(spec, sample.shape) if spec.runs_whole else spec.grid(sample.shape, spec.tile)
        return raw_results(self.baseline, sample, grid, self.threads)

    # 4 ---------------------------------------------------------------------------------------------------------------

    def try_candidates(self, names: Sequence[str], precisions: Sequence[Precision], *, explicit: bool) -> None:
        self.candidates: list[Candidate] = []
        self.engines: dict[Key, Engine] = {}
        verdicts: dict[Key, Verdict] = {}
        tile = self.spec.tile
        batches = self._batches(tile)
        found: dict[str, list[Mixture]] = {}
        for precision in precisions:
            for name in names:
                self.say(f"building {name} {precision}")
                try:
                    if precision == "int8":
                        found[name] = self._mixtures(name, tile, batches)
                    else:
                        self.engines[name, precision, ""] = self._engine(name, precision, tile, batches)
                except (BackendError, GraphError) as error:
                    if explicit and len(names) * len(precisions) == 1:
                        raise
                    self.candidates.append(Candidate(name, precision, tile, note=str(error)))
        self._put_back(found, tile, batches, verdicts)
        for name, mixtures in found.items():
            for mixture in mixtures:
                self.engines[name, "int8", mixture.label] = mixture.engine
                self.kept[mixture.engine] = mixture.keep
                verdicts[name, "int8", mixture.label] = mixture.verdict
        if not self.engines:
            raise BackendError("no candidate could be built: " + "; ".join(c.note for c in self.candidates))
        self._measure(verdicts, tile, batches)

    def _measure(self, verdicts: dict[Key, Verdict], tile: tuple[int, ...], batches: Sequence[int]) -> None:
        """Speed and verdict of every engine, as candidates; one that cannot be run is a candidate with a note."""
        x = tile_of(self.samples[0], self.spec, tile, self.threads)
        self.say(f"measuring {len(self.engines)} candidates at tile {size_text(tile)}")
        runs = [(key, batch) for key in self.engines for batch in batches]
        timings = dict(zip(runs, self._times([(self.engines[key], tile, n) for key, n in runs]), strict=True))
        for key, engine in self.engines.items():
            ran = [n for n in batches if not isinstance(timings[key, n], BackendError)]
            if not ran:
                continue
            self.say(f"parity of {' '.join(key).rstrip()}")
            try:
                verdicts[key] = self._same_rows(engine, x, verdicts.get(key) or self._verdict(engine), ran, key)
            except BackendError as error:
                for n in ran:
                    timings[key, n] = error
        for (key, batch), timing in timings.items():
            candidate = Candidate(key[0], key[1], tile, batch, variant=key[2])
            if isinstance(timing, BackendError):
                self.candidates.append(replace(candidate, note=str(timing)))
            else:
                self.candidates.append(self._measured(candidate, tile, timing, verdicts[key]))
        if all(c.verdict is None for c in self.candidates):
            raise BackendError("no candidate could be run: " + "; ".join(c.note for c in self.candidates))

    def _mixtures(self, name: str, tile: tuple[int, ...], batches: Sequence[int]) -> list[Mixture]:
        """INT8 for one backend: plain, and with its ends in FP32."""
        backend = backends.get(name)
        if name not in FORMS or "int8" not in backend.precisions(self.spec.device):
            raise BackendError(f"{name} has no int8 on {self.spec.device} here")
        if self.quantiser is None:
            side = self._calibration_tile()
            count = int(np.clip(CALIBRATION_FLOP / (self.model.report.flops_per_pixel * prod(side) + 1), 6, 48))
            tiles = draw_tiles(self.calibrating, self.spec, side, count, self.threads)
            windows = tuple((s.name, s.sha256) for s in self.calibrating)
            self.quantiser = Quantiser(
                self.model.graph,
                self.baseline,
                tiles,
                budget=self.budget,
                windows=windows,
                threads=self.threads,
                say=self.say,
            )
            self.quantiser.left_out, self.quantiser.refused = self.left_out, self.notes
        make = self._maker(self.quantiser, name, tile, batches)
        return plain_and_ends(self.quantiser, make, self._drop, self._verdict, self.deadline, INT8_ENDS)

    def _maker(
        self, quantiser: Quantiser, name: str, tile: tuple[int, ...], batches: Sequence[int]
    ) -> Callable[[frozenset[str], Method], Engine]:
        def make(keep: frozenset[str], method: Method) -> Engine:
            source = self.work / "quantised.onnx"
            quantiser.write(source, name, keep, method)
            return self._engine(name, "int8", tile, batches, source=source)

        return make

    def _drop(self, engine: Engine) -> None:
        engine.close()
        self.files.pop(engine)[0].unlink(missing_ok=True)  # as large as the network, and there may be dozens

    def _put_back(
        self,
        found: dict[str, list[Mixture]],
        tile: tuple[int, ...],
        batches: Sequence[int],
        verdicts: dict[Key, Verdict],
    ) -> None:
        """Layers returned to FP32 where a backend's INT8 misses the budget, and would be the fastest inside it.

        Whether BF16 and FP16 are inside is found out here, and kept in ``verdicts``; FP32 is taken to be.
        """
        waiting = [name for name, mixtures in found.items() if not any(m.verdict.accepted for m in mixtures)]
        if not waiting or self.quantiser is None:
            return
        inside = [m.engine for mixtures in found.values() for m in mixtures if m.verdict.accepted]
        for key, engine in self.engines.items():
            if key[1] != "fp32":
                try:
                    verdicts[key] = self._verdict(engine)
                except BackendError:  # it cannot be run, as ``_measure`` finds and says
                    continue
            if key[1] == "fp32" or verdicts[key].accepted:
                inside.append(engine)
        fastest = min((self._quick_seconds(engine, tile) for engine in inside), default=float("inf"))
        seconds = {name: self._quick_seconds(found[name][0].engine, tile) for name in waiting}
        for name in sorted(waiting, key=lambda name: seconds[name]):
            if seconds[name] >= fastest:  # and layers in FP32 make no engine faster
                self.notes.append(
                    f"{name} int8 is outside the budget and no faster than what is inside: no layers were returned to FP32"
                )
                continue
            make = self._maker(self.quantiser, name, tile, batches)
            try:
                mixture = put_back(
                    self.quantiser, found[name], make, self._drop, self._verdict, self.deadline, PUT_BACK_ENDS
                )
            except (BackendError, GraphError) as error:  # what is inside the budget already is none the worse for it
                self.notes.append(f"{name} int8: layers were returned to FP32 until {error}")
                continue
            if mixture is None:
                self.notes.append(f"{name} int8 was not brought inside the budget by returning layers to FP32")
            else:
                found[name].append(mixture)
                fastest = min(fastest, self._quick_seconds(mixture.engine, tile))

    def _quick_seconds(self, engine: Engine, tile: tuple[int, ...]) -> float:
        """Of one run, roughly: what is worth searching on with; candidates are compared by ``_times``."""
        (timing,) = self._times([(engine, tile, 1)], runs=2, seconds=5.0)
        return float("inf") if isinstance(timing, BackendError) else timing.low_s

    def _engine(
        self,
        name: str,
        precision: Precision,
        tile: tuple[int, ...],
        batches: Sequence[int],
        source: Path | None = None,
    ) -> Engine:
        """The model built for one backend and precision, loaded; a plan takes this tile and these batches alone."""
        backend, stem = backends.get(name), f"{name}-{precision}-{size_text(tile)}"
        if precision == "fp16":
            source = self._half_with_islands()
        if source is not None:
            self.count += 1
            stem += f"-{self.count}"
        graph, blob = self.work / f"{stem}.onnx", self.work / f"{stem}.bin"
        backend.build(
            source or self.model.graph,
            graph,
            precision=precision,
            device=self.spec.device,
            blob=blob,
            tiles=[tile],
            batches=batches,
        )
        plan = blob if blob.exists() else None
        session = backend.load(graph, precision=precision, device=self.spec.device, threads=self.threads, blob=plan)
        spec = replace(self.spec, backend=name, precision=precision, tile=tile)
        if plan is not None:
            sizes = tuple(replace(s, fixed=t) for s, t in zip(spec.sizes, tile, strict=True))
            spec = replace(spec, sizes=sizes, batches=tuple(batches))
        engine = Engine(spec, session)
        self.files[engine] = (graph, plan)
        return engine

    def _calibration_tile(self) -> tuple[int, ...]:
        """The tile at which activations are looked at: the model's own where it is part of the model."""
        if self.spec.runs_whole:
            return square_tile(self.spec.sizes, self.spec.outputs, CALIBRATION_PX)
        return self.spec.tile

    def _half_with_islands(self) -> Path | None:
        """The graph in FP16 with FP32 islands where activations of the samples leave FP16's range; None if none do."""
        if self.kind != "samples":
            return None
        path = self.work / "half-with-islands.onnx"
        if self.islands is None:
            import onnx

            proto = onnx.load(str(self.model.graph))
            tile = self._calibration_tile()
            tiles = (self.baseline.graph_inputs(tile_of(s, self.spec, tile, self.threads)) for s in self.samples[:4])
            found = probe(proto, tensors(proto), tiles, threads=self.threads)
            self.islands = overflowing(proto, found)
            if self.islands:
                half(proto, islands=self.islands)
                onnx.save_model(proto, str(path))
                count = f"{len(self.islands)} node{'s' * (len(self.islands) != 1)}"
                self.notes.append(f"FP16 keeps {count} in FP32, where activations of the samples leave its range")
        return path if self.islands else None

    def _batches(self, tile: Sequence[int]) -> tuple[int, ...]:
        """Tiles per run to try: one on a CPU, whose cores one tile keeps busy; several on a GPU, as memory allows."""
        if self.spec.device == "cpu" or self.model.report.batch is not None:
            return (1,)
        return tuple(n for n in GPU_BATCHES if n == 1 or self._fits(tile, n))

    def _fits(self, tile: Sequence[int], batch: int) -> bool:
        """Whether a GPU has the memory for a batch: live activations, twice, for workspaces and the network itself."""
        from .device import Device

        free = Device.open(machine.cuda_index(self.spec.device)).memory()[0]
        return 2 * self.model.report.activation_bytes(tile, batch) < free

    def _times(
        self, jobs: Sequence[tuple[Engine, tuple[int, ...], int]], **options: Any
    ) -> list[bench.Timing | BackendError]:
        """Interleaved times of (engine, tile, batch); for one that cannot be run, what its backend says."""
        with ExitStack() as stack:
            contenders = list[_Run]()
            for engine, tile, batch in jobs:
                x = np.repeat(tile_of(self.samples[0], self.spec, tile, self.threads), batch, axis=0)
                contenders.append(stack.enter_context(closing(_Run(engine, x))))
            timings = bench.interleave(contenders, **options)
            return [run.error or run.of(timing) for run, timing in zip(contenders, timings, strict=True)]

    def _measured(
        self, candidate: Candidate, tile: tuple[int, ...], timing: bench.Timing, verdict: Verdict | None
    ) -> Candidate:
        return replace(
            candidate,
            tile=tile,
            latency_ms=timing.median_s * 1e3,
            spread_ms=(timing.low_s * 1e3, timing.high_s * 1e3),
            kept_mpx_per_s=candidate.batch * prod(tile) * kept_share(self.spec, tile) / timing.median_s / 1e6,
            peak_mb=timing.peak_bytes / 1e6,
            verdict=verdict,
        )

    def _verdict(self, engine: Engine) -> Verdict:
        images: list[ImageParity] = []
        for sample, whole in zip(self.samples, self.whole, strict=True):
            grid = engine.spec.grid(sample.shape, judged_tile(engine.spec, sample.shape))
            results = raw_results(engine, sample, grid, self.threads)
            images += parity.compare_outputs(whole, results, self.spec, sample.name)
        verdict = parity.judge(images, self.budget.of(engine.spec.precision))
        if engine.spec.precision == "int8" and verdict.accepted:
            reasons = self._reasons_of_calibration(engine)
            verdict = replace(verdict, accepted=not reasons, reasons=reasons)
        return verdict

    def _reasons_of_calibration(self, engine: Engine) -> tuple[str, ...]:
        """What the windows that calibrated say against an INT8 engine: they prove nothing for it, and may disprove it."""
        if not self.calibration_whole:
            spent = 0.0
            for sample in self.calibrating:
                with _Stopwatch() as watch:
                    self.calibration_whole.append(self._baseline_results(sample))
                spent += watch.seconds
                done = len(self.calibration_whole)
                if spent > self.parity_seconds / 4 and done < len(self.calibrating):
                    self.left_out.append(
                        f"{len(self.calibrating) - done} windows that calibrated were not judged as well"
                    )
                    break
        images: list[ImageParity] = []
        for sample, wanted in zip(self.calibrating, self.calibration_whole, strict=False):
            grid = engine.spec.grid(sample.shape, judged_tile(engine.spec, sample.shape))
            got = raw_results(engine, sample, grid, self.threads)
            images += parity.compare_outputs(wanted, got, self.spec, f"{sample.name} (it calibrated)")
        return parity.judge(images, self.budget.of("int8")).reasons

    def _same_rows(
        self, engine: Engine, x: Array, verdict: Verdict, batches: Sequence[int], key: Key | None = None
    ) -> Verdict:
        """The verdict, with a reason more where identical tiles of one batch, or one alone, give different answers.

        Some builds of some libraries do (silently, for batches above one); it needs no baseline to be seen. For the
        record of ``key`` the tile is compared with the baseline, too, at every batch size.
        """
        alone = [y[0] for y in engine.run(x)]
        found, reasons = {1: (alone, True)}, tuple[str, ...]()
        for n in sorted({2, *batches} - {1}):
            self.batches_judged.add(n)
            rows = engine.run(np.repeat(x, n, axis=0))
            images = parity.compare_outputs(alone, [y[0] for y in rows], self.spec, f"a tile in a batch of {n}")
            reasons += parity.judge(images, self.budget.of(engine.spec.precision)).reasons
            found[n] = ([y[0] for y in rows], all(np.array_equal(y[0], row) for y in rows for row in y[1:]))
            if not found[n][1]:
                reasons += (f"identical tiles of one batch of {n} give different answers",)
        if key is not None:
            self.wanted_tile = self.wanted_tile or [y[0] for y in self.baseline.run(x)]
            self.rows[key] = tuple(
                BatchParity(n, same, one)
                for n, (row, same) in found.items()
                for one in parity.compare_outputs(self.wanted_tile, row, self.spec, f"a tile, batch {n}")
            )
        return replace(verdict, accepted=verdict.accepted and not reasons, reasons=(*verdict.reasons, *reasons))

    # 5 ---------------------------------------------------------------------------------------------------------------

    def choose(self, tile: Sequence[int] | None) -> None:
        accepted = [c for c in self.candidates if c.verdict is not None and c.verdict.accepted]
        if not accepted:
            tried = [c for c in self.candidates if c.verdict is not None]
            reasons = "; ".join(f"{_title(c)}: {c.verdict.reasons[0]}" for c in tried if c.verdict)
            closest = min(tried, key=self._used)
            wider = _wider(closest.verdict, self.budget.of(closest.precision)) if closest.verdict else ""
            ways = [f"allow more with --budget {wider}".rstrip()]
            ways += ["use --halo exact"] if self.spec.halo_limit is not None else []
            ways += ["pass --precision fp32"] if all(c.precision != "fp32" for c in tried) else []
            late = f" (no time was left for: {'; '.join(self.left_out)})" if self.left_out else ""
            doubts = f"; but look at this first: {'; '.join(self.warnings)}" if self.warnings else ""
            raise ParityError(f"no candidate is inside the budget: {reasons}{late}; {', or '.join(ways)}{doubts}")
        best = self._closest(accepted, max(accepted, key=lambda c: c.kept_mpx_per_s or 0.0))
        engine = self.engines[best.backend, best.precision, best.variant]
        px = best.batch * prod(best.tile)
        bytes_per_px = max((best.peak_mb or 0.0) * 1e6, self.model.report.activation_bytes(best.tile, best.batch)) / px
        if tile is None and self.spec.runs_whole:
            best, engine, bytes_per_px = self._choose_tile(best, engine, bytes_per_px)
        self.chosen = self.candidates.index(best)
        among = f"{len(accepted)} candidate{'s' * (len(accepted) > 1)} inside the budget"
        if all(c.precision != "fp32" for c in accepted):
            among += " (none of them FP32)"
        batch = f", {best.batch} per run" if best.batch > 1 else ""
        self.notes.append(
            f"chosen: {_title(best)}, tile {size_text(best.tile)} px{batch}: "
            f"{best.kept_mpx_per_s or 0:.3g} kept Mpx/s, the most of {among}"
        )
        if self.left_out:
            minutes = self.deadline.seconds / 60
            self.notes.append(
                f"the search kept to {minutes:g} minutes, and left out: {'; '.join(self.left_out)}; "
                "--search-minutes allows more"
            )
        self.best_engine = engine
        self.spec = replace(
            engine.spec,
            tile=best.tile,
            run_batch=best.batch,
            bytes_per_px=bytes_per_px,
            made_on=machine.describe(),
            options={
                "threads": self.threads,
                "sample_sha256": [s.sha256 for s in self.samples],
                "kind": self.kind,
                "input_range": self.input_range,
                "asked": dict(self.asked),
                **self._int8_options(engine),
            },
        )

    def _closest(self, accepted: Sequence[Candidate], fastest: Candidate) -> Candidate:
        """Of INT8 mixtures that are as fast as the fastest, the one that changes least."""
        alike = [
            c
            for c in accepted
            if (c.backend, c.precision, c.batch) == (fastest.backend, fastest.precision, fastest.batch)
            and (c.kept_mpx_per_s or 0.0) >= AS_FAST * (fastest.kept_mpx_per_s or 0.0)
        ]
        if fastest.precision != "int8" or len(alike) < 2:
            return fastest
        return min(alike, key=self._used)

    def _used(self, candidate: Candidate) -> float:
        """The share of its budget that a candidate uses, on the output that uses most."""
        if candidate.verdict is None:
            return float("inf")
        return max(parity.used(candidate.verdict, self.budget.of(candidate.precision)).values())

    def _int8_options(self, engine: Engine) -> dict[str, Any]:
        """How the chosen engine was quantised; with it and the calibration the graph can be made again."""
        if engine not in self.kept or self.quantiser is None:
            return {}
        method = self.quantiser.method
        inputs = {i.name for i in self.spec.inputs}
        ranges = self.quantiser.calibration.ranges[method or "minmax"]
        return {
            "int8": {
                "method": method,
                "kept": sorted(self.kept[engine]),
                "input_range": {name: [r.low, r.high] for name, r in ranges.items() if name in inputs},
            }
        }

    def _choose_tile(self, best: Candidate, engine: Engine, bytes_per_px: float) -> tuple[Candidate, Engine, float]:
        """The tile that keeps most per second, among that of the comparison and larger ones of as many pixels per run.

        Times of all of them are from the same run, so that they are compared on equal terms.
        """
        tiles = self._larger_tiles(best, bytes_per_px)
        runs = [(engine, best.tile, best.batch)]
        for larger in tiles:
            batch = max(1, best.batch * prod(best.tile) // prod(larger))
            try:
                at = engine
                if engine.spec.batches:  # a plan for one tile
                    graph = self.files[engine][0] if best.precision == "int8" else None  # calibrated once
                    at = self._engine(best.backend, best.precision, larger, (batch,), graph)
                    if engine in self.kept:
                        self.kept[at] = self.kept[engine]
                runs.append((at, larger, batch))
            except BackendError as error:
                self.notes.append(f"tile {size_text(larger)} px was not tried: {error}")
        if len(runs) < 2:
            return best, engine, bytes_per_px
        self.say("measuring tiles " + ", ".join(size_text(tile) for _, tile, _ in runs))
        slow = self._seconds_of(best, runs[-1][1]) > SLOW_RUN_S or self.deadline.left(TILES_END) < 4 * sum(
            batch * self._seconds_of(best, tried) for _, tried, batch in runs
        )
        timings = self._times(runs, runs=1 if slow else 3, warm_up=0 if slow else 1)
        again = best
        if not isinstance(timings[0], BackendError):  # its memory is allocated by now
            again = replace(self._measured(best, best.tile, timings[0], best.verdict), peak_mb=best.peak_mb)
        self.candidates[self.candidates.index(best)] = again
        tried = [(again, engine)]
        for (other, larger, batch), timing in zip(runs[1:], timings[1:], strict=True):
            try:
                if isinstance(timing, BackendError):
                    raise timing
                verdict = best.verdict if other is engine else self._verdict(other)
                if verdict is not None and self.spec.device != "cpu":  # libraries choose kernels by shape there
                    x = tile_of(self.samples[0], self.spec, larger, self.threads)
                    verdict = self._same_rows(other, x, verdict, (batch,))
            except BackendError as error:
                self.notes.append(f"tile {size_text(larger)} px was tried and left: {error}")
                continue
            tried.append((self._measured(replace(best, batch=batch), larger, timing, verdict), other))
            self.candidates.append(tried[-1][0])
            bytes_per_px = max(bytes_per_px, timing.peak_bytes / prod(larger) / batch)
        tried = [(c, e) for c, e in tried if c.verdict is not None and c.verdict.accepted]
        best, chosen = max(tried, key=lambda pair: pair[0].kept_mpx_per_s or 0.0)
        for other in {id(e): e for e, _, _ in runs}.values():
            if other not in (chosen, engine):
                other.close()
        return best, chosen, bytes_per_px

    def _seconds_of(self, candidate: Candidate, tile: Sequence[int]) -> float:
        """What a run of one tile is expected to take, by the one that was measured."""
        return (candidate.latency_ms or 0.0) / 1e3 / prod(candidate.tile) / candidate.batch * prod(tile)

    def _larger_tiles(self, best: Candidate, bytes_per_px: float) -> list[tuple[int, ...]]:
        """Tiles above the one that candidates were compared at, as far as time and memory allow to try them."""
        left = self.deadline.left(TILES_END) - self._seconds_of(best, best.tile)
        tiles: list[tuple[int, ...]] = []
        for area in TILE_AREAS:
            tile = square_tile(self.spec.sizes, self.spec.used_outputs(), area)
            if prod(tile) <= prod(best.tile):
                continue
            last = size_text(tiles[-1] if tiles else best.tile)
            seconds = self._seconds_of(best, tile)
            if seconds > LARGEST_RUN_S:
                self.notes.append(f"tiles above {last} px were not tried: the next would take {seconds:.0f} s")
                break
            left -= seconds
            if left < 0:
                self.left_out.append(f"tiles above {last} px were not tried")
                break
            cpu = self.spec.device == "cpu"
            if (cpu and bytes_per_px * prod(tile) > MEMORY_SHARE * machine.memory_bytes()) or (
                not cpu and not self._fits(tile, 1)
            ):
                self.notes.append(f"tiles above {last} px were not tried: too little memory is free")
                break
            tiles.append(tile)
        return tiles

    # 6 ---------------------------------------------------------------------------------------------------------------

    def write(self, folder: Path, *, keep_exam: bool, overwrite: bool, command: Sequence[str]) -> BuildReport:
        verdict = self.candidates[self.chosen].verdict
        if verdict is None:
            raise ParityError("the chosen candidate was not judged")
        graph, plan = self.files[self.best_engine]
        parity_file = self.work / "parity.json"
        parity_file.write_text(exam.record_json(self._record(verdict, graph)), encoding="utf-8")
        files: dict[Any, Path] = {"model": self.model.given, "graph": graph, "parity": parity_file}
        if plan is not None:
            files["engine"] = plan
        if self.best_engine in self.kept and self.quantiser is not None:
            files["calibration"] = self.work / "calibration.json"
            files["calibration"].write_text(self.quantiser.calibration.dumps(), encoding="utf-8")
        if keep_exam and (arrays := self._exam()):
            files["exam"] = self.work / "exam.npz"
            np.savez_compressed(files["exam"], **arrays)  # type: ignore[arg-type]
        self.close()
        write_folder(folder, self.spec, files, overwrite=overwrite)
        advice = ""
        if self.kind == "synthetic":
            advice = shlex.join([*command, "--samples", "YOUR_IMAGES", "--out", str(folder), "--overwrite"])
        return BuildReport(
            folder,
            self.spec,
            tuple(self.candidates),
            self.chosen,
            self.kind,
            len(self.samples),
            self.first,
            self.seams,
            self.mismatch,
            tuple(self.notes),
            tuple(self.warnings),
            advice,
            self._layer_costs(),
        )

    def _record(self, verdict: Verdict, graph: Path) -> dict[str, Any]:
        """The record of parity that travels with the engine."""
        best = self.candidates[self.chosen]
        return {
            "schema": 1,
            "kind": self.kind,
            "budget": vars(self.budget.of(self.spec.precision)),
            "graph_sha256": sha256(graph),
            "model_sha256": sha256(self.model.given),
            "baseline": {
                "backend": baseline_name(),
                "precision": "fp32",
                "whole": self.baseline.spec.runs_whole,  # an engine with a plan has fixed sizes, its baseline has not
            },
            "fingerprint": exam.fingerprint(best.backend, self.best_engine.session_version, self.spec.device),
            "machine": machine.describe(),
            "batch": sorted(self.batches_judged),
            "rows": [
                {
                    "backend": name,
                    "precision": precision,
                    "variant": variant,
                    "device": self.spec.device,
                    **row.to_json(),
                }
                for (name, precision, variant), rows in self.rows.items()
                for row in rows
            ],
            "images": [{"name": s.name, "sha256": s.sha256, "shape": list(s.pixels.shape)} for s in self.samples],
            "verdict": verdict.to_json(),
            "calibrated_on": [{"name": s.name, "sha256": s.sha256} for s in self.calibrating],
            "seams": {str(k): v for k, v in self.seams.items()},
            "candidates": [c.to_json() for c in self.candidates],
            "layers": [layer.to_json() for layer in self._layer_costs()],
        }

    def close(self) -> None:
        """Gives back what every engine holds."""
        for engine in (*self.files, self.baseline):
            engine.close()

    def _layer_costs(self) -> tuple[LayerCost, ...]:
        """What was ranked, once for all backends; marked is what the chosen engine keeps in FP32, if it is an INT8 one."""
        ranking = self.quantiser.ranking if self.quantiser is not None else []
        kept = self.kept.get(self.best_engine, frozenset())
        return tuple(replace(layer, kept=layer.name in kept) for layer in ranking)

    def _exam(self) -> dict[str, Array]:
        """A few tiles as the network gets them and the baseline's outputs, float32; {} where the engine passes none.

        A tile is a smaller part of an image than those that were judged, and may hold more of what changes. One on which
        the engine misses the budget here, where it was accepted, says nothing about another machine.
        """
        if self.spec.runs_whole:
            tile = square_tile(self.spec.sizes, self.spec.outputs, 192**2 if self.model.spatial == 2 else 32**3)
        else:
            tile = self.spec.tile
        picked = self.samples[:: max(1, len(self.samples) // EXAM_TILES)][:EXAM_TILES]
        budget = self.budget.of(self.spec.precision)
        kept, images = list[tuple[Array, list[Array]]](), list[ImageParity]()
        for sample in picked:
            x = tile_of(sample, self.spec, tile, self.threads)
            wanted, got = self.baseline.run(x), self.best_engine.run(x)
            found = parity.compare_outputs([y[0] for y in wanted], [y[0] for y in got], self.spec, sample.name)
            if parity.judge([*images, *found], budget).accepted:
                images += found
                kept.append((x, wanted))
        if len(kept) < len(picked):
            self.notes.append(
                f"{len(picked) - len(kept)} of {len(picked)} tiles are left out of the exam: on a tile alone the engine is "
                "outside the budget that it holds on whole windows"
            )
        if not kept:
            self.warnings.append(
                "the engine carries no exam, so that other machines refuse it; larger samples may help"
            )
            return {}
        inputs, outputs = zip(*kept, strict=True)
        columns = zip(*outputs, strict=True)
        return {"input": np.concatenate(inputs)} | {f"output_{k}": np.concatenate(ys) for k, ys in enumerate(columns)}


# --------------------------------------------------------------------------------------------------------------------


class _Stopwatch:
    def __enter__(self) -> _Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start


def _wider(verdict: Verdict, budget: Budget) -> str:
    """The bounds that a verdict misses, as wide as it needs them, in the words of --budget; "" where there are none."""
    parts = list[str]()
    if verdict.label_change is not None and verdict.label_change > budget.labels:
        parts.append(f"label_change={min(1.05 * verdict.label_change, 1.0):.1e}")  # two digits, never below
    if verdict.dice is not None and verdict.dice < budget.dice:
        parts.append(f"dice={floor(1e3 * verdict.dice) / 1e3:g}")
    if verdict.error is not None and budget.error < verdict.error < float("inf"):
        parts.append(f"error={1.05 * verdict.error:.1e}")
    return " ".join(parts)


def _title(candidate: Candidate) -> str:
    """Backend, precision and variant of a candidate."""
    variant = f" ({candidate.variant})" if candidate.variant else ""
    return f"{candidate.backend} {candidate.precision}{variant}"


class _Run:
    """One batch of an engine to be timed; once it has failed it keeps the error and does nothing more."""

    def __init__(self, engine: Engine, x: Array):
        self.error: BackendError | None = None
        self._engine, self._x = engine, x
        self._on_device: bench.DeviceRun | None = None
        if engine.device_session is not None:
            try:
                self._on_device = bench.DeviceRun(engine, x)
            except BackendError as error:
                self.error = error

    def __call__(self) -> None:
        if self.error is not None:
            return
        try:
            if self._on_device is not None:
                self._on_device()
            else:
                self._engine.run(self._x)
        except BackendError as error:
            self.error = error

    def of(self, timing: bench.Timing) -> bench.Timing:
        """Its timing, with the device's memory where it runs on one."""
        return timing if self._on_device is None else replace(timing, peak_bytes=self._on_device.grown)

    def close(self) -> None:
        if self._on_device is not None:
            self._on_device.close()
