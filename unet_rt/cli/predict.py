"""The verb predict."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ContractError, ImageError, OutputError
from .options import (
    SIZE,
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

if TYPE_CHECKING:
    from ..contract.contract import Normalization
    from ..engine.engine import Engine
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
    p.add_argument("--accept-unverified", action="store_true", help="run an engine whose parity is not proven here")
    reading = add_reading(p)
    reading.add_argument(
        "--series", metavar="N|NAME", help="of TIFFs that hold several images: number, from 0, or name"
    )
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
    group.add_argument("--min-size", type=int, default=1, metavar="N", help="leave out objects of fewer pixels")
    group.add_argument("--objects", metavar="CSV", help="table of all objects")
    group.add_argument("--areas", metavar="CSV", help="table of what each class covers")
    group.add_argument("--geojson", metavar="JSON", help="outlines as polygons, for slide viewers")


class _Item(NamedTuple):
    """One image, and where its outputs go."""

    image: Path | str
    target: Path
    overlay: Path | None


def _predict(args: argparse.Namespace) -> int:
    from ..engine.load import load
    from ..images.open import list_images
    from .texts import run_text

    items = _list_items(args, list_images(args.images))
    results: list[dict[str, Any]] = []
    tables, bad = _tables(args, len(items)), 0
    device = None if args.device == "auto" else args.device
    with (
        ExitStack() as folders,
        Narrator() as narrator,
        load(
            args.engine, device=device, threads=args.threads or None, accept_unverified=args.accept_unverified
        ) as engine,
    ):
        if args.accept_unverified:
            print(f"WARNING: {args.engine} runs unverified, as asked", file=sys.stderr)
        normalization = _normalization(args, engine)
        folders.enter_context(_folder_of(args, [item.target for item in items]))
        for item in items:
            try:
                done = _predict_item(args, engine, item, normalization, tables, Bar(Path(item.image).name, narrator))
            except (ImageError, ContractError) as error:
                if len(items) == 1:
                    raise
                # One bad image of many costs nobody the others.
                print(f"error: {item.image}: {error}", file=sys.stderr)
                results.append({"image": str(item.image), "error": str(error)})
                bad += 1
                continue
            results.append({**done.to_json(), "out": str(item.target)})
            print(run_text(done, item.target if item.target.exists() else None), file=text_stream(args))
    if args.json:
        print_json(results)
    if bad:
        print(f"{bad} of {len(items)} images were not predicted", file=sys.stderr)
    return 2 if bad else 0


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
    item: _Item,
    normalization: Normalization | None,
    tables: Tables | None,
    progress: Bar,
) -> RunReport:
    """Predicts one image as the options say, and returns what was done, with what is worth a note."""
    from ..prediction.predict import predict

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
        tile=args.tile,
        batch=args.batch,
        threads=args.threads,
        mask_values=args.mask_values,
        normalization=normalization,
        overlay=item.overlay,
        overwrite=args.overwrite,
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


def _list_items(args: argparse.Namespace, images: Sequence[Path | str]) -> list[_Item]:
    """The images, each with its outputs.

    Raises:
        OutputError: One exists, and is not to be replaced.
    """
    from ..prediction.stage import stage_folder

    items = [
        _Item(image, target, _overlay_name(target) if args.overlay else None)
        for image, target in zip(images, _targets(args, images), strict=True)
    ]
    for item in items if not args.overwrite else []:
        if item.overlay is not None and item.overlay.exists() and not stage_folder(item.target).exists():
            raise OutputError(f"{item.overlay} exists; pass --overwrite to replace it, or choose another --out")
    return items


def _tables(args: argparse.Namespace, images: int) -> Tables | None:
    """What is wanted of objects; None where nothing is."""
    from ..prediction.request import Tables

    paths = {name: getattr(args, name) for name in ("objects", "areas", "geojson") if getattr(args, name)}
    if not paths and args.min_size == 1:
        return None
    if args.output != "instances":
        raise ContractError("--min-size, --objects, --areas and --geojson are about objects; use --output instances")
    if paths and images > 1:
        raise OutputError(f"{images} images do not go into one table; predict them one by one")
    return Tables(args.min_size, **{name: Path(path) for name, path in paths.items()})


def _targets(args: argparse.Namespace, images: Sequence[Path | str]) -> list[Path]:
    """One output per image: --out itself for one image, files in the folder --out for several."""
    if not args.out:
        raise OutputError("--out is empty; name a file or a folder")
    out = Path(args.out)
    suffix = ".tif"
    if out.is_file() and len(images) > 1:
        raise OutputError(f"{out} is a file, and {len(images)} images need a folder; choose another --out")
    zarr = out.suffix.lower() == ".zarr"  # a folder that is one output
    if len(images) == 1 and (zarr or (not out.is_dir() and (out.suffix != "" or out.exists()))):
        _not_the_image(out, images)
        return [out]
    if zarr or (not out.is_dir() and out.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")):
        raise OutputError(f"{len(images)} images need a folder, and {out} is named like a file; choose another --out")
    targets = [out / (Path(image).stem.removesuffix(".ome") + suffix) for image in images]
    doubles = {t for t in targets if targets.count(t) > 1}
    if doubles:
        raise OutputError(f"several images would be written to {min(doubles)}; predict them into different folders")
    for target in targets:
        _not_the_image(target, images)
    if not args.overwrite:
        existing = [t for t in targets if t.exists()]
        if existing:
            raise OutputError(f"{existing[0]} exists; pass --overwrite to replace it")
    return targets


def _not_the_image(target: Path, images: Sequence[Path | str]) -> None:
    """OutputError where an output would replace one of the images: --overwrite is not meant for them."""
    if target.exists() and any(isinstance(image, Path) and target.samefile(image) for image in images):
        raise OutputError(f"{target} is an image to be predicted, which an output never replaces; choose another --out")


def _overlay_name(target: Path) -> Path:
    return target.with_name(target.name.removesuffix(target.suffix) + ".overlay.png")


@contextmanager
def _folder_of(args: argparse.Namespace, targets: Sequence[Path]) -> Iterator[None]:
    """Makes the folder --out where outputs go into one, and removes it again where nothing came of it."""
    folder = Path(args.out)
    if targets[0].parent != folder or folder.is_dir():
        yield
        return
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created ({error.strerror}); choose another --out") from error
    try:
        yield
    finally:
        with suppress(OSError):  # it holds outputs that are whole
            folder.rmdir()
