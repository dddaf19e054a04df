"""What is asked for beyond an engine and an image: one frozen value, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import inf, prod
from numbers import Integral
from pathlib import Path
from shutil import disk_usage
from typing import Any, Literal

from ..contract.contract import Contract, Normalization
from ..contract.task import check_classes
from ..engine.engine import Engine
from ..engine.spec import EngineSpec
from ..engine.tta import Augmented, Tta
from ..errors import ContractError, ImageError, OutputError
from ..images.levels import PIXEL_SIZE_TOLERANCE, um_text
from ..images.normalize import missing_normalization
from ..images.reading import Reading
from ..images.source import Source
from ..images.value_range import check_value_range
from ..kernels.memory import MemoryContext
from ..outputs.labels import is_zarr_output, label_place
from ..outputs.split import How
from ..system import limits
from ..tiling.axis import per_axis
from ..tiling.decision import Decision, OutputKind, decide, default_output
from . import blocks
from .stage import stage_folder

LITTLE = 2**25  # bytes, below which pieces of a file are not what memory lacks
DECODING = 2  # times the bytes of a piece: as it comes out of its library, and as it is kept
RESULT_SHARE = 0.05  # of the memory that is asked for: larger results are kept on the disk
MAX_FACTOR = 10  # pixel sizes of image and training farther apart are refused: no network bridges that
# How many times smaller than its values a file is at most: Deflate's bound. Chunks of a Zarr that hold nothing are no file.
_MOST_PACKED = {".npy": 1, ".tif": 1032, ".tiff": 1032}
Kind = OutputKind | Literal["instances"]


@dataclass(frozen=True)
class Tables:
    """What is wanted of objects beside their image.

    Attributes:
        min_size: Objects of fewer pixels (voxels) are left out.
        objects: CSV of all objects.
        areas: CSV of what each class covers.
        geojson: Outlines as GeoJSON polygons, for slide viewers and maps; not of volumes.
        split: How objects that touch are told apart: ``none``; ``watershed``, from the network's output ``distance``
            where it has one, else from the places farthest from the edge; ``border``, by the class of that name.
    """

    min_size: int = 1
    objects: Path | None = None
    areas: Path | None = None
    geojson: Path | None = None
    split: How = "none"

    @property
    def measured(self) -> bool:
        """Whether the image's channels are to be measured."""
        return self.objects is not None or self.geojson is not None


@dataclass(frozen=True)
class Request:
    """What is asked for beyond an engine and an image, in types that other processes know.

    Everything but the last three is an option of :func:`unet_rt.prediction.predict.predict`; :func:`settle` puts what is
    in use in the place of what was left open.

    Attributes:
        region: Path or URL of an image, as given: predictions are wanted where it is not 0.
        processes: How many share this machine's memory and threads.
        size_um: Pixel size of the image that is read; empty where not known.
        staged: The result is made block by block in a stage beside the output.
    """

    reading: Reading = field(default_factory=Reading)
    out: Path | None = None
    output: Kind | None = None
    mask_values: tuple[int, ...] = ()
    tile: tuple[int, ...] | None = None
    batch: int | None = None
    threads: int = 0
    normalization: Normalization | None = None
    overlay: Path | None = None
    overwrite: bool = False
    resample: bool = False
    region: str | None = None
    memory_bytes: int | None = None
    shard: tuple[int, int] | None = None
    scheduler: str | None = None
    restart: bool = False
    tables: Tables | None = None
    tta: Tta = "none"
    head: str | None = None
    classes: tuple[str, ...] = ()
    processes: int = 1
    size_um: tuple[float, ...] = ()
    staged: bool = False

    def __post_init__(self) -> None:
        """Checks what no image has to be opened for."""
        shard = self.shard
        if shard is not None and not 0 <= shard[0] < shard[1]:
            raise ContractError(f"shard {shard[0]}/{shard[1]} is not one of 0/{shard[1]} to {shard[1] - 1}/{shard[1]}")
        if (shard is not None or self.scheduler is not None) and self.out is None:
            raise ContractError("shards and schedulers share a file or folder; give --out")
        for name, values in (("tile", self.tile or ()), ("batch", (self.batch or 1,)), ("threads", (self.threads,))):
            if not all(isinstance(value, Integral) for value in values):
                raise ContractError(f"{name} is {getattr(self, name)}; use whole numbers")
        if self.batch is not None and self.batch < 1:
            raise ContractError(f"a batch of {self.batch} tiles cannot be run; use 1 or more")

    @property
    def share(self) -> tuple[int, int]:
        """(index, count): this process computes every count-th block."""
        return self.shard or (0, 1)


