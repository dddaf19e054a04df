"""Sends hostile files through the command line and holds what it answers against the promise; `make fire` runs it.

    python tests/fire/fire.py --mutants 800 [--kinds tiff,npy] [--first 0] [--record build/fire.json]
    python tests/fire/fire.py --show tiff 1234     # one file again: what it is, and what is answered

Every failure is a kind and a seed; those that were mended are in ``found.json`` and run in CI with what is answered now.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]

from arena import Arena, Outcome
from mutators import FILES, KINDS, archive, draw_of, write_engine, write_zarr


def small_engine(folder: Path) -> Path:
    """An engine of the shipped network, as `build` makes it."""
    import unet_rt as urt
    from unet_rt.cli.demo import shipped_model
    from unet_rt.drawing.microscopy import microscopy

    samples = [microscopy(shape, seed=seed).image for seed, shape in enumerate([(300, 260), (211, 330)], 500)]
    out = folder / "nuclei.urt"
    urt.build(
        shipped_model(), samples=samples, out=out, backend="onnxruntime", precision="fp32", tile=(192, 192)
    ).close()
    return out


class Fire:
    """Cases by kind and seed, run in an arena."""

    def __init__(self, arena: Arena, engine: Path) -> None:
        self.arena, self.engine = arena, engine
        from unet_rt.drawing.microscopy import microscopy
        from unet_rt.engine.archive import pack

        pack(engine, arena.folder / "good.urt.tar")
        self.packed = (arena.folder / "good.urt.tar").read_bytes()
        import numpy as np

        self.image = arena.folder / "good.npy"
        np.save(self.image, microscopy((72, 80), seed=3).image)

    def prepare(self, kind: str, seed: int) -> tuple[list[object], str]:
        """Writes the files of a case; its command line, and the name of what it may leave."""
        folder, draw = self.arena.clear(), draw_of(kind, seed)
        if kind in FILES:
            name, make = FILES[kind]
            (folder / name).write_bytes(make(draw))
            if kind.startswith("onnx"):
                return ["inspect", name], ""
            return ["predict", self.engine, name, "--out", "out.npy"], "out.npy"
        if kind == "zarr":
            write_zarr(folder / "i.zarr", draw)
            return ["predict", self.engine, "i.zarr", "--out", "out.npy"], "out.npy"
        if kind == "spec":
            write_engine(folder / "e.urt", draw, self.engine)
            verbs: list[list[object]] = [
                ["predict", "e.urt", self.image, "--out", "out.npy"],
                ["pack", "e.urt", "--out", "out.npy"],
            ]
            return draw.choice(verbs), "out.npy"
        (folder / "a.urt.tar").write_bytes(archive(draw, self.packed))
        return ["unpack", "a.urt.tar"], "a.urt"

    def run(self, kind: str, seed: int, *, fresh: bool = False) -> tuple[Outcome, list[str]]:
        """A case, and what of the promise it breaks; whoever breaks it runs again alone, which decides."""
        argv, may_leave = self.prepare(kind, seed)
        json_too = [*argv, "--json"] if seed % 5 == 0 else argv
        outcome = self.arena.run(json_too, fresh=fresh)
        faults = self.arena.faults(outcome, may_leave=may_leave)
        if json_too is not argv and outcome.code is not None:
            try:
                json.loads(outcome.out)
            except ValueError:
                faults.append("stdout is no JSON")
        said_exact = outcome.code == 0 and ("exact: tiles equal" in outcome.out or '"exact": true' in outcome.out)
        if not faults and kind == "onnx-structure" and said_exact:
            exact = self.arena.run(["exactness", "m.onnx"], seconds=60)
            faults += [f"called exact: {exact.out.strip()}{exact.death}"] if exact.code else []
        return (outcome, faults) if fresh or not faults else self.run(kind, seed, fresh=True)


def real(fire: Fire, kind: str, seed: int) -> list[str]:
    """The same through the installed command, in a process of its own; what it answers differently."""
    argv, _ = fire.prepare(kind, seed)
    command = [sys.executable, "-m", "unet_rt", *map(str, argv)]
    done = subprocess.run(command, cwd=fire.arena.case, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr or "internal error" in done.stderr:
        return [f"as a command: {done.returncode}, {done.stderr[-300:]!r}"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=800, help="files in all")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after")
    parser.add_argument(
        "--commands", type=int, default=0, help="of them, also run as commands of their own: one in so many"
    )
    parser.add_argument("--record", type=Path, help="JSON to write")
    parser.add_argument("--engine", type=Path, help="an engine of the shipped network (default: it is built)")
    parser.add_argument("--show", nargs=2, metavar=("KIND", "SEED"))
    args = parser.parse_args()
    kinds, start = args.kinds.split(","), time.monotonic()
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    failures: list[dict[str, Any]] = []
    slowest, largest = 0.0, 0.0
    with tempfile.TemporaryDirectory(prefix="fire-") as work:
        engine = args.engine or small_engine(Path(work))
        with Arena(Path(work)) as arena:
            fire = Fire(arena, engine)
            if args.show:
                outcome, faults = fire.run(args.show[0], int(args.show[1]), fresh=True)
                print(outcome, faults, sep="\n")
                kept = Path(tempfile.mkdtemp(prefix="fire-case-"))
                argv, _ = fire.prepare(args.show[0], int(args.show[1]))
                shutil.copytree(arena.case, kept, dirs_exist_ok=True)
                print(kept, *argv)
                return 0
            for number in range(args.mutants):
                if time.monotonic() - start > args.seconds:
                    break
                kind, seed = kinds[number % len(kinds)], args.first + number // len(kinds)
                outcome, faults = fire.run(kind, seed)
                if args.commands and number % args.commands == 0:
                    faults += real(fire, kind, seed)
                    counts[kind]["commands"] += 1
                counts[kind][str(outcome.code)] += 1
                slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.peak_mb)
                if faults:
                    failures.append({"kind": kind, "seed": seed, "faults": faults, "said": outcome.err[-400:]})
                    print(kind, seed, faults, outcome.err.strip()[-300:], flush=True)
                if args.record and number % 1000 == 999:
                    write(args.record, counts, failures, start, slowest, largest)
    if args.record:
        write(args.record, counts, failures, start, slowest, largest)
    done = sum(sum(v for k, v in c.items() if k != "commands") for c in counts.values())
    print(f"{done} files in {time.monotonic() - start:.0f} s: {len(failures)} failures")
    print(f"at most {slowest:.1f} s of the processor and {largest:.0f} MB for one")
    return 1 if failures else 0


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write(path: Path, counts: Any, failures: Any, start: float, slowest: float, largest: float) -> None:
    record = {
        "date": date.today().isoformat(), "commit": commit(), "seconds": round(time.monotonic() - start),
        "slowest_s": round(slowest, 2), "largest_mb": round(largest), "by_exit_code": counts, "failures": failures,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
