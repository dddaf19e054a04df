"""The verb bench."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ContractError, OutputError
from .options import (
    add_contract,
    add_threads,
    add_verb,
    open_checkpoint,
    parse_count,
    parse_size,
    read_channels,
    read_contract,
)
from .printing import clear_line, print_json, say, text_stream


def add_bench(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(
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
    p.add_argument("--tile", type=parse_size, metavar="HxW", help="tile of everybody in pixels")
    p.add_argument("--runs", type=parse_count, default=5, metavar="N", help="rounds that count (default: 5)")
    p.add_argument("--seconds", type=float, default=120.0, metavar="N", help="of each of two timings (default: 120)")
    add_threads(p)
    add_contract(p)


def _bench(args: argparse.Namespace) -> int:
    from ..judging.bench import bench
    from .texts import bench_text

    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        raise OutputError(f"{Path(args.plot).parent} is not a folder; choose another --plot")
    module = None
    if args.checkpoint is not None:
        module = open_checkpoint(args).module
    elif args.architecture or args.module or args.arguments:
        raise ContractError("--architecture, --module and --arguments say how --checkpoint is read; pass it as well")
    report = bench(
        args.model,
        image=args.image,
        samples=args.samples,
        baselines=args.baselines,
        module=module,
        contract=read_contract(args),
        axes=args.axes,
        channels=read_channels(args),
        series=args.series,
        nodata=args.nodata,
        tile=args.tile,
        threads=args.threads,
        runs=args.runs,
        seconds=args.seconds,
        say=say(args),
    )
    clear_line()
    print(bench_text(report), file=text_stream(args))
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
