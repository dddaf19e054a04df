"""The verbs verify and bench."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import ContractError, OutputError
from .options import (
    _contract,
    _count,
    _shape,
    budget,
    channels,
    contract_options,
    reading_options,
    threads_option,
    verb,
)
from .printing import _out, clear, print_json, say
from .train import _opened


def add_verify(verbs: Any) -> None:
    p = verb(verbs, "verify", _verify, "hold an engine against its own FP32 graph", "ENGINE ")
    p.add_argument("engine", metavar="ENGINE", help="engine folder, from unet-rt build")
    p.add_argument("--images", metavar="PATH", nargs="+", help="images to compare on (default: the engine's exam)")
    p.add_argument("--labels", metavar="PATH", nargs="+", help="masks of the same file names")
    p.add_argument("--head", metavar="NAME", help="the output that labels belong to, of several (default: the first)")
    p.add_argument("--baseline", metavar="MODEL.onnx", help="another FP32 graph to compare with")
    p.add_argument(
        "--budget", metavar="KEY=VALUE", nargs="+", default=[], help="what may differ (default: as at build)"
    )
    p.add_argument("--tile", type=_shape, metavar="HxW", help="tile of the engine (default: small, so that seams show)")
    p.add_argument(
        "--picture",
        metavar="PNG",
        help="picture of the worst tile (default: verify-worst.png, and only where the budget is missed)",
    )
    threads_option(p)
    reading_options(p)


def add_bench(verbs: Any) -> None:
    p = verb(
        verbs, "bench", _bench, "time a network's engines beside the libraries used directly", "ENGINE|MODEL.onnx "
    )
    p.add_argument("model", metavar="ENGINE|MODEL.onnx", help="engine folder, or ONNX file: engines are built from it")
    p.add_argument("--image", metavar="PATH", help="image to measure on (default: drawn microscopy)")
    p.add_argument("--samples", metavar="PATH", nargs="+", help="images to build lower precisions from (ONNX files)")
    p.add_argument(
        "--baselines",
        metavar="NAME",
        nargs="*",
        help="out of onnxruntime, openvino, eager, monai, monai-gaussian (default: those that are installed)",
    )
    p.add_argument("--checkpoint", metavar="PATH", help="the same network for PyTorch: what unet-rt export takes")
    p.add_argument("--architecture", metavar="NAME=VALUE,..|FILE", help="of a state dict, as in unet-rt export")
    p.add_argument("--module", metavar="PACKAGE:FUNCTION", help="of a state dict, as in unet-rt export")
    p.add_argument("--arguments", metavar="JSON", help="of that function, as in unet-rt export")
    p.add_argument("--plot", metavar="PNG", help="picture: a point per contender, speed against agreement")
    p.add_argument("--tile", type=_shape, metavar="HxW", help="tile of everybody in pixels")
    p.add_argument("--runs", type=_count, default=5, metavar="N", help="rounds that count (default: 5)")
    p.add_argument("--seconds", type=float, default=120.0, metavar="N", help="of each of two timings (default: 120)")
    threads_option(p)
    contract_options(p)


def _verify(args: argparse.Namespace) -> int:
    from ..judging.verify import verify
    from .texts import verify_text

    report = verify(
        args.engine,
        args.images,
        labels=args.labels,
        head=args.head,
        baseline=args.baseline,
        budget=budget(args),
        axes=args.axes,
        channels=channels(args),
        tile=args.tile,
        picture=args.picture or "verify-worst.png",
        picture_always=args.picture is not None,
        threads=args.threads,
        say=say(args),
    )
    clear()
    if args.json:
        print_json(report.to_json())
    print(verify_text(report), file=_out(args))
    if args.picture and report.picture is None:
        print(f"{args.picture} is not drawn: that takes 2-D images and a difference", file=sys.stderr)
    return 0 if report.accepted else 1


def _bench(args: argparse.Namespace) -> int:
    from ..judging.bench import bench_model
    from .texts import bench_text

    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        raise OutputError(f"{Path(args.plot).parent} is not a folder; choose another --plot")
    module = None
    if args.checkpoint is not None:
        module = _opened(args).module
    elif args.architecture or args.module or args.arguments:
        raise ContractError("--architecture, --module and --arguments say how --checkpoint is read; pass it as well")
    report = bench_model(
        args.model,
        image=args.image,
        samples=args.samples,
        baselines=args.baselines,
        module=module,
        contract=_contract(args),
        axes=args.axes,
        channels=channels(args),
        tile=args.tile,
        threads=args.threads,
        runs=args.runs,
        seconds=args.seconds,
        say=say(args),
    )
    clear()
    print(bench_text(report), file=_out(args))
    if args.plot:
        from ..outputs.charts import Axes, scatter

        points = [
            (r.name, r.mpx_per_s, 100 * (1 - r.relative_error if r.label_agreement is None else r.label_agreement))
            for r in report.rows
        ]
        scatter(Axes("agreement with FP32 in %", "Mpx/s"), points).save(Path(args.plot))
    if args.json:  # last: where the picture cannot be written, stdout holds the error alone
        print_json(report.to_json())
    return 0
