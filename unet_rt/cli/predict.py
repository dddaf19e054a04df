"""The verb predict."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ContractError, ImageError, OutputError
from .folder import Item, Left, advice_text, finish_tables, left_of, say_kept, tables_of
from .options import (
    SIZE,
    add_choices,
    add_overwrite,
    add_reading,
    add_scope,
    add_threads,
    add_verb,
    parse_lengths,
    parse_memory,
    parse_numbers,
    parse_shard,
    parse_size,
    read_channels,
)
from .printing import Bar, Narrator, print_json, text_stream
from .targets import folders_of, list_items

if TYPE_CHECKING:
    from ..contract.contract import Normalization
    from ..engine.engine import Engine
    from ..outputs.split import How
    from ..prediction.report import RunReport
    from ..prediction.request import Tables


def add_predict(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(verbs, "predict", _predict, "predict images of any size", "ENGINE IMAGE|FOLDER ... --out PATH ")
    p.add_argument("engine", metavar="ENGINE", help="engine folder, from unet-rt build")
    p.add_argument("images", metavar="IMAGE|FOLDER", nargs="+", help="files, Zarr folders, URLs, folders of images")
    p.add_argument(
        "--out",
        metavar="PATH",
        required=True,
        help="file (.tif, .png, .npy), .zarr, or folder: NAME.tif for every image",
    )
    p.add_argument(
        "--output",
        choices=("mask", "probability", "raw", "instances"),
        help="default: a mask; the raw values of a regression; instances: objects, numbered",
    )
    p.add_argument(
        "--head", metavar="NAME", help="which output of the network, where it has several (default: the first)"
    )
    p.add_argument(
        "--mask-values",
        type=parse_numbers,
        default=(),
        metavar="0,255",
        help="value of every label in a mask, default 0,1,..",
    )
    p.add_argument("--classes", metavar="NAME,..", help="names of the classes, in order, for tables and reports")
    p.add_argument("--normalize", metavar="HOW", help="for engines whose contract declares none")
    add_scope(p)
    p.add_argument("--tile", type=parse_size, metavar=SIZE, help="tile size in pixels (default: chosen for the image)")
    p.add_argument("--batch", type=int, metavar="N", help="tiles per run; default: as build found fastest")
    add_threads(p)
    p.add_argument("--device", metavar="NAME", help="another GPU than the engine was built for: cuda:N")
    p.add_argument("--overlay", action="store_true", help="also draw the mask over the image (NAME.overlay.png)")
    add_overwrite(p)
    p.add_argument("--skip-existing", action="store_true", help="leave out images whose output is there")
    p.add_argument("--accept-unverified", action="store_true", help="run an engine whose parity is not proven here")
    reading = add_reading(p)
    add_choices(reading)
    reading.add_argument(
        "--level",
        metavar="N|UMum",
        help="of pyramids (Zarr, TIFF, slides): number or pixel size, e.g. 0.5um; default: the finest, 0; with --resample: "
        "the coarsest that is fine enough",
    )
    _add_extent(p)
    _add_large(p)
    _add_objects(p)


def _add_extent(p: argparse.ArgumentParser) -> None:
    """Where in images, at which pixel size and how often the network is run."""
    group = p.add_argument_group("where and how often")
    group.add_argument("--mask", metavar="IMAGE", help="predict only where this image of the same size is not 0")
    group.add_argument(
        "--tta", choices=("none", "flip", "d4"), default="none", help="mean over flips: 4 or 8 times the work"
    )
    group.add_argument(
        "--pixel-size",
        type=parse_lengths,
        default=(),
        metavar="UM[,UM]",
        help="of the images, in micrometres (of level 0)",
    )
    group.add_argument(
        "--resample", action="store_true", help="bring images to the pixel size of training, results back"
    )


def _add_large(p: argparse.ArgumentParser) -> None:
    """How large images are computed."""
    group = p.add_argument_group("large images: a killed run goes on with the same command")
    group.add_argument(
        "--memory", type=parse_memory, metavar="4GB", help="bound on resident memory; default: half of the free"
    )
    group.add_argument(
        "--shard", type=parse_shard, metavar="I/N", help="every N-th block only; the last shard writes --out"
    )
    group.add_argument("--scheduler", metavar="local:N|tcp://..", help="have Dask workers compute the blocks")
    group.add_argument("--restart", action="store_true", help="throw away what an interrupted run has left")


def _add_objects(p: argparse.ArgumentParser) -> None:
    """What is wanted of objects."""
    group = p.add_argument_group("objects (--output instances)")
    group.add_argument(
        "--split",
        choices=("none", "watershed", "border"),
        default="none",
        help="how objects that touch are told apart: by depth (or the network's output distance), by its class border",
    )
    group.add_argument("--min-size", type=int, default=1, metavar="N", help="leave out objects of fewer pixels")
    group.add_argument("--objects", metavar="CSV", help="table of all objects of all images")
    group.add_argument("--areas", metavar="CSV", help="table of what each class covers")
    group.add_argument(
        "--geojson", metavar="FILE|DIR", help="outlines as polygons, a file per image, for QuPath and maps"
    )


def _predict(args: argparse.Namespace) -> int:
    from ..engine.load import load
    from ..images.listing import list_images

    items = list_items(args, list_images(args.images, lambda text: print(text, file=sys.stderr)))
    tables = _tables(args, len(items))
    device = None if args.device == "auto" else args.device
    with (
        left_of(args, items) as left,
        Narrator() as narrator,
        load(
            args.engine, device=device, threads=args.threads or None, accept_unverified=args.accept_unverified
        ) as engine,
    ):
        if args.accept_unverified:
            print(f"WARNING: {args.engine} runs unverified, as asked", file=sys.stderr)
        normalization = _normalization(args, engine)
        try:
            with folders_of(args, items):
                bad = _predict_items(args, engine, items, left, normalization, tables, narrator)
        except BaseException:
            say_kept(args, left, items)
            raise
        if left.run is not None and not bad:
            left.run.close()
    return 2 if bad else 0


def _predict_items(
    args: argparse.Namespace,
    engine: Engine,
    items: Sequence[Item],
    left: Left,
    normalization: Normalization | None,
    tables: Tables | None,
    narrator: Narrator,
) -> int:
    """Predicts what is left, says what was done, and returns how many images could not be predicted."""
    from .texts import OUTSIDE_TOLD, run_text

    results: list[dict[str, Any]] = []
    reports: list[tuple[Item, RunReport]] = []
    failed: list[Item] = []
    for state, there in (("done by an earlier run", left.done), ("skipped", left.skipped)):
        for item in there:
            results.append({"image": item.name, "out": str(item.target), "state": state})
        if there:
            print(f"{len(there)} of {len(items)} images: {state}", file=text_stream(args))
    for item in left.items:
        try:
            own = left.run is not None and left.run.begun(item.target)
            if left.run is not None:
                left.run.begin(item.target)
            bar = Bar(Path(item.image).name, narrator)
            done = _predict_item(args, engine, item, normalization, tables_of(tables, item, left.run), bar, own=own)
        except (ImageError, ContractError) as error:
            if len(items) == 1:
                raise
            # One bad image of many costs nobody the others.
            print(f"error: {error}", file=sys.stderr)
            results.append({"image": str(item.image), "error": str(error)})
            failed.append(item)
            continue
        if left.run is not None:
            left.run.end(item.image, item.target, Path(done.image).name, done.found)
        reports.append((item, done))
        results.append({**done.to_json(), "out": str(item.target)})
        print(run_text(done, item.target if item.target.exists() else None), file=text_stream(args))
    finish_tables(args, left, [item for item in items if item not in failed])
    if advice := advice_text(reports, OUTSIDE_TOLD):
        print(advice, file=text_stream(args))
    if args.json:
        print_json(results)
    if failed:
        print(
            f"{len(failed)} of {len(items)} images were not predicted; the same command tries them again",
            file=sys.stderr,
        )
    return len(failed)


def _normalization(args: argparse.Namespace, engine: Engine) -> Normalization | None:
    """What --normalize and --normalize-scope say; the latter alone goes with the contract's normalisation."""
    from ..contract.words import parse_normalization, scope_of

    declared = engine.spec.contract.normalization
    if args.normalize:
        return parse_normalization(args.normalize, args.normalize_scope)
    if args.normalize_scope is None:
        return None
    if declared is None:
        raise ContractError("--normalize-scope says what statistics are taken over; pass --normalize as well")
    from dataclasses import replace

    return replace(declared, scope=scope_of(args.normalize_scope))