def engine_form(engine: Engine, asked: Request) -> Engine:
    """The engine in the form that runs tiles: itself, or over several positions of each; its classes named as asked."""
    output = engine.spec.head(asked.head)
    if asked.classes:
        engine = engine.under(_name_classes(engine.spec, output, asked.classes))
    if asked.tta == "none":
        return engine
    if asked.tables is not None and asked.tables.split == "watershed" and engine.spec.distance_of(output) is not None:
        raise ContractError("--tta averages one output, and this network's objects are split by another; leave it away")
    return Augmented(engine, asked.tta, raw=asked.output == "raw", output=output)


def _name_classes(spec: EngineSpec, output: int, names: tuple[str, ...]) -> EngineSpec:
    """The spec with other names of the classes of one output."""
    contract, name = spec.contract, spec.outputs[output].name
    check_classes(names, spec.contract_of(output).task, spec.outputs[output].channels)
    if output == 0:
        return replace(spec, contract=replace(contract, classes=names))
    heads = tuple(replace(head, classes=names) if head.name == name else head for head in contract.heads)
    return replace(spec, contract=replace(contract, heads=heads))


def decision_of(asked: Request, spec: EngineSpec) -> Decision:
    """What becomes of the network's numbers; ``instances`` are made of a mask."""
    output = spec.head(asked.head)
    kind: OutputKind | None = "mask" if asked.output == "instances" else asked.output
    return decide(spec.contract_of(output), spec.outputs[output].channels, kind, asked.mask_values)


def settle(asked: Request, engine: Engine, source: Source) -> Request:
    """The request with what is in use for this engine and image in the place of what was left open.

    Args:
        asked: What is asked for.
        engine: In the form that runs tiles.
        source: The image, opened.

    Raises:
        ContractError, ImageError, OutputError: An option does not fit engine, image or another option.
    """
    spec, out = engine.spec, asked.out
    if out is not None and source.path is not None and _holds(out, source.path):
        raise OutputError(f"{out} is the image itself, or holds it; choose another output")
    decision = decision_of(asked, spec)
    if asked.overlay is not None and decision.values == ():
        raise ContractError("an overlay shows a mask; leave --overlay away, or use --output mask")
    if source.device is not None:
        _check_device(engine, spec.head(asked.head), source, source.device)
    settled = replace(
        asked,
        tile=None if asked.tile is None else per_axis(asked.tile, spec.spatial),
        output=asked.output or default_output(spec.contract_of(spec.head(asked.head))),
        normalization=normalization_of(spec, source, asked.normalization),
        batch=spec.run_batch if asked.batch is None else asked.batch,
        reading=replace(asked.reading, level=source.level),
        size_um=source.pixel_size_um or (),
        staged=_staged(asked, source, decision),
    )
    if source.device is not None and (settled.staged or settled.output == "instances" or in_blocks(settled, source)):
        raise ImageError(
            f"{source.name} lies on a GPU, where images are predicted as they are; copy it to the host (image.cpu())"
        )
    _check_objects(settled, spec, source)
    check_pieces(source, asked.memory_bytes)
    if settled.normalization is not None:
        check_value_range(source, spec.contract.value_range, settled.normalization)
    if out is not None and label_place(out) is not None:
        _check_labels(settled, decision, source, out)
    if out is not None and out.parent.is_dir():
        _check_room(out, decision, [f.scale for f in spec.outputs[spec.head(asked.head)].field], source)
    check_pixel_size(spec.contract, source)
    return settled


def _check_room(out: Path, decision: Decision, scales: Sequence[Fraction], source: Source) -> None:
    """OutputError where the disk cannot hold the result, however well it packs: before a large image is planned."""
    values = source.planes * prod(source.shape) * float(prod(scales)) * max(1, decision.channels)
    least = values * decision.dtype.itemsize / _MOST_PACKED.get(out.suffix.lower(), inf)
    free = disk_usage(out.parent).free
    if least > free:
        raise OutputError(
            f"{out}: needs {least / 1e9:.2f} GB at least, {free / 1e9:.2f} GB are free in {out.parent}; free some space or "
            "choose another folder with --out"
        )


