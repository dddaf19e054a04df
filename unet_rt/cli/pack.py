"""The verb pack."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_overwrite, add_verb
from .printing import print_json, text_stream


def add_pack(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(verbs, "pack", _pack, "make an engine folder one archive, the same bytes every time", "ENGINE ")
    p.add_argument("engine", metavar="ENGINE", help="engine folder, from unet-rt build")
    p.add_argument("--out", metavar="FILE", help="the archive (default: ENGINE.tar)")
    add_overwrite(p)


def _pack(args: argparse.Namespace) -> int:
    from ..engine.archive import pack

    out = Path(args.out) if args.out else Path(Path(args.engine).resolve().name + ".tar")
    digest = pack(args.engine, out, overwrite=args.overwrite)
    if args.json:
        print_json({"archive": str(out), "sha256": digest, "bytes": out.stat().st_size})
    print(f"{digest}  {out}", file=text_stream(args))
    return 0
