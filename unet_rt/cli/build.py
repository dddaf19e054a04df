"""The verb build."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import IncompleteContractError
from .options import (
    SIZE,
    add_contract,
    add_overwrite,
    add_threads,
    add_verb,
    complete_command,
    completed,
    parse_size,
    read_budget,
    read_channels,
    read_contract,
)
from .printing import Narrator, print_json, text_stream

if TYPE_CHECKING:
    from ..building.report import BuildReport


def add_build(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(verbs, "build", _build, "measure candidates, prove parity, write an engine folder", "MODEL.onnx ... ")
    p.add_argument(
        "model",
        metavar="MODEL.onnx",
        nargs="+",
        help="ONNX file, bioimage.io package or rdf.yaml; several (folds) become one engine of their mean probability",
    )
    p.add_argument("--samples", metavar="PATH", nargs="+", help="images like those the network will see")
    p.add_argument("--out", metavar="DIR", help="the engine folder (default: MODEL.urt; ensemble.urt for several)")
    p.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="auto, onnxruntime, openvino, tensorrt, ncnn; more by packages",
    )
    p.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda[:N] or vulkan[:N]")
    p.add_argument("--precision", default="auto", metavar="NAME", help="auto, fp32, fp16, bf16 or int8")
    p.add_argument(
        "--tile", type=parse_size, metavar=SIZE, help="tile size in pixels, one number for all axes, or auto"
    )
    p.add_argument(
        "--halo",
        default="auto",
        metavar="exact|measured|N",
        help="samples discarded at inner tile edges (default: exact, unless that costs too much)",
    )
    p.add_argument(
        "--overlap", type=parse_size, metavar=SIZE, help="overlap of blended tiles, for networks that are not exact"
    )
    p.add_argument("--blend", choices=("gaussian", "constant"), default="gaussian", help="weights of blended tiles")
    p.add_argument(
        "--placement",
        choices=("even", "monai", "nnunet"),
        default="even",
        help="where blended tiles lie, and whose weights they have (default: even)",
    )
    p.add_argument(
        "--budget",
        metavar="KEY=VALUE",
        nargs="+",
        default=[],
        help="label_change=1e-3 (INT8: 5e-3) dice=0.99 error=1e-2 seam=1e-5 rounding=1e-4",
    )
    p.add_argument(
        "--equal",
        choices=("bits", "rounding"),
        default="rounding",
        help="how equal tiles have to be to the whole image: to the bit, or up to the order of sums (default)",
    )
    p.add_argument("--no-exam", action="store_true", help="keep no sample tiles in the engine (confidential images)")
    add_overwrite(p)
    p.add_argument(
        "--cache",
        metavar="DIR",
        default=os.environ.get("UNET_RT_CACHE") or None,
        help="keep engines here by all that decided them (default: $UNET_RT_CACHE, else nowhere)",
    )
    p.add_argument("--search-minutes", type=float, metavar="N", help="time for the search (default: 10)")
    add_threads(p)
    add_contract(p)


def _build(args: argparse.Namespace) -> int:
    from ..building.build import SEARCH_MINUTES, build
    from .texts import build_text

    reports: list[BuildReport] = []
    try:
        with Narrator() as narrator:
            engine = build(
                args.model,
                samples=args.samples,
                out=args.out,
                budget=read_budget(args),
                contract=read_contract(args),
                backend=args.backend,
                device=args.device,
                precision=args.precision,
                tile=args.tile,
                halo=args.halo,
                overlap=args.overlap,
                blend=args.blend,
                placement=args.placement,
                threads=args.threads,
                axes=args.axes,
                channels=read_channels(args),
                series=args.series,
                nodata=args.nodata,
                keep_exam=not args.no_exam,
                overwrite=args.overwrite,
                cache=args.cache,
                equal=args.equal,
                search_minutes=SEARCH_MINUTES if args.search_minutes is None else args.search_minutes,
                say=narrator.say,
                tell=narrator.tell,
                report=reports.append,
            )
    except IncompleteContractError as error:
        raise complete_command(error, args.argv) from error
    engine.close()
    if not reports:
        folder = "" if engine.folder is None else str(engine.folder.path)
        if args.json:
            print_json({"folder": folder, "up_to_date": True, "spec": engine.spec.to_json()})
        print(
            f"{folder}: up to date ({engine.spec.backend} {engine.spec.precision}); the same model, samples and options "
            "built it on this machine",
            file=text_stream(args),
        )
        return 0
    done = reports[0]
    if done.advice:
        from dataclasses import replace

        done = replace(done, advice=_with_samples(args.argv, done))
    print(build_text(done), file=text_stream(args))
    for warning in done.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    if args.json:
        print_json(done.to_json())
    return 0


def _with_samples(argv: Sequence[str], done: BuildReport) -> str:
    """The command that was given, once more, with samples: every other option decides the result as well."""
    out = [] if any(part == "--out" or part.startswith("--out=") for part in argv) else ["--out", str(done.folder)]
    contract = done.spec.contract
    missing = [] if contract.normalization else ["--normalize"]
    missing += [] if contract.task else ["--task"]
    kept = [part for part in argv if part != "--overwrite"]
    return completed([*kept, *out, "--samples", "YOUR_IMAGES", "--overwrite"], missing)
