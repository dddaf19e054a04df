"""Results that take blocks: kept in a stage beside the output or in memory, shared by shards, then made into the output."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import machine, objects
from .blocks import Block, plan_blocks, plan_of
from .contract import Normalization
from .durable import Disk, locked
from .engine import Engine
from .errors import ContractError, OutputError
from .image import Source, open_image
from .normalize import Affine, Affines, OnePlane, affine
from .output import Output, Shape, check_output, nodata_value, open_output
from .output_zarr import ZarrOutput
from .parity import class_name
from .pictures import OverlayCollector
from .pipeline import Progress, RunReport, Spans, Tally, class_share
from .predict_blocks import Prepared, Resampled, run_blocks
from .resample import resampled_shape
from .stage import MemoryStore, PackedStore, Stage, Store, ZarrStore, open_stage
from .stitch import Decision, decide

Array = npt.NDArray[Any]

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
        memory_bytes: What all may take beside the loaded engine; None: a share of what is free.
        shard: (index, count): this process computes every count-th block.
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


def identity(engine: Engine, source: Source, decision: Decision, asked: Request) -> dict[str, Any]:
    """Everything that decides the result, under the names that messages use."""
    spec = json.dumps(engine.spec.to_json(), sort_keys=True).encode()
    graph = None if engine.folder is None else engine.folder.files["graph"]["sha256"]
    return {
        "engine": [hashlib.sha256(spec).hexdigest()[:16], graph],
        "image": source.fingerprint() or {"shape": source.shape, "dtype": str(source.dtype)},
        "reading of the image": source.reading,
        "output": {**asdict(decision), "dtype": str(decision.dtype)},
        "normalization": asdict(asked.normalization),
        "pixel size": [asked.resample, asked.pixel_size_um],
        "region": asked.region,
        "tile": asked.tile,
    }


def prepare(engine: Engine, source: Source, asked: Request, run: dict[str, Any] | None = None) -> Prepared:
    """The result that is asked for, ready to be computed.

    Args:
        engine: The engine.
        source: The image, open as long as the result is worked on.
        asked: What is asked for.
        run: ``plan`` and ``numbers`` of a run that was begun; None: they are made.
    """
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
    if run is not None and run["numbers"] is not None:
        affines = OnePlane(_affine(run["numbers"]))
    else:
        affines = affine(asked.normalization, source)
    seen = source if shape is None else Resampled(source, shape, affines)
    if run is not None:
        plan = plan_of(spec, source.shape, source.planes, run["plan"], seen=shape)
    else:
        free = machine.memory_bytes()
        if engine.device_session is not None:
            free = min(free, engine.device_session.stream.device.memory()[0])
        plan = plan_blocks(
            spec,
            source.shape,
            source.planes,
            decision,
            pixel_bytes=source.channels * source.dtype.itemsize,
            memory_bytes=int(FREE_SHARE * free)
            if asked.memory_bytes is None
            else asked.memory_bytes - machine.rss_bytes(),
            tile=asked.tile,
            batch=asked.batch,
            seen=shape,
        )
    region = None if asked.region is None else _region(asked.region, source)
    nodata = nodata_value(decision.dtype, decision.values)
    return Prepared(engine, source, seen, plan, decision, first, affines, region, nodata, asked.batch, asked.threads)


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
    from .contract import Contract

    region = open_image(path, Contract(), spatial=len(source.shape))
    if region.shape != source.shape or region.planes not in (1, source.planes):
        shape = "x".join(map(str, region.shape))
        region.close()
        raise ContractError(
            f"{path}: the region has {region.planes} planes of {shape} px, and {source.name} {source.planes} of "
            f"{'x'.join(map(str, source.shape))}; draw it on the image"
        )
    return region


def _numbers(affines: Affines | OnePlane) -> dict[str, Any] | None:
    """One plane's numbers where they are those of all planes."""
    if isinstance(affines, Affines) and not affines.same:
        return None
    one = affines.plane(0)
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
    scheduler: str | None = None,
    overlay: Path | None = None,
    tables: Tables | None = None,
    progress: Progress | None = None,
    trace: Spans | None = None,
) -> tuple[RunReport, Any]:
    """A prediction in blocks: its report, and the path written or the array, as :func:`unet_rt.predict.predict` has them."""
    if tables is not None and asked.output != "instances":
        raise ContractError("tables list objects; use --output instances")
    if asked.output == "instances" and asked.mask_values:
        raise ContractError("--output instances numbers objects from 1 on; leave --mask-values away")
    if out is not None:
        check_target(out, overwrite=overwrite)

    def make(made: Prepared, store: Store) -> None:
        if overlay is not None:
            draw_overlay(made, store, overlay)
        if asked.output == "instances":
            write_instances(made, store, out, tables or Tables(), overwrite=overwrite)
        elif out is not None:
            write_output(made, store, out, overwrite=overwrite)

    if staged and out is not None:
        report = in_stage(
            engine, source, asked, out, make, restart=restart, scheduler=scheduler, progress=progress, trace=trace
        )
        return report, out
    store, report, made = in_memory(engine, source, asked, progress=progress, trace=trace)
    make(made, store)
    if out is not None:
        return report, out
    result = store.array
    if asked.output == "instances":
        result = np.stack([objects.label_mask(plane, min_size=(tables or Tables()).min_size)[0] for plane in result])
    return report, result.reshape(*source.plane_shape, *result.shape[1:])


