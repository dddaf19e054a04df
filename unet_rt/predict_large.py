"""Results that take blocks: kept in a stage beside the output or in memory, shared by shards, then made into the output."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from ._version import __version__
from .blocks import Block, plan_blocks, plan_of
from .contract.contract import Contract, Normalization
from .engine import exam
from .engine.engine import Engine
from .engine.parity import class_name
from .engine.tta import Tta
from .errors import ContractError, OutputError, size_text
from .images.normalize import Affine, Affines, OnePlane, affine
from .images.open import open_image
from .images.source import Source
from .images.zarr import import_zarr
from .outputs import objects as objects_module
from .outputs import outlines
from .outputs import tables as tables_module
from .outputs.output import Output, check_output, open_output, remove_parts
from .outputs.pictures import OverlayCollector
from .outputs.shape import Shape, nodata_value, size_of
from .outputs.zarr import NO_DATA, ZarrOutput
from .pipeline import Progress, RunReport, Spans, Tally, class_share, label_names
from .predict_blocks import Prepared, Resampled, run_blocks
from .stage import MemoryStore, PackedStore, Stage, Store, ZarrStore, open_stage, shard_lock, stage_folder
from .system import limits
from .system.durable import Disk, locked
from .tiling.decision import Decision, decide
from .tiling.resample import resampled_shape

Array = npt.NDArray[Any]

Compute = Callable[[Prepared, Sequence[int], Progress], RunReport]

FREE_SHARE = 0.5  # of the memory that is free, where no bound is given
WINDOW_PX = 4096  # side of the windows in which objects are sought, about
BAND_BYTES = 2**26  # of a result at a time, where an output is made from blocks


@dataclass(frozen=True)
class Tables:
    """What is wanted of objects beside their image.

    Attributes:
        min_size: Objects of fewer pixels (voxels) are left out.
        objects: CSV of all objects.
        areas: CSV of what each class covers.
        geojson: Outlines as GeoJSON polygons, for slide viewers; 2-D images of one plane.
    """

    min_size: int = 1
    objects: Path | None = None
    areas: Path | None = None
    geojson: Path | None = None


@dataclass(frozen=True)
class Request:
    """What is asked for beyond an engine and an image, in types that JSON and other processes know.

    Attributes:
        output: ``mask``, ``probability``, ``raw`` or ``instances``.
        mask_values, tile, batch, threads: As for :func:`unet_rt.predict.predict`.
        normalization: In use: the contract's or the user's.
        pixel_size_um: Of the image; empty where not known.
        resample: Bring the image to the pixel size of the contract.
        region: Path of an image: predictions are wanted where it is not 0.
        memory_bytes: Bound on the resident memory; None: a share of what is free. The plan of a run that was begun stays.
        tta, head: As for :func:`unet_rt.predict.predict`; the engine is the view that they make.
        shard: (index, count): this process computes every count-th block.
        processes: How many share this machine's memory and threads.
    """

    output: str
    normalization: Normalization
    mask_values: tuple[int, ...] = ()
    tile: tuple[int, ...] | None = None
    batch: int = 1
    threads: int = 0
    pixel_size_um: tuple[float, ...] = ()
    resample: bool = False
    region: str | None = None
    memory_bytes: int | None = None
    shard: tuple[int, int] = (0, 1)
    tta: Tta = "none"
    head: str | None = None
    processes: int = 1


def identity(engine: Engine, source: Source, decision: Decision, asked: Request) -> dict[str, Any]:
    """Everything that decides the result, under the names that messages use."""
    spec = replace(engine.spec, device=engine.spec.device.partition(":")[0])  # one of several GPUs decides nothing
    text = json.dumps(spec.to_json(), sort_keys=True).encode()
    # Without a folder nothing says which weights these are: such a stage is nobody's but this run's.
    graph = uuid4().hex if engine.folder is None else engine.folder.files["graph"]["sha256"]
    region = None
    if asked.region is not None:
        with open_image(asked.region, Contract(), spatial=len(source.shape)) as opened:
            region = opened.fingerprint()
    return {
        "engine": [hashlib.sha256(text).hexdigest()[:16], graph],
        "image": source.fingerprint() or _digest(source),
        "reading of the image": source.reading,
        "output": [asked.output, {**asdict(decision), "dtype": str(decision.dtype)}],
        "normalization": asdict(asked.normalization),
        "test-time augmentation": asked.tta,
        "head": asked.head,
        "pixel size": [asked.resample, asked.pixel_size_um],
        "region": region,
        "tile": asked.tile,
    }


def _digest(source: Source) -> str:
    """Of all pixels: what an array is told by."""
    total = hashlib.sha256(f"{source.shape} {source.dtype}".encode())
    for plane, start, stop in source.bands():
        total.update(np.ascontiguousarray(source.read_band(plane, start, stop)).data)
    return total.hexdigest()


def prepare(engine: Engine, source: Source, asked: Request, stage: Stage | None = None) -> Prepared:
    """The result that is asked for, ready to be computed.

    Args:
        engine: The engine.
        source: The image, open as long as the result is worked on.
        asked: What is asked for.
        stage: Of a run that was begun: its plan and numbers are taken; None: they are made.
    """
    from .predict_device import free_bytes

    spec = engine.spec
    channels = spec.outputs[0].channels
    kind: Any = "mask" if asked.output == "instances" else asked.output
    decision = first = decide(spec.contract, channels, kind, asked.mask_values)
    shape = None
    if asked.resample:
        shape = _resampled(engine, source, asked)
        if kind == "mask":
            first = decide(spec.contract, channels, "probability")
            settled = replace(spec.contract, output_is="probabilities")
            decision = decide(settled, channels, "mask", asked.mask_values)
    affines: Affines | OnePlane
    if stage is None:
        affines = affine(asked.normalization, source)
    elif stage.run["numbers"] is not None:
        affines = OnePlane(_affine(stage.run["numbers"]))
    else:
        affines = affine(asked.normalization, source, partial(_kept, stage))
    seen = source if shape is None else Resampled(source, shape, affines)
    if stage is not None:
        plan = plan_of(spec, source.shape, source.planes, stage.run["plan"], seen=shape)
    else:
        free, given = limits.memory_bytes(), asked.memory_bytes
        on_device = free_bytes(engine)
        if on_device is not None and not spec.tiles:  # a plan's tiles are not sized, but tried
            free = min(free, on_device)
        plan = plan_blocks(
            spec,
            source.shape,
            source.planes,
            decision,
            pixel_bytes=source.channels * source.dtype.itemsize,
            memory_bytes=(int(FREE_SHARE * free) if given is None else given - limits.rss_bytes()) // asked.processes,
            tile=asked.tile,
            batch=asked.batch,
            seen=shape,
        )
    region = None if asked.region is None else _region(asked.region, source)
    nodata = nodata_value(decision.dtype, decision.values)
    return Prepared(
        engine, source, seen, plan, decision, first, affines, region, nodata, asked.batch, asked.threads,
        fixed_tile=asked.tile is not None,
    )  # fmt: skip


def _resampled(engine: Engine, source: Source, asked: Request) -> tuple[int, ...]:
    wanted = engine.spec.contract.pixel_size_um
    if not wanted:
        raise ContractError("--resample needs the pixel size of training; build the engine with --pixel-size")
    if not asked.pixel_size_um:
        raise ContractError(f"{source.name} does not say its pixel size; give it with --pixel-size, in micrometres")
    if any(f.scale != 1 for f in engine.spec.outputs[0].field):
        raise ContractError(
            "--resample needs a network whose output has as many samples as its input; resample yourself"
        )
    return resampled_shape(source.shape, asked.pixel_size_um, wanted)


def _region(path: str, source: Source) -> Source:
    region = open_image(path, Contract(), spatial=len(source.shape))
    if region.shape != source.shape or region.planes not in (1, source.planes):
        shape = size_text(region.shape)
        region.close()
        raise ContractError(
            f"{path}: the region has {region.planes} planes of {shape} px, and {source.name} {source.planes} of "
            f"{size_text(source.shape)}; draw it on the image"
        )
    return region


def _numbers(affines: Affines | OnePlane) -> dict[str, Any] | None:
    """One plane's numbers where they are those of all planes."""
    if isinstance(affines, Affines) and not affines.same:
        return None
    return _json(affines.plane(0))