def _staged(asked: Request, source: Source, decision: Decision) -> bool:
    if asked.out is None:
        return False
    px = source.planes * prod(source.shape)
    large = px >= blocks.LARGE_PX
    if asked.memory_bytes is not None:  # a result in memory is part of what is bound
        held = px * max(1, decision.channels) * decision.dtype.itemsize + (4 * px if asked.output == "instances" else 0)
        large = large or held > RESULT_SHARE * asked.memory_bytes
    large = large and source.device is None
    shared = asked.shard is not None or asked.scheduler is not None
    return is_zarr_output(asked.out) or shared or large or stage_folder(asked.out).exists()


def in_blocks(asked: Request, source: Source) -> bool:
    """Whether a result is computed in blocks, even in memory: they are bounded, and those that nobody wants are not run."""
    return bool(asked.resample or asked.region is not None or source.gaps or asked.memory_bytes is not None)


def _holds(out: Path, image: Path) -> bool:
    """Whether an output would replace the image: it is the same file, or a folder around it."""
    return image.resolve().is_relative_to(out.resolve()) or (out.exists() and out.samefile(image))


def _check_device(engine: Engine, output: int, source: Source, device: MemoryContext) -> None:
    """ImageError unless the engine can take an image from the device where it lies."""
    from .device import serves

    session = engine.device_session
    if session is None and isinstance(engine, Augmented):
        raise ImageError(f"{source.name} lies on a GPU, and --tta takes tiles from the host; pass image.cpu()")
    if session is None or session.stream.device.index != device.index:
        raise ImageError(
            f"{source.name} lies on cuda:{device.index} and the engine runs on {engine.spec.device}; copy the image to "
            "the host (image.cpu()), or load an engine built for its device"
        )
    if not serves(engine, output):
        raise ImageError(
            f"{source.name} lies on a GPU, and the engine takes {session.input_dtypes[0]} tiles, which are not filled "
            "there; copy the image to the host (image.cpu())"
        )


def normalization_of(spec: EngineSpec, source: Source, given: Normalization | None) -> Normalization:
    """The contract's normalisation; ``given`` where it declares none, or but for the scope; none at all for floats.

    Raises:
        ContractError: Two declarations, or integer pixels and none.
    """
    declared = spec.contract.normalization
    if declared is not None:
        if given is None or given == declared:
            return declared
        # Of one channel, ``image`` says nothing but that planes are not taken together; these are for the user to say.
        open_scope = declared.scope is None or (declared.scope == "image" and source.channels == 1)
        if open_scope and replace(given, scope=declared.scope) == declared:
            return given
        scope = f", scope {declared.scope}" if declared.scope else ""
        raise ContractError(
            f"the engine was built and proven with normalisation {declared.method}{scope}; build it again to change that"
        )
    if given is not None:
        return given
    if source.dtype.kind in "iu":
        raise missing_normalization(source)
    return Normalization("none")


def _check_labels(asked: Request, decision: Decision, source: Source, out: Path) -> None:
    """OutputError for what cannot be labels inside an image's Zarr."""
    if asked.output not in ("mask", "instances") or decision.channels:
        raise OutputError(
            f"{out}: labels are one whole number per pixel; use --output mask or instances, or another --out"
        )
    if source.level:
        raise OutputError(f"{out}: labels lie over the finest level of their image; leave --level away")