def check_target(out: Path, *, overwrite: bool) -> None:
    """OutputError for what can be known of an output before any work."""
    if not is_zarr(out):
        check_output(out, overwrite=overwrite)
    elif out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; use --overwrite to replace it, or choose another name")
    elif not out.parent.is_dir():
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
    make: Callable[[Prepared, Store], None],
    *,
    restart: bool = False,
    scheduler: str | None = None,
    progress: Progress | None = None,
    trace: Spans | None = None,
    disk: Disk | None = None,
) -> RunReport:
    """Computes what is missing of a result in a stage, and has the output made where that was the last of it.

    Args:
        engine, source, asked: As for :func:`prepare`.
        out: The output.
        make: Makes the output from the finished blocks.
        restart: Throw away what an interrupted run has left.
        scheduler: Have workers of Dask compute (see ``cluster``).
        progress, trace: As for :func:`unet_rt.predict.predict`.
        disk: File operations.
    """
    made = None
    try:
        stage, made = begun(engine, source, asked, out, restart=restart, disk=disk)
        index, count = asked.shard
        with stage.shard(index, count):
            store = open_store(stage, made, out)
            there = stage.finished()
            mine = [n for n in range(len(made.plan)) if n % count == index]
            missing = [n for n in mine if n not in there]
            done = sum(made.plan.tiles(n) for n in mine if n in there)
            if scheduler is None:
                put = partial(stage.put, store)
                report = run_blocks(made, missing, put, done_tiles=done, progress=progress, trace=trace)
            else:
                from . import cluster

                report = cluster.compute(
                    scheduler, made, asked, stage, out, missing, done_tiles=done, progress=progress
                )
            report.class_share = class_share(stage.tally(made.decision.channels), made.decision, engine.spec)
            if len(missing) < len(mine):
                report.notes.append(f"{len(mine) - len(missing)} of {len(mine)} blocks were there from an earlier run")
            left = len(made.plan) - len(stage.finished())
            if left:
                report.notes.append(
                    f"shard {index}/{count} is done; {left} of {len(made.plan)} blocks are left to other shards"
                )
            else:
                stage.finish(partial(make, made, store))
        return report
    finally:
        if made is not None:
            _close(made)


def begun(
    engine: Engine, source: Source, asked: Request, out: Path, *, restart: bool = False, disk: Disk | None = None
) -> tuple[Stage, Prepared]:
    """The stage of a result, begun here or before, and the result."""
    fresh: list[Prepared] = []

    def plan() -> dict[str, Any]:
        fresh.append(prepare(engine, source, asked))
        return {"plan": fresh[0].plan.to_json(), "numbers": _numbers(fresh[0].affines)}

    decision = decide(
        engine.spec.contract,
        engine.spec.outputs[0].channels,
        "mask" if asked.output == "instances" else asked.output,  # type: ignore[arg-type]
        asked.mask_values,
    )
    stage = open_stage(out, identity(engine, source, decision, asked), plan, restart=restart, disk=disk)
    for other in fresh:
        _close(other)
    return stage, prepare(engine, source, asked, dict(stage.run))


def _close(made: Prepared) -> None:
    if made.region is not None:
        made.region.close()


