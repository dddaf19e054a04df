"""The verbs pack and unpack."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import overwrite_option, verb
from .printing import _out, print_json


def add_pack(verbs: Any) -> None:
    p = verb(verbs, "pack", _pack, "make an engine folder one archive, the same bytes every time", "ENGINE ")
    p.add_argument("engine", metavar="ENGINE", help="engine folder, from unet-rt build")
    p.add_argument("--out", metavar="FILE", help="the archive (default: ENGINE.tar)")
    overwrite_option(p)


def add_unpack(verbs: Any) -> None:
    p = verb(verbs, "unpack", _unpack, "make an archive an engine folder again", "ARCHIVE ")
    p.add_argument("archive", metavar="ARCHIVE", help="from unet-rt pack")
    p.add_argument("--out", metavar="DIR", help="the engine folder (default: ARCHIVE without .tar)")
    p.add_argument("--sha256", metavar="HASH", help="refuse an archive that has another")
    overwrite_option(p)


def _pack(args: argparse.Namespace) -> int:
    from ..engine.archive import pack

    out = Path(args.out) if args.out else Path(Path(args.engine).resolve().name + ".tar")
    digest = pack(args.engine, out, overwrite=args.overwrite)
    if args.json:
        print_json({"archive": str(out), "sha256": digest, "bytes": out.stat().st_size})
    print(f"{digest}  {out}", file=_out(args))
    return 0


def _unpack(args: argparse.Namespace) -> int:
    from ..engine.archive import unpack

    opened = unpack(args.archive, args.out, expected=args.sha256, overwrite=args.overwrite)
    spec = opened.spec
    if args.json:
        print_json({"folder": str(opened.path), "spec": spec.to_json()})
    print(f"{opened.path}: {spec.backend} {spec.precision} for {spec.device}", file=_out(args))
    return 0
