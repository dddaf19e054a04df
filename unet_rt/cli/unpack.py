"""The verb unpack."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_overwrite, add_verb
from .printing import print_json, text_stream


def add_unpack(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(verbs, "unpack", _unpack, "make an archive an engine folder again", "ARCHIVE ")
    p.add_argument("archive", metavar="ARCHIVE", help="from unet-rt pack")
    p.add_argument("--out", metavar="DIR", help="the engine folder (default: ARCHIVE without .tar)")
    p.add_argument("--sha256", metavar="HASH", help="refuse an archive that has another")
    add_overwrite(p)


def _unpack(args: argparse.Namespace) -> int:
    from ..engine.archive import unpack

    opened = unpack(args.archive, args.out, expected=args.sha256, overwrite=args.overwrite)
    spec = opened.spec
    if args.json:
        print_json({"folder": str(opened.path), "spec": spec.to_json()})
    print(f"{opened.path}: {spec.backend} {spec.precision} for {spec.device}", file=text_stream(args))
    return 0