def _kept(stage: Stage, plane: int, measure: Callable[[], Affine]) -> Affine:
    """A plane's numbers from the stage, measured where nobody has done so yet."""
    return _affine(stage.kept(f"{plane:08d}", lambda: _json(measure())))


def _json(one: Affine) -> dict[str, Any]:
    """Float32 numbers as JSON has them: they come back the same bits."""
    return {"offset": one.offset.tolist(), "divisor": one.divisor.tolist(), "clip": one.clip}


def _affine(data: dict[str, Any]) -> Affine:
    clip = None if data["clip"] is None else (float(data["clip"][0]), float(data["clip"][1]))
    return Affine(np.array(data["offset"], np.float32), np.array(data["divisor"], np.float32), clip)


def predict(
    engine: Engine,
    source: Source,
    asked: Request,
    out: Path | None,
    *,
    staged: bool,
    overwrite: bool = False,
    restart: bool = False,
    compute: Compute | None = None,
    overlay: Path | None = None,
    tables: Tables | None = None,
    progress: Progress | None = None,
    trace: Spans | None = None,
) -> tuple[RunReport, Any]:
    """A prediction in blocks: its report, and the path written or the array, as :func:`unet_rt.predict.predict` has them."""
    tables = _checked(engine, source, asked, tables)

    def check() -> None:
        """What an earlier run of the same command has not written may not be there."""
        if out is not None:
            check_target(out, overwrite=overwrite)
        _check_tables(tables, overwrite=overwrite)

    if out is None or not (staged and stage_folder(out).exists()):
        check()
    ids: list[Array] = []

    def make(made: Prepared, store: Store, again: bool = False) -> None:
        if overlay is not None:
            draw_overlay(made, store, overlay)
        if asked.output == "instances":
            ids.append(write_instances(made, store, out, tables, overwrite=again or overwrite))
        elif out is not None:
            write_output(made, store, out, overwrite=again or overwrite)

    if staged and out is not None:
        report = in_stage(
            engine, source, asked, out, make, check,
            restart=restart, compute=compute, progress=progress, trace=trace,
        )  # fmt: skip
        return report, out
    store, report, made = in_memory(engine, source, asked, progress=progress, trace=trace)
    make(made, store)
    if out is not None:
        clear(out)
        return report, out
    result = ids[0] if ids else store.array
    return report, result.reshape(*source.plane_shape, *result.shape[1:])


