"""The verbs doctor and demo."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from .options import side, verb
from .printing import Bar, _out, print_json


def add_doctor(verbs: Any) -> None:
    verb(verbs, "doctor", _doctor, "backends, versions, devices, CPU features")


def add_demo(verbs: Any) -> None:
    p = verb(verbs, "demo", _demo, "build, predict and verify the network that ships with unet-rt on a drawn image")
    p.add_argument("--out", metavar="DIR", default="demo-output", help="folder for the results (default: demo-output)")
    p.add_argument("--size", type=side, default=4096, metavar="PX", help="side of the image")


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    found = doctor.collect()
    if args.json:
        print_json(found)
    else:
        print(doctor.format(found))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .demo import demo

    begun = time.perf_counter()
    result = demo(
        Path(args.out), size=args.size, say=lambda text: print(text, file=_out(args), flush=True), progress=Bar("demo")
    )
    if args.json:
        print_json(result)
    print(f"done in {time.perf_counter() - begun:.0f} s; look at {Path(args.out) / 'report.md'}", file=_out(args))
    return 0