def open_store(stage: Stage, made: Prepared, out: Path) -> Store:
    """Where the blocks of a stage are kept: as its output wants them."""
    if not is_zarr(out):
        return PackedStore(stage.data, made.cuts)
    if not stage.data.exists():
        with locked(stage.folder / "start.lock"):
            if not stage.data.exists():
                begun = stage.data.with_name("data.begun")
                shutil.rmtree(begun, ignore_errors=True)
                ZarrOutput.create(begun, _shape(made), made.plan.chunk, made.image.metadata, made.image.pixel_size_um)
                begun.rename(stage.data)
    return ZarrStore(ZarrOutput.open(stage.data), made.place)


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
    with open_output(
        out,
        shape=made.shape,
        planes=made.image.planes,
        plane_shape=made.image.plane_shape,
        plane_axes=made.image.plane_axes,
        channels=made.decision.channels,
        dtype=made.decision.dtype,
        source=made.image,
        overwrite=overwrite,
        nodata=made.nodata if made.image.gaps else None,
    ) as sink:
        for plane, start, band in bands(store, made):
            sink.write(plane, (start,) + (0,) * (len(made.shape) - 1), band)
        sink.commit()


def move_folder(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Gives a finished folder its name; what had the name before is deleted after that."""
    before = out.with_name(f".{out.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if out.exists():
        if not overwrite:
            raise OutputError(f"{out}: exists already; use --overwrite to replace it, or choose another name")
        out.rename(before)
    folder.rename(out)
    Disk().sync_folder(out.parent)
    shutil.rmtree(before, ignore_errors=True)


def draw_overlay(made: Prepared, store: Store, path: Path) -> None:
    collector = OverlayCollector(made.shape, made.decision.values)
    for plane, start, band in bands(store, made):
        if plane:
            break
        collector(plane, start, band)
    collector.draw(made.image, path)


def write_instances(made: Prepared, store: Store, out: Path | None, tables: Tables, *, overwrite: bool) -> None:
    """Numbers the objects of a finished mask, plane by plane; writes their image and tables."""
    image, planes = made.image, []
    names = {k: class_name(made.engine.spec.contract, k) for k in range(1, len(made.decision.values))}
    with ExitStack() as exits:
        sink: Output | None = None
        target: ZarrOutput | None = None
        if out is not None and is_zarr(out):
            folder = out.with_name(f".{out.name}.instances")
            shutil.rmtree(folder, ignore_errors=True)
            shape = replace(_shape(made), channels=0, dtype=np.dtype(np.uint32))
            target = ZarrOutput.create(folder, shape, made.plan.chunk, image.metadata, image.pixel_size_um)
            window = tuple(max(c, WINDOW_PX // c * c) for c in made.plan.chunk)
        elif out is not None:
            sink = exits.enter_context(
                open_output(
                    out,
                    shape=made.shape,
                    planes=image.planes,
                    plane_shape=image.plane_shape,
                    plane_axes=image.plane_axes,
                    dtype=np.uint32,
                    source=image,
                    overwrite=overwrite,
                )
            )
        if target is None:
            window = (max(1, BAND_BYTES // 8 // prod(made.shape[1:])), *made.shape[1:])
        for plane in range(image.planes):

            def write(start: Sequence[int], ids: Array, plane: int = plane) -> None:
                if sink is not None:
                    sink.write(plane, start, ids)
                elif target is not None:
                    target.write(plane, start, ids)

            planes.append(
                objects.find_objects(
                    partial(_labels, made, store, plane),
                    made.shape,
                    window=window,
                    write=None if out is None else write,
                    min_size=tables.min_size,
                    pixel_size_um=image.pixel_size_um or (),
                    class_names=names,
                )
            )
        if sink is not None:
            sink.commit()
        elif target is not None and out is not None:
            target.finish()
            move_folder(target.folder, out, overwrite=overwrite)
    if tables.objects is not None:
        objects.write_table(tables.objects, planes, overwrite=overwrite)
    if tables.areas is not None:
        objects.write_class_areas(tables.areas, planes, overwrite=overwrite)


def _labels(made: Prepared, store: Store, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
    """A window of the mask; what holds no data is background."""
    labels = store.window(plane, start, stop)
    return np.where(labels == made.nodata, 0, labels).astype(labels.dtype) if made.image.gaps else labels
