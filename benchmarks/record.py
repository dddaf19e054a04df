"""What every benchmark writes: figures with machine, versions, command and commit; and whether two runs agree.

    python benchmarks/record.py OLD [NEW]     # two records, or two folders of them; NEW: benchmarks/results

Figures are compared that carry their spread: an object with ``median_X``, ``low_X`` and ``high_X``. Two agree where the
ranges from the fastest to the slowest run meet. Exit status 1 where one does not, and neither machine nor versions differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_rt.system import facts as machine

if TYPE_CHECKING:
    from unet_rt.system.timing import Timing

RESULTS = Path(__file__).parent / "results"
# Precisions that a processor has instructions for, by the names of machine.cpu_features; without, they are emulated.
NATIVE = {
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "int8": {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"},
}
Range = tuple[float, float, float]  # median, low, high


def parser(text: str, seconds: float) -> argparse.ArgumentParser:
    """Options that every benchmark has; ``text`` is its docstring."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seconds", type=float, default=seconds, help=f"for timing, about (default: {seconds:g})")
    made.add_argument("--quick", action="store_true", help="tiny: whether it works; the figures mean nothing")
    made.add_argument("--out", help="the record (default: in benchmarks/results/; with --quick nothing)")
    return made


def spread(timing: Timing) -> dict[str, Any]:
    """A timing as records hold it."""
    return {
        "median_ms": timing.median_s * 1e3,
        "low_ms": timing.low_s * 1e3,
        "high_ms": timing.high_s * 1e3,
        "runs": timing.runs,
    }


def commit() -> str:
    """The commit that was measured, "+changes" where more than records differs from it, "unknown" outside a checkout."""
    here = Path(__file__).parent
    git: dict[str, Any] = {"cwd": here, "capture_output": True, "text": True, "check": True}
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
        others = [":/", f":(exclude){RESULTS}"]
        changed = subprocess.run(["git", "diff", "--name-only", "HEAD", "--", *others], **git).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + "+changes" * bool(changed)


def command(words: Sequence[str]) -> str:
    """The command of a record, without what only this machine has: folders of absolute paths, and where records go."""
    shown = [Path(words[0]).name]
    for before, word in pairwise(words):
        if word != "--out" and before != "--out":
            option, equals, value = word.rpartition("=")  # as in NAME=FILE
            shown.append(f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}")
    return "python benchmarks/" + shlex.join(shown)


def write(name: str, figures: dict[str, Any], out: str | Path | None = None, *, quick: bool = False) -> Path | None:
    """Writes ``figures`` as JSON to ``out``, default ``benchmarks/results/<name>.json``; nothing if ``quick`` and no out."""
    if quick and out is None:
        return None
    path = Path(out) if out is not None else RESULTS / f"{name}.json"
    document = {
        "benchmark": name,
        "when": time.strftime("%Y-%m-%d"),
        "command": command(sys.argv),
        "commit": commit(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "machine": machine.describe(),
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def figures_of(data: Any, name: str = "") -> Iterator[tuple[str, Range]]:
    """(name, (median, low, high)) of every figure in a record that carries its spread."""
    if isinstance(data, list):
        for k, item in enumerate(data):
            yield from figures_of(item, f"{name}[{k}]")
    if not isinstance(data, dict):
        return
    said = [str(data[key]) for key in ("name", "net", "tile", "batch", "side", "threads") if key in data]
    name = " ".join([name.partition("[")[0], *said]).strip()
    for key in data:
        unit = key.removeprefix("median_")
        if unit != key and f"low_{unit}" in data and f"high_{unit}" in data:
            yield f"{name} {unit}", (data[key], data[f"low_{unit}"], data[f"high_{unit}"])
    for key, item in data.items():
        if key != "machine":
            yield from figures_of(item, f"{name} {key}" if key != "rows" else name)


def compared(old: Any, new: Any) -> list[tuple[str, Range, Range, bool]]:
    """(name, old, new, whether their ranges meet) of every figure that both records hold."""
    before, after = dict(figures_of(old)), dict(figures_of(new))
    return [
        (name, before[name], after[name], before[name][1] <= after[name][2] and after[name][1] <= before[name][2])
        for name in before
        if name in after
    ]


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("old", type=Path)
    options.add_argument("new", type=Path, nargs="?", default=RESULTS)
    args = options.parse_args(argv)
    names = (
        [""] if args.old.is_file() else sorted(p.name for p in args.old.glob("*.json") if (args.new / p.name).exists())
    )
    if not names:
        sys.exit(f"{args.old} and {args.new} have no record in common")
    differ = 0
    for name in names:
        old, new = (json.loads((path / name if name else path).read_text()) for path in (args.old, args.new))
        alike = all(
            old.get("machine", {}).get(k) == new.get("machine", {}).get(k) for k in ("cpu", "threads", "versions")
        )
        for figure, before, after, agree in compared(old, new):
            differ += not agree and alike
            mark = "  " if agree else "! "
            values = ["{:.4g} ({:.4g} to {:.4g})".format(*r) for r in (before, after)]
            print(f"{mark}{name.removesuffix('.json')}: {figure}: {values[0]} -> {values[1]}")
        if not alike:
            print(f"  {name or args.old.name}: on another machine or with other versions; differences prove nothing")
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
