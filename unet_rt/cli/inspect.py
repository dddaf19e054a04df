"""The verb inspect."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_verb
from .printing import print_json


def add_inspect(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(
        verbs, "inspect", _inspect, "what a graph needs: stride, halo, exactness and what it costs", "MODEL.onnx "
    )
    p.add_argument("model", metavar="MODEL.onnx", help="ONNX file")


def _inspect(args: argparse.Namespace) -> int:
    from ..graph.report import check_images, inspect
    from .texts import inspect_text

    report = inspect(args.model)
    check_images(report)
    if args.json:
        print_json(report.to_json())
    else:
        print(inspect_text(report))
    return 0