def _checked(engine: Engine, source: Source, asked: Request, tables: Tables | None) -> Tables:
    """What is wanted of objects; raises now what would otherwise be said after all the work."""
    if asked.output != "instances":
        if tables is not None:
            raise ContractError("tables list objects; use --output instances")
        return Tables()
    if asked.mask_values:
        raise ContractError("--output instances numbers objects from 1 on; leave --mask-values away")
    if engine.spec.contract.task == "multilabel":
        raise ContractError(
            "objects of a multi-label task overlap; predict its masks, and label each (unet_rt.objects)"
        )
    objects_module.morphology()
    tables = tables or Tables()
    if tables.geojson is not None and (len(source.shape) != 2 or source.planes != 1):
        raise ContractError("GeoJSON holds outlines of one 2-D picture; leave --geojson away")
    return tables


def _check_tables(tables: Tables, *, overwrite: bool) -> None:
    for path in (tables.objects, tables.areas, tables.geojson):
        if path is not None and path.exists() and not overwrite:
            raise OutputError(f"{path}: exists already; use --overwrite to replace it, or choose another name")


def check_target(out: Path, *, overwrite: bool) -> None:
    """OutputError for what can be known of an output before any work."""
    if not is_zarr(out):
        check_output(out, overwrite=overwrite)
        return
    import_zarr(OutputError, out)
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; use --overwrite to replace it, or choose another name")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist; create it, or choose another with --out")


# --- computing ------------------------------------------------------------------------------------------------------


def in_memory(
    engine: Engine, source: Source, asked: Request, *, progress: Progress | None = None, trace: Spans | None = None
) -> tuple[MemoryStore, RunReport, Prepared]:
    """The result as an array (planes, [K,] *spatial)."""
    made = prepare(engine, source, asked)
    try:
        lead = (made.decision.channels,) if made.decision.channels else ()
        store = MemoryStore(np.empty((source.planes, *lead, *made.shape), made.decision.dtype), made.place)
        total = Tally(made.decision.channels)

        def put(block: Block, values: Array, tally: Tally) -> None:
            store.write(block, values)
            total.add(tally)

        report = run_blocks(made, range(len(made.plan)), put, progress=progress, trace=trace)
    finally:
        _close(made)
    report.class_share = class_share(total, made.decision, engine.spec)
    return store, report, made


