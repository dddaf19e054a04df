"""The verb verify."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .options import SIZE, add_choices, add_reading, add_threads, add_verb, parse_size, read_budget, read_channels
from .printing import Narrator, print_json, text_stream


def add_verify(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(verbs, "verify", _verify, "hold an engine against its own FP32 graph", "ENGINE ")
    p.add_argument("engine", metavar="ENGINE", help="engine folder, from unet-rt build")
    p.add_argument("--images", metavar="PATH", nargs="+", help="images to compare on (default: the engine's exam)")
    p.add_argument("--labels", metavar="PATH", nargs="+", help="masks of the same file names")
    p.add_argument("--head", metavar="NAME", help="the output that labels belong to, of several (default: the first)")
    p.add_argument("--baseline", metavar="MODEL", help="another FP32 graph to compare with, or an engine's")
    p.add_argument(
        "--budget", metavar="KEY=VALUE", nargs="+", default=[], help="what may differ (default: as at build)"
    )
    p.add_argument(
        "--tile", type=parse_size, metavar=SIZE, help="tile of the engine (default: small, so that seams show)"
    )
    p.add_argument(
        "--picture",
        metavar="PNG",
        help="picture of the worst tile (default: verify-worst.png, and only where the budget is missed)",
    )
    p.add_argument(
        "--speed",
        type=float,
        metavar="RATIO",
        help="most times as long as ONNX Runtime alone takes for a tile (default: not measured)",
    )
    p.add_argument("--junit", metavar="XML", help="the verdict as a JUnit file, a case per image")
    p.add_argument(
        "--markdown", metavar="MD", help="the verdict as a Markdown file, with the picture of the worst tile"
    )
    add_threads(p)
    add_choices(add_reading(p))


def _verify(args: argparse.Namespace) -> int:
    from ..judging.files import write_junit, write_markdown
    from ..judging.verify import verify
    from .texts import verify_text

    with Narrator() as narrator:
        report = verify(
            args.engine,
            args.images,
            labels=args.labels,
            head=args.head,
            baseline=args.baseline,
            budget=read_budget(args),
            axes=args.axes,
            channels=read_channels(args),
            series=args.series,
            nodata=args.nodata,
            tile=args.tile,
            picture=args.picture or "verify-worst.png",
            picture_always=args.picture is not None,
            speed=args.speed,
            threads=args.threads,
            say=narrator.say,
        )
    if args.junit:
        write_junit(report, Path(args.junit))
    if args.markdown:
        write_markdown(report, Path(args.markdown))
    if args.json:
        print_json(report.to_json())
    print(verify_text(report), file=text_stream(args))
    if args.picture and report.picture is None:
        print(f"{args.picture} is not drawn: that takes 2-D images and a difference", file=sys.stderr)
    return 0 if report.accepted else 1
