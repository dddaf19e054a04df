"""The verbs train and export."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ContractError, OutputError
from .options import (
    _contract,
    channels,
    contract_options,
    numbers,
    overwrite_option,
    reading_options,
    scope_option,
    side,
    threads_option,
    verb,
)
from .printing import TrainingBar, _out, clear, print_json

if TYPE_CHECKING:
    from ..models.state import Opened


def add_train(verbs: Any) -> None:
    p = verb(verbs, "train", _train, "train a network on a folder of images and masks", "DATA --out MODEL.pt ")
    p.add_argument("data", metavar="DATA", help="folder of images and masks, e.g. images/a.png and masks/a.png")
    p.add_argument("--out", metavar="MODEL.pt", required=True, help="the checkpoint; curves are drawn beside it")
    _training_options(p)


def add_export(verbs: Any) -> None:
    p = verb(verbs, "export", _export, "write a trained network as ONNX, checked", "CHECKPOINT --out MODEL.onnx ")
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="from unet-rt train; a state dict; nnU-Net's .../fold_0")
    p.add_argument("--out", metavar="MODEL.onnx", required=True, help="the ONNX file")
    p.add_argument("--architecture", metavar="NAME=VALUE,..|FILE", help="of a state dict: network=UNet,width=64,..")
    p.add_argument("--module", metavar="PACKAGE:FUNCTION", help="of a state dict: your function that makes the module")
    p.add_argument("--arguments", metavar="JSON", help="of that function, e.g. '{\"classes\": 3}'")
    p.add_argument("--sizes", type=numbers, metavar="256,320", help="sizes at which graph and module are compared")
    p.add_argument("--pixels", metavar="IMAGE", help="image to compare them on (default: drawn microscopy)")
    p.add_argument("--exporter", choices=("auto", "trace", "dynamo"), default="auto", help="of torch; default: auto")
    p.add_argument("--opset", type=int, metavar="N", help="ONNX operator set (default: 18)")
    overwrite_option(p)
    contract_options(p)


def _training_options(p: argparse.ArgumentParser) -> None:
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
    p.add_argument("--tile", type=side, metavar="PX", dest="tile_px", help="side of a training tile")
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
    threads_option(p)
    p.add_argument("--resume", action="store_true", help="go on with a training that was interrupted")
    overwrite_option(p)
    group = p.add_argument_group("how the folder is read")
    group.add_argument("--images", metavar="DIR", help="sub-folder of the images, where names do not say it")
    group.add_argument("--masks", metavar="DIR", help="sub-folder of the masks")
    group.add_argument("--masks-are", choices=("binary", "instances", "classes"), help="default: told from the masks")
    group.add_argument("--normalize", metavar="HOW", help="default: percentile=1,99.8 of the whole image")
    scope_option(group)
    reading_options(p)


def _train(args: argparse.Namespace) -> int:
    from ..contract.words import parse_normalization
    from ..system import limits as machine

    _torch("trains networks", "train")
    from ..training.fit import NORMALIZATION, Options, fit
    from ..training.trainer import Progress as Validated

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    options = Options(
        preset=args.preset,
        network=args.network,
        architecture=given("width", "depth", "padding", "up", "norm", "dropout"),
        recipe=given(
            "steps", "minutes", "tile_px", "batch", "optimizer", "learning_rate", "balance", "w0", "sigma_px", "seed",
            "precision",
        ),
        normalization=parse_normalization(args.normalize, args.normalize_scope) if args.normalize else NORMALIZATION,
        masks_are=args.masks_are,
        images=args.images,
        masks=args.masks,
        axes=args.axes,
        channels=channels(args),
        augment=not args.no_augment,
        limit=args.limit,
        device=args.device,
        threads=args.threads or machine.threads(),
    )  # fmt: skip
    bar = TrainingBar()

    def report(now: Validated) -> None:
        clear()
        print(
            f"step {now.step} ({now.share:.0%}, {now.seconds:.0f} s): loss {now.loss:.4f}, validation IoU {now.iou:.4f}"
            f"{', the best so far' if now.best else ''}",
            file=_out(args),
            flush=True,
        )

    try:
        result = fit(
            args.data,
            args.out,
            options,
            resume=args.resume,
            overwrite=args.overwrite,
            say=lambda text: print(text, file=_out(args), flush=True),
            report=report,
            progress=bar,
        )
    finally:
        bar.close()
    if args.json:
        print_json(result.to_json())
    print(
        f"{result.path}: validation IoU {result.best.iou:.4f} at step {result.best.step}; curves in {result.curves}\n"
        f"next: unet-rt export {shlex.quote(str(result.path))} --out "
        f"{shlex.quote(str(result.path.with_suffix('.onnx')))}",
        file=_out(args),
    )
    return 0


def _export(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    _torch("runs the module", "torch")
    from ..errors import size_text
    from ..training.export import OPSET, export, read_pixels

    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise OutputError(f"{out} exists; pass --overwrite to replace it, or choose another --out")
    opened = _opened(args)
    contract = _contract(args).over(opened.contract)
    done = export(
        opened.module,
        out,
        contract=contract,
        sizes=args.sizes,
        pixels=read_pixels(args.pixels, contract, args.axes, args.channels) if args.pixels else None,
        exporter=args.exporter,
        opset=args.opset or OPSET,
        metadata=opened.metadata,
    )
    if args.json:
        print_json({**asdict(done), "path": str(done.path), "contract": contract.to_json()})
    sizes = " and ".join(map(size_text, done.sizes))
    print(
        f"{done.path}: {done.parameters:,} parameters, opset {done.opset}, free batch and spatial axes\n"
        f"equals the module at {sizes} px, off by at most {done.max_error:.2g} ({done.tolerance:.2g} is float32's share)"
        f"{''.join(f'{chr(10)}note: {note}' for note in (*opened.notes, *done.notes))}",
        file=_out(args),
    )
    if contract.normalization is None:
        print(
            "note: nothing says how pixels are normalised; pass --normalize here, or to unet-rt build", file=_out(args)
        )
    return 0


def _opened(args: argparse.Namespace) -> Opened:
    """The module of --checkpoint, as --architecture, --module and --arguments say."""
    import json

    _torch("runs the module", "torch")
    from ..models.source import open_module

    try:
        arguments = json.loads(args.arguments) if args.arguments else None
    except json.JSONDecodeError as error:
        raise ContractError(
            f"--arguments {args.arguments!r} is not JSON ({error}); use e.g. '{{\"classes\": 3}}'"
        ) from error
    return open_module(Path(args.checkpoint), architecture=args.architecture, factory=args.module, arguments=arguments)


def _torch(what: str, extra: str) -> None:
    """BackendError where torch is missing."""
    from importlib.util import find_spec

    from ..errors import BackendError

    if find_spec("torch") is None:
        raise BackendError(f"torch is missing, which {what}; pip install 'unet-rt[{extra}]'")