def _predict_item(
    args: argparse.Namespace,
    engine: Engine,
    item: Item,
    normalization: Normalization | None,
    tables: Tables | None,
    progress: Bar,
    *,
    own: bool,
) -> RunReport:
    """Predicts one image as the options say, and returns what was done, with what is worth a note.

    ``own``: what lies at its outputs was left by an earlier run of the same command.
    """
    import warnings

    from ..errors import PixelRangeWarning
    from ..prediction.predict import predict

    warnings.simplefilter("ignore", PixelRangeWarning)  # the text of the report begins with it

    reports: list[RunReport] = []
    predict(
        engine,
        item.image,
        out=item.target,
        output=args.output,
        head=args.head,
        classes=tuple(args.classes.split(",")) if args.classes else (),
        axes=args.axes,
        channels=read_channels(args),
        level=args.level,
        series=args.series,
        nodata=args.nodata,
        tile=args.tile,
        batch=args.batch,
        threads=args.threads,
        mask_values=args.mask_values,
        normalization=normalization,
        overlay=item.overlay,
        overwrite=args.overwrite or own,
        progress=progress,
        report=reports.append,
        pixel_size_um=args.pixel_size,
        resample=args.resample,
        tta=args.tta,
        region=args.mask,
        memory_bytes=args.memory,
        shard=args.shard,
        scheduler=args.scheduler,
        restart=args.restart,
        tables=tables,
    )
    done = reports[0]
    if item.overlay is not None and item.overlay.exists():  # the last shard draws it
        done.notes.append(f"overlay: {item.overlay}")
    if item.target.suffix.lower() == ".png" and done.class_share and not args.mask_values:
        done.notes.append("the mask holds labels 0, 1, .., which viewers show as black; see --mask-values")
    return done


def _tables(args: argparse.Namespace, images: int) -> Tables | None:
    """What is wanted of objects; None where nothing is."""
    from ..prediction.request import Tables

    paths = {name: Path(getattr(args, name)) for name in ("objects", "areas", "geojson") if getattr(args, name)}
    if not paths and args.min_size == 1 and args.split == "none":
        return None
    if args.output != "instances":
        raise ContractError(
            "--split, --min-size, --objects, --areas and --geojson are about objects; use --output instances"
        )
    if images > 1 and args.shard is not None and ("objects" in paths or "areas" in paths):
        raise OutputError("shards of several images make no table of all; predict the images one by one")
    return Tables(
        args.min_size, paths.get("objects"), paths.get("areas"), paths.get("geojson"), cast("How", args.split)
    )
