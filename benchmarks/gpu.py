"""Everything that is measured on a GPU, in one script: roof, kernels, engines, end to end. At most ten minutes.

    python benchmarks/gpu.py [--only SECTION,...] [--skip SECTION,...] [--seconds 560] [--out FILE]
    python benchmarks/gpu.py --dry-run            # all of its logic on the CPU, at tiny sizes; the figures mean nothing

Every section runs in a process of its own with a time limit, and writes what it has after every step: a crash, an
illegal access or a hang of one costs the others nothing. One JSON at the end (sections that could not run say why), and
tables. What the sections do is in ``gpu_sections/``, the method in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import subprocess
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


def child(args: argparse.Namespace, name: str, limit: float, without: Sequence[str]) -> tuple[int, str]:
    """Runs a section in a process of its own: (return code, what the parent has to say about it)."""
    command = [sys.executable, "-u", str(Path(__file__).resolve()), "--section", name, "--work", str(args.work)]
    command += ["--limit", str(limit), "--batches", args.batches, "--rounds", str(args.rounds)]
    command += ["--nets", args.nets, "--without", ",".join(without)] + (["--dry-run"] if args.dry_run else [])
    # of its own group: what it started (compilers, autotuners) ends with it
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=limit + 10), ""
    except subprocess.TimeoutExpired:
        return -1, f"stopped after {limit + 10:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def collect(args: argparse.Namespace, name: str, notes: Sequence[str]) -> dict[str, Any]:
    path = args.work / f"section-{name}.json"
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if notes:
        figures["ended"] = "; ".join(notes)
    return figures


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sections asked for, each within what is left of the time; the JSON is written after each."""
    chosen = [name for name in SECTIONS if not args.only or any(_meant(name, w) for w in args.only.split(","))]
    chosen = [name for name in chosen if not any(_meant(name, w) for w in args.skip.split(",") if w)]
    begun = time.time()
    results: dict[str, Any] = {}
    for name in chosen:
        left = args.seconds - (time.time() - begun)
        limit = min(SECTIONS[name][1], left - 12)
        if limit < 5:
            results[name] = {"ended": f"not begun: {left:.0f} s were left of {args.seconds}"}
            continue
        notes: list[str] = []
        if args.in_process:
            run_section(_section(args, name, limit, ()))
        else:
            without: list[str] = []
            for _ in range(3):
                left = args.seconds - (time.time() - begun)
                if without and left < 40:
                    break
                code, note = child(args, name, min(limit, left - 12), without)
                if code == 0 or note:
                    notes += [note] if note else []
                    break
                found = collect(args, name, ())
                doing = str(found.get("doing", ""))
                notes.append(
                    f"ended with {code} in: {doing}; " + "; ".join(f["why"][:300] for f in found.get("failed", [])[-1:])
                )
                guilty = next((word for word in SUSPECTS if word in doing and word not in without), None)
                if guilty is None:
                    break
                without.append(guilty)
                notes.append(f"run again without {guilty}")
        results[name] = collect(args, name, notes)
        write(args, results)
    return results


def _meant(name: str, word: str) -> bool:
    return name == word or name.startswith(word + "-")


def _section(args: argparse.Namespace, name: str, limit: float, without: Sequence[str]) -> Section:
    batches = (1, 2) if args.dry_run else tuple(int(b) for b in args.batches.split(","))
    deadline = time.time() + limit
    return Section(
        name, args.dry_run, args.work, deadline, tuple(without), batches, args.rounds, tuple(args.nets.split(","))
    )


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