def in_stage(
    engine: Engine,
    source: Source,
    asked: Request,
    out: Path,
    make: Callable[[Prepared, Store, bool], None],
    check: Callable[[], None],
    *,
    restart: bool = False,
    compute: Compute | None = None,
    progress: Progress | None = None,
    trace: Spans | None = None,
) -> RunReport:
    """Computes what is missing of a result in a stage, and has the output made where that was the last of it.

    Args:
        engine, source, asked: As for :func:`prepare`.
        out: The output.
        make: Makes the output from the finished blocks; told whether an earlier run may have made it already.
        check: Raises where something is there already that ``make`` would replace.
        restart: Throw away what an interrupted run has left.
        compute: Computes the missing blocks elsewhere, so that they have their marks afterwards; None: here.
        progress, trace: As for :func:`unet_rt.predict.predict`.
    """
    index, count = asked.shard
    if restart and count > 1:
        raise ContractError("--restart would throw away what other shards have done; restart one without --shard")
    made = None
    with shard_lock(out, index, count):
        try:
            stage, made = begun(engine, source, asked, out, restart=restart, create=check)
            refused = None
            try:
                check()  # first: another shard may find the last mark and make the output at any moment
            except OutputError as error:
                refused = error
            try:
                there = stage.finished()
            except FileNotFoundError as error:
                raise stage.gone() from error
            complete = len(there) == len(made.plan)
            moved = is_zarr(out) and asked.output != "instances" and complete and not stage.data.exists()
            if moved and not out.exists():
                raise OutputError(
                    f"{stage.folder} is what is left of {out}, which has gone; use --restart to begin anew"
                )
            if refused is not None and not complete:
                raise refused
            store = None if moved else open_store(stage, made, out, marks=bool(there))
            mine = [n for n in range(len(made.plan)) if n % count == index]
            missing = [n for n in mine if n not in there]
            done = sum(made.plan.tiles(n) for n in mine if n in there)
            begin = time.perf_counter()
            if compute is None or not missing or store is None:
                put = _nothing if store is None else partial(stage.put, store)
                report = run_blocks(made, missing, put, done_tiles=done, progress=progress, trace=trace)
            else:

                def told(now: int, total: int) -> None:
                    if progress is not None:
                        progress(done + now, done + total)

                report = compute(made, missing, told)
                report.seconds = time.perf_counter() - begin
            if len(missing) < len(mine):
                report.notes.append(f"{len(mine) - len(missing)} of {len(mine)} blocks were there from an earlier run")
            try:
                left = len(made.plan) - len(stage.finished())
                total, makers = stage.tally(made.decision.channels)
            except FileNotFoundError:
                if stage.folder.exists():
                    raise
                if count == 1 and compute is None:
                    raise stage.gone() from None
                return report  # another shard found all marks set, and made the output
            report.class_share = class_share(total, made.decision, engine.spec)
            report.outside_range = total.outside_share()
            report.notes += _mixed(makers)
            if left:
                report.notes.append(
                    f"shard {index}/{count} is done; {left} of {len(made.plan)} blocks are left to other shards"
                )
            elif (
                store is None
            ):  # the output is there: a kill came before the end of the stage, or another shard is at it
                stage.finish(lambda: None)
            else:
                stage.finish(partial(_finish, make, made, store, complete, out))
            clear(out)
            return report
        finally:
            if made is not None:
                _close(made)