def _check_objects(asked: Request, spec: EngineSpec, source: Source) -> None:
    """Raises now what would otherwise be said of objects after all the work."""
    if asked.output != "instances":
        if asked.tables is not None:
            raise ContractError("tables list objects; use --output instances")
        return
    if asked.mask_values:
        raise ContractError("--output instances numbers objects from 1 on; leave --mask-values away")
    if spec.contract_of(spec.head(asked.head)).task == "multilabel":
        raise ContractError(
            "objects of a multi-label task overlap; predict its masks, and label each (unet_rt.label_mask)"
        )
    from ..outputs import split, windows

    windows.morphology()
    tables = asked.tables or Tables()
    if tables.geojson is not None and len(source.shape) != 2:
        raise ContractError("GeoJSON holds outlines of 2-D pictures, and this is a volume; leave --geojson away")
    if asked.out is not None and asked.out.suffix.lower() == ".png" and (len(source.shape) != 2 or source.planes != 1):
        raise OutputError(f"{asked.out}: PNG holds one plane, and the image has more; name it {asked.out.stem}.tif")
    if tables.split == "none":
        return
    split.morphology()
    contract = spec.contract_of(spec.head(asked.head))
    if tables.split == "border":
        split.border_label(dict(enumerate(contract.classes)))


def check_pieces(source: Source, memory_bytes: int | None) -> None:
    """ImageError, before anything is read, where a part of the file that decodes only whole does not fit into memory."""
    need = DECODING * source.piece_bytes
    if need <= LITTLE:
        return
    free = limits.memory_bytes()
    bound = free if memory_bytes is None else min(free, memory_bytes - limits.rss_bytes())
    if need > bound:
        piece, taken, left = (f"{max(0, n) / 1e6:,.0f} MB" for n in (source.piece_bytes, need, bound))
        raise ImageError(
            f"{source.name}: stored in strips, tiles or chunks of {piece}, which decode only whole: about {taken}, "
            f"and {left} are left beside the engine; use more --memory, or save the image in tiles"
        )


def check_pixel_size(contract: Contract, source: Source) -> None:
    """ContractError where the pixel sizes of image and training are so far apart that one of them is not true."""
    wanted, size = contract.pixel_size_um, source.pixel_size_um
    if not wanted or size is None or len(wanted) != len(size):
        return
    apart = max(max(a / b, b / a) for a, b in zip(size, wanted, strict=True))
    if apart > MAX_FACTOR * (1 + 1e-6):
        raise ContractError(
            f"{source.name} has pixels of {um_text(size)} um, and the network was trained on {um_text(wanted)} um: a factor "
            f"of {apart:,.0f}; pass the image's true size with --pixel-size, in micrometres (files for print give 72 dpi)"
        )


def notes_of(asked: Request, engine: Engine, source: Source) -> list[str]:
    """What is to be said of a settled request in the report."""
    spec = engine.spec
    notes = _pixel_size_notes(spec.contract, source, resample=asked.resample) + _batch_notes(engine, asked.batch or 1)
    if asked.out is not None and source.metadata.kind == "geo" and asked.out.suffix.lower() not in (".tif", ".tiff"):
        notes.append(f"the image's place on the earth is not kept in {asked.out.suffix}; --out NAME.tif keeps it")
    if len(spec.outputs) > 1:
        names = [output.name for output in spec.outputs]
        notes.append(f"output {names[spec.head(asked.head)]} of {', '.join(names)}")
    if scaled := spec.outputs[spec.head(asked.head)].scale_text:
        notes.append(scaled)
    return notes


def _batch_notes(engine: Engine, batch: int) -> list[str]:
    """What is to be said where more tiles are run at once than parity was judged with."""
    record = None if engine.folder is None else engine.folder.parity
    judged: list[Any] = [] if record is None else record.get("batch", [])
    if not judged or batch <= max(judged):
        return []
    return [
        f"{batch} tiles per run, and parity was judged with up to {max(judged)}; leave --batch away to stay with those"
    ]


def _pixel_size_notes(contract: Contract, source: Source, *, resample: bool) -> list[str]:
    """What resampling does, or what is to be said where image and training differ in pixel size by more than a tenth."""
    wanted, size = contract.pixel_size_um, source.pixel_size_um
    if not wanted or size is None or len(wanted) != len(size):
        return []
    here, there = um_text(size), um_text(wanted)
    if resample:
        level = f" of level {source.level}" if source.levels else ""
        return [f"the pixels{level}, {here} um, were brought to {there} um, and results back"]
    if all(abs(a / b - 1) <= PIXEL_SIZE_TOLERANCE for a, b in zip(size, wanted, strict=True)):
        return []
    text = f"WARNING: the image has pixels of {here} um, the network was trained on {there} um; --resample adapts the image"
    return [text]
