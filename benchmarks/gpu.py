"""Everything that is measured on a GPU, in one script: roof, kernels, engines, end to end. At most ten minutes.

    python benchmarks/gpu.py [--only SECTION,...] [--skip SECTION,...] [--seconds 560] [--out FILE]
    python benchmarks/gpu.py --dry-run            # all of its logic on the CPU, at tiny sizes; the figures mean nothing

These are further sections of ``unet-rt doctor --prove``, run by its runner: each in a process of its own with a time
limit, writing what it has after every step. One JSON at the end (sections that could not run say why), and tables. What the
sections do is in ``gpu_sections/``, the method in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported, here by the bare baselines

import record
import torch
from gpu_sections.built import section_build
from gpu_sections.engines import section_compile, section_engines
from gpu_sections.kernels import section_kernels
from gpu_sections.predict import section_predict, section_repeat
from gpu_sections.roof import section_machine, section_prepare, section_roof
from gpu_sections.section import NETS, DeviceLost, Section
from gpu_sections.text import tables

from unet_rt import backends
from unet_rt.judging.proof.run import Runner
from unet_rt.system import facts

# OpenVINO has no CUDA devices. The last one was refused by one of the cards at hand: it may not keep the others waiting.
GPU_BACKENDS = sorted((n for n in backends.names() if n != "openvino"), key=lambda n: (n == "tensorrt", n))

# What can be left out of a section that it ended, in the order of suspicion.
SUSPECTS = (
    *GPU_BACKENDS,
    "fused bias",
    "bare",
    "CUDA graph",
    "tile_gather",
    "tile_stitch",
    "tile_blend",
    "blend_finish",
    "crop_concat",
)

SECTIONS: dict[str, tuple[Callable[[Section], None], float]] = {  # function and most seconds
    "machine": (section_machine, 60),
    "prepare": (section_prepare, 120),
    "roof": (section_roof, 40),
    "kernels": (section_kernels, 75),
    **{f"build-{name}": (functools.partial(section_build, backend=name), 130) for name in GPU_BACKENDS},
    "paper": (functools.partial(section_engines, name="paper"), 150),
    "predict-paper": (functools.partial(section_predict, name="paper"), 70),
    "compile-default": (functools.partial(section_compile, mode="default"), 90),
    "nuclei": (functools.partial(section_engines, name="nuclei"), 80),
    "predict-nuclei": (functools.partial(section_predict, name="nuclei"), 60),
    "repeat": (section_repeat, 40),
    "compile-max": (functools.partial(section_compile, mode="max-autotune"), 400),
}


def run_section(section: Section) -> None:
    """A section in this process; whatever it raises is recorded."""
    begun = time.time()
    section.say(f"begins, {section.left:.0f} s at most")
    try:
        if not section.dry:
            if (why := facts.cuda().missing) is not None:
                section.figures["no_device"] = why
                section.say(f"no device: {why}")
                return
            torch.cuda.init()
        SECTIONS[section.name][0](section)
        section.figures.pop("doing", None)
    except DeviceLost as lost:
        section.figures["doing"] = str(lost)
        section.say(f"the device no longer answers after: {lost}")
        raise SystemExit(70) from lost
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the record
        section.figures.setdefault("failed", []).append(
            {"what": section.name, "why": f"{type(error).__name__}: {error}"}
        )
        traceback.print_exception(error, file=sys.stdout)
    finally:
        section.figures["seconds"] = round(time.time() - begun, 1)
        section.save()
        section.say(f"ends after {section.figures['seconds']} s")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sections asked for, each within what is left of the time; the JSON is written after each."""
    chosen = [name for name in SECTIONS if not args.only or any(_meant(name, w) for w in args.only.split(","))]
    chosen = [name for name in chosen if not any(_meant(name, w) for w in args.skip.split(",") if w)]

    def command(name: str, limit: float, without: Sequence[str]) -> list[str]:
        started = [sys.executable, "-u", str(Path(__file__).resolve()), "--section", name, "--work", str(args.work)]
        started += ["--limit", str(limit), "--batches", args.batches, "--rounds", str(args.rounds)]
        return [*started, "--nets", args.nets, "--without", ",".join(without), *["--dry-run"] * args.dry_run]

    runner = Runner(command, args.work, args.seconds, functools.partial(write, args), SUSPECTS)
    if not args.in_process:
        return runner.run({name: SECTIONS[name][1] for name in chosen})
    results: dict[str, Any] = {}
    for name in chosen:
        run_section(_section(args, name, min(SECTIONS[name][1], runner.left), ()))
        results[name] = runner.collect(name, ())
        write(args, results)
    return results


def _meant(name: str, word: str) -> bool:
    return name == word or name.startswith(word + "-")


def _section(args: argparse.Namespace, name: str, limit: float, without: Sequence[str]) -> Section:
    batches = (1, 2) if args.dry_run else tuple(int(b) for b in args.batches.split(","))
    more = {"without": tuple(without), "batches": batches, "rounds": args.rounds, "nets": tuple(args.nets.split(","))}
    return Section.open(name, args.dry_run, args.work, time.time() + limit, **more)


def write(args: argparse.Namespace, results: dict[str, Any]) -> Path:
    figures: dict[str, Any] = {"dry_run": args.dry_run, "sections": results}
    if args.commit:
        figures["commit"] = args.commit
    name = "gpu-dry-run" if args.dry_run else "gpu"
    return record.write(name, figures, args.out)


def parser() -> argparse.ArgumentParser:
    made_parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made_parser.add_argument("--only", default="", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    made_parser.add_argument("--skip", default="")
    made_parser.add_argument("--seconds", type=float, default=560, help="for everything")
    made_parser.add_argument("--batches", default="1,4,16", help="of the paper's network")
    made_parser.add_argument("--rounds", type=int, default=7)
    made_parser.add_argument("--nets", default=",".join(NETS), help="for which engines are built")
    made_parser.add_argument("--out", type=Path)
    made_parser.add_argument("--work", type=Path, help="folder for engines; kept, so that a later call finds them")
    made_parser.add_argument("--commit", default="", help="what is measured, where there is no checkout to ask")
    made_parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny: figures mean nothing")
    made_parser.add_argument("--in-process", action="store_true", help="sections in this process, without isolation")
    made_parser.add_argument("--section", help=argparse.SUPPRESS)
    made_parser.add_argument("--limit", type=float, default=60, help=argparse.SUPPRESS)
    made_parser.add_argument("--without", default="", help=argparse.SUPPRESS)
    return made_parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parser().parse_args(argv)
    if args.section:
        run_section(_section(args, args.section, args.limit, [w for w in args.without.split(",") if w]))
        return {}
    with contextlib.ExitStack() as stack:
        if args.work is None:
            args.work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unet-rt-gpu-")))
        args.work.mkdir(parents=True, exist_ok=True)
        results = measure(args)
        path = write(args, results)
    print(tables(results))
    print(path, flush=True)
    return results


if __name__ == "__main__":
    main()
