"""The verb export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .options import (
    add_contract,
    add_module,
    add_overwrite,
    add_verb,
    checkpoint_opener,
    parse_numbers,
    read_contract,
    require_torch,
)
from .printing import print_json, text_stream


def add_export(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(verbs, "export", _export, "write a trained network as ONNX, checked", "CHECKPOINT --out MODEL.onnx ")
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="from unet-rt train; a state dict; nnU-Net's .../fold_0")
    p.add_argument("--out", metavar="MODEL.onnx", required=True, help="the ONNX file")
    add_module(p)
    p.add_argument(
        "--sizes", type=parse_numbers, metavar="256,320", help="sizes at which graph and module are compared"
    )
    p.add_argument("--pixels", metavar="IMAGE", help="image to compare them on (default: drawn microscopy)")
    p.add_argument("--exporter", choices=("auto", "trace", "dynamo"), default="auto", help="of torch; default: auto")
    p.add_argument("--opset", type=int, metavar="N", help="ONNX operator set (default: 18)")
    add_overwrite(p)
    add_contract(p)


def _export(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    require_torch("runs the module", "torch")
    from ..errors import size_text
    from ..training.export import OPSET, export, read_pixels

    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise OutputError(f"{out} exists; pass --overwrite to replace it, or choose another --out")
    opened = checkpoint_opener(args)()
    contract = read_contract(args).over(opened.contract)
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
        file=text_stream(args),
    )
    if contract.normalization is None:
        print(
            "note: nothing says how pixels are normalised; pass --normalize here, or to unet-rt build",
            file=text_stream(args),
        )
    return 0