def _mixed(makers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say of blocks that were not all computed by the same libraries on the same processor or device.

    Each of them ran an engine that was proven there, so that nothing is refused; but only one of a kind gives equal bits.
    """
    different = {}
    for key in dict.fromkeys(key for maker in makers for key in maker):
        values = {str(maker.get(key)) for maker in makers}
        if len(values) > 1:
            different[key] = key if key == "features" else f"{key} ({', '.join(sorted(values))})"
    if not different:
        return []
    return [f"blocks were computed with more than one {' and '.join(different.values())}: they may differ by rounding"]


def _finish(
    make: Callable[[Prepared, Store, bool], None], made: Prepared, store: Store, again: bool, out: Path
) -> None:
    """Makes the output; its parts that killed processes have left go first. Nobody else is at them."""
    remove_parts(out)
    make(made, store, again)


def _nothing(block: Block, values: Array, tally: Tally) -> None:
    """Keeps nothing: there is nothing left to compute."""


def begun(
    engine: Engine,
    source: Source,
    asked: Request,
    out: Path,
    *,
    restart: bool = False,
    create: Callable[[], None],
) -> tuple[Stage, Prepared]:
    """The stage of a result, begun here or before, and the result.

    ``create`` is asked before a stage is begun; it raises where that must not be.
    """
    fresh: list[Prepared] = []

    def plan() -> dict[str, Any]:
        create()
        fresh.append(prepare(engine, source, asked))
        return {"plan": fresh[0].plan.to_json(), "numbers": _numbers(fresh[0].affines)}

    kind: Any = "mask" if asked.output == "instances" else asked.output
    decision = decide(engine.spec.contract, engine.spec.outputs[0].channels, kind, asked.mask_values)
    spec = engine.spec
    maker = {"unet-rt": __version__, **exam.fingerprint(spec.backend, engine.session_version, spec.device)}
    stage = open_stage(out, identity(engine, source, decision, asked), plan, maker=maker, restart=restart)
    for other in fresh:
        _close(other)
    return stage, prepare(engine, source, asked, stage)


def _close(made: Prepared) -> None:
    if made.region is not None:
        made.region.close()


def open_store(stage: Stage, made: Prepared, out: Path, *, marks: bool = True) -> Store:
    """Where the blocks of a stage are kept: as its output wants them. Made where there are no ``marks`` yet."""
    if marks and not stage.data.exists():
        raise OutputError(f"{stage.folder} has marks of finished blocks and no data; use --restart to begin anew")
    if not is_zarr(out):
        return PackedStore(stage.data, made.cuts)
    if not stage.data.exists():
        with locked(stage.folder / "start.lock"):
            if not stage.data.exists():
                begun = stage.data.with_name("data.begun")
                shutil.rmtree(begun, ignore_errors=True)
                ZarrOutput.create(
                    begun, _shape(made), made.plan.chunk, made.image.metadata, size_of(made.image, made.shape),
                    **_meaning(made),
                )  # fmt: skip
                stage.rename(begun, stage.data)
    return ZarrStore(ZarrOutput.open(stage.data), made.place)


def _meaning(made: Prepared) -> dict[str, Any]:
    """What values or channels of the result mean, as :meth:`ZarrOutput.create` takes it; nothing of unnamed channels."""
    decision, contract = made.decision, made.engine.spec.contract
    mask = decision.dtype == np.uint8
    if mask and not decision.channels:
        names = label_names(decision, contract)
        return {"names": names | ({int(made.nodata): NO_DATA} if made.image.gaps else {})}
    probabilities = decision.op in ("softmax", "sigmoid") or contract.output_is == "probabilities"
    if len(contract.classes) < decision.channels or not (mask or probabilities):
        return {}
    names = dict(
        enumerate(contract.classes[-decision.channels :])
    )  # the one channel of two classes is that of the second
    return {"names": names, "highest": max(decision.values) if mask else 1}


def is_zarr(out: Path) -> bool:
    return out.suffix.lower() == ".zarr"


def _shape(made: Prepared) -> Shape:
    image = made.image
    return Shape(made.shape, image.plane_shape, image.plane_axes, made.decision.channels, made.decision.dtype)


# --- outputs --------------------------------------------------------------------------------------------------------


def bands(store: Store, made: Prepared) -> Iterator[tuple[int, int, Array]]:
    """(plane, first row, band) of the whole result, in order."""
    lead = max(1, made.decision.channels)
    rows = max(1, BAND_BYTES // (lead * prod(made.shape[1:]) * made.decision.dtype.itemsize))
    for plane in range(made.image.planes):
        for start in range(0, made.shape[0], rows):
            stop = min(start + rows, made.shape[0])
            yield plane, start, store.window(plane, (start, *(0,) * (len(made.shape) - 1)), (stop, *made.shape[1:]))


def write_output(made: Prepared, store: Store, out: Path, *, overwrite: bool) -> None:
    """Makes the output: the stage's OME-Zarr itself, or a file from its blocks."""
    if isinstance(store, ZarrStore):
        store.output.finish()
        move_folder(store.output.folder, out, overwrite=overwrite)
        return
    nodata = made.nodata if made.image.gaps else None
    with _opened(made, out, made.decision.channels, made.decision.dtype, nodata, overwrite=overwrite) as sink:
        for plane, start, band in bands(store, made):
            sink.write(plane, (start,) + (0,) * (len(made.shape) - 1), band)
        sink.commit()


def _opened(
    made: Prepared, out: Path, channels: int, dtype: np.dtype[Any], nodata: float | None = None, *, overwrite: bool
) -> Output:
    return open_output(
        out,
        shape=made.shape,
        planes=made.image.planes,
        plane_shape=made.image.plane_shape,
        plane_axes=made.image.plane_axes,
        channels=channels,
        dtype=dtype,
        source=made.image,
        overwrite=overwrite,
        nodata=nodata,
    )


def move_folder(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Gives a finished folder its name; what had the name before goes aside, until :func:`clear`."""
    if out.exists():
        if not overwrite:
            raise OutputError(f"{out}: exists already; use --overwrite to replace it, or choose another name")
        shutil.rmtree(_aside(out), ignore_errors=True)
        out.rename(_aside(out))
    disk, before = Disk(), folder.parent
    disk.replace(folder, out)
    disk.sync_folder(out.parent)
    disk.sync_folder(before)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.before")


def _numbered(out: Path) -> Path:
    """Where an OME-Zarr of ids is written until it is whole."""
    return out.with_name(f".{out.name}.instances")


def clear(out: Path) -> None:
    """Deletes what went aside, now or before a kill."""
    for folder in (_aside(out), _numbered(out)):
        shutil.rmtree(folder, ignore_errors=True)


def draw_overlay(made: Prepared, store: Store, path: Path) -> None:
    collector = OverlayCollector(made.shape, made.decision.values)
    for plane, start, band in bands(store, made):
        if plane:
            break
        collector(plane, start, band)
    collector.draw(made.image, path)


def write_instances(made: Prepared, store: Store, out: Path | None, tables: Tables, *, overwrite: bool) -> Array:
    """Numbers the objects of a finished mask, plane by plane; writes their image and tables.

    Returns:
        The ids, (planes, *spatial) uint32, where ``out`` is None, else an empty array.
    """
    image = made.image
    ids = np.zeros((image.planes, *(made.shape if out is None else (0,) * len(made.shape))), np.uint32)
    window: tuple[int, ...] = (max(1, BAND_BYTES // 8 // prod(made.shape[1:])), *made.shape[1:])
    with ExitStack() as exits:
        sink: Output | ZarrOutput | None = None
        if out is not None and is_zarr(out):
            folder = _numbered(out)
            shutil.rmtree(folder, ignore_errors=True)
            shape = replace(_shape(made), channels=0, dtype=np.dtype(np.uint32))
            sink = ZarrOutput.create(folder, shape, made.plan.chunk, image.metadata, size_of(image, made.shape))
            side = round(WINDOW_PX ** (2 / len(made.shape)))
            window = tuple(max(c, side // c * c) for c in sink.chunk)
        elif out is not None:
            sink = exits.enter_context(_opened(made, out, 0, np.dtype(np.uint32), overwrite=overwrite))

        def write(start: Sequence[int], block: Array, plane: int) -> None:
            if sink is not None:
                sink.write(plane, start, block)
            else:
                ids[plane][tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block

        names = {k: class_name(made.engine.spec.contract, k) for k in range(1, len(made.decision.values))}
        planes = [
            objects_module.find_objects(
                partial(_labels, made, store, plane),
                made.shape,
                window=window,
                write=partial(write, plane=plane),
                min_size=tables.min_size,
                pixel_size_um=size_of(image, made.shape) or (),
                class_names=names,
            )
            for plane in range(image.planes)
        ]
        if isinstance(sink, ZarrOutput) and out is not None:
            sink.finish()
            move_folder(sink.folder, out, overwrite=overwrite)
        elif isinstance(sink, Output):
            sink.commit()
    if tables.objects is not None:
        tables_module.write_table(tables.objects, planes, overwrite=overwrite)
    if tables.areas is not None:
        tables_module.write_class_areas(tables.areas, planes, overwrite=overwrite)
    if tables.geojson is not None:
        _write_outlines(planes[0], image, ids[0] if out is None else out, tables.geojson, overwrite=overwrite)
    return ids


def _write_outlines(found: objects_module.Objects, image: Source, ids: Any, path: Path, *, overwrite: bool) -> None:
    """Outlines of the ids in an array or file: in map coordinates where the image has them, else in pixels."""
    place = {}
    if image.metadata.kind == "geo":
        place = {"transform": image.metadata.tags["transform"], "crs": image.metadata.tags["crs"]}
    with open_image(ids, Contract(), spatial=2) as source:
        outlines.write_geojson(
            path, found, lambda start, stop: source.read(0, start, stop)[0], overwrite=overwrite, **place
        )


def _labels(made: Prepared, store: Store, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
    """A window of the mask; what holds no data is background."""
    labels = store.window(plane, start, stop)
    return np.where(labels == made.nodata, 0, labels).astype(labels.dtype) if made.image.gaps else labels
