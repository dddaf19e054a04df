"""The verb bench."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ContractError, OutputError
from .options import (
    SIZE,
    add_contract,
    add_module,
    add_threads,
    add_verb,
    checkpoint_opener,
    completed,
    parse_count,
    parse_size,
    read_channels,
    read_contract,
)
from .printing import Narrator, print_json, text_stream

if TYPE_CHECKING:
    from ..models.state import Opened


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
    add_module(p)
    p.add_argument("--plot", metavar="PNG", help="picture: a point per contender, speed against agreement")
    p.add_argument("--tile", type=parse_size, metavar=SIZE, help="tile of everybody in pixels")
    p.add_argument("--runs", type=parse_count, default=7, metavar="N", help="rounds that count (default: 7)")
    p.add_argument("--seconds", type=float, default=120.0, metavar="N", help="of each of two timings (default: 120)")
    add_threads(p)
    add_contract(p)


def _make_module(opener: partial[Opened]) -> Any:
    """The module alone, in any process."""
    return opener().module


def _bench(args: argparse.Namespace) -> int:
    from ..judging.bench import bench
    from .texts import bench_text

    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        raise OutputError(f"{Path(args.plot).parent} is not a folder; choose another --plot")
    module = None
    if args.checkpoint is not None:
        module = partial(_make_module, checkpoint_opener(args))
        module()  # what is wrong with it is said before anything is built
    elif args.architecture or args.module or args.arguments:
        raise ContractError(
            "--architecture, --module and --arguments say how --checkpoint is read; pass it as well: "
            f"{completed([*args.argv, '--checkpoint', 'YOUR_WEIGHTS.pt'], [])}"
        )
    with Narrator() as narrator:
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
            say=narrator.say,
        )
    print(bench_text(report), file=text_stream(args))
    if args.plot:
        from ..outputs.charts import Axes, scatter

        points = [
            (r.name, r.mpx_per_s, 100 * (1 - r.relative_error if r.label_agreement is None else r.label_agreement))
            for r in report.rows
        ]
        scatter(Axes("agreement with FP32 in %", "Mpx/s", most=100.0), points).save(Path(args.plot))
    if args.json:  # last: where the picture cannot be written, stdout holds the error alone
        print_json(report.to_json())
    return 0
