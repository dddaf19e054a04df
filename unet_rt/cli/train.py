"""The verb train."""

from __future__ import annotations

import argparse
import shlex
from contextlib import closing
from typing import TYPE_CHECKING, Any

from .options import (
    add_overwrite,
    add_reading,
    add_scope,
    add_threads,
    add_verb,
    parse_side,
    read_channels,
    require_torch,
)
from .printing import Narrator, TrainingBar, clear_line, print_json, text_stream

if TYPE_CHECKING:
    from ..training.options import Options


def add_train(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(verbs, "train", _train, "train a network on a folder of images and masks", "DATA --out MODEL.pt ")
    p.add_argument("data", metavar="DATA", help="folder of images and masks, e.g. images/a.png and masks/a.png")
    p.add_argument("--out", metavar="MODEL.pt", required=True, help="the checkpoint; curves are drawn beside it")
    _add_training(p)


def _add_training(p: argparse.ArgumentParser) -> None:
    p.add_argument("--preset", choices=("default", "paper"), default="default", help="paper: the recipe of the paper")
    p.add_argument("--network", choices=("UNet", "FCN8s", "SegNet"), default="UNet", help="default: UNet")
    for name, text in (("width", "channels of the first level"), ("depth", "number of poolings")):
        p.add_argument(f"--{name}", type=int, metavar="N", help=text)
    p.add_argument("--padding", choices=("same", "valid"), help="of the U-Net's convolutions")
    p.add_argument("--up", choices=("transposed", "bilinear", "nearest"), help="of the U-Net's expanding path")
    p.add_argument("--norm", choices=("batch", "none"), help="BatchNorm or none")
    p.add_argument("--dropout", type=float, metavar="P", help="at the end of the contracting path")
    p.add_argument("--steps", type=int, metavar="N", help="updates; default: 1000 on a CPU, 4000 on a GPU")
    p.add_argument("--minutes", type=float, metavar="N", help="stop after that time, in place of --steps")
    p.add_argument("--tile", type=parse_side, metavar="PX", dest="tile_px", help="side of a training tile")
    p.add_argument("--batch", type=int, metavar="N", help="tiles per step")
    p.add_argument("--optimizer", choices=("adam", "sgd"), help="sgd has momentum 0.99")
    p.add_argument("--learning-rate", type=float, metavar="X", help="at the start; it falls to nothing")
    p.add_argument("--balance", type=float, metavar="X", help="1: classes count alike; 0: pixels do")
    p.add_argument("--w0", type=float, metavar="X", help="weight of borders between objects; default 10")
    p.add_argument("--sigma", type=float, metavar="PX", dest="sigma_px", help="reach of that weight; default 5")
    p.add_argument("--seed", type=int, metavar="N", help="of everything random; default 0")
    p.add_argument("--no-augment", action="store_true", help="tiles as they are in the images")
    p.add_argument("--limit", type=int, metavar="N", help="train on the first N images only")
    p.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 on a GPU")
    p.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda[:N]")
    add_threads(p)
    p.add_argument("--resume", action="store_true", help="go on with a training that was interrupted")
    add_overwrite(p)
    group = p.add_argument_group("how the folder is read")
    group.add_argument("--images", metavar="DIR", help="sub-folder of the images, where names do not say it")
    group.add_argument("--masks", metavar="DIR", help="sub-folder of the masks")
    group.add_argument("--masks-are", choices=("binary", "instances", "classes"), help="default: told from the masks")
    group.add_argument("--normalize", metavar="HOW", help="default: percentile=1,99.8 of the whole image")
    add_scope(group)
    add_reading(p)


def _train(args: argparse.Namespace) -> int:
    require_torch("trains networks", "train")
    from ..training.fit import fit
    from ..training.trainer import Progress as Validated

    options = _training_request(args)

    def report(now: Validated) -> None:
        clear_line()
        print(
            f"step {now.step} ({now.share:.0%}, {now.seconds:.0f} s): loss {now.loss:.4f}, validation IoU {now.iou:.4f}"
            f"{', the best so far' if now.best else ''}",
            file=text_stream(args),
            flush=True,
        )

    with Narrator() as narrator, closing(TrainingBar(narrator)) as bar:
        result = fit(
            args.data,
            args.out,
            options,
            resume=args.resume,
            overwrite=args.overwrite,
            say=lambda text: print(text, file=text_stream(args), flush=True),
            report=report,
            progress=bar,
        )
    if args.json:
        print_json(result.to_json())
    print(
        f"{result.path}: validation IoU {result.best.iou:.4f} at step {result.best.step}; curves in {result.curves}\n"
        f"next: unet-rt export {shlex.quote(str(result.path))} --out "
        f"{shlex.quote(str(result.path.with_suffix('.onnx')))}",
        file=text_stream(args),
    )
    return 0


def _training_request(args: argparse.Namespace) -> Options:
    """What the options say of a training."""
    from ..contract.words import parse_normalization
    from ..system import limits
    from ..training.options import NORMALIZATION, Options

    def select(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    return Options(
        preset=args.preset,
        network=args.network,
        architecture=select("width", "depth", "padding", "up", "norm", "dropout"),
        recipe=select(
            "steps", "minutes", "tile_px", "batch", "optimizer", "learning_rate", "balance", "w0", "sigma_px", "seed",
            "precision",
        ),
        normalization=parse_normalization(args.normalize, args.normalize_scope) if args.normalize else NORMALIZATION,
        masks_are=args.masks_are,
        images=args.images,
        masks=args.masks,
        axes=args.axes,
        channels=read_channels(args),
        augment=not args.no_augment,
        limit=args.limit,
        device=args.device,
        threads=args.threads or limits.threads(),
    )  # fmt: skip
