"""Kills, interruptions, full disks, few descriptors, places that cannot be written: outputs are whole or absent, and reruns
give the same bytes and leave nothing else.

    python tests/fire/faults.py --kills 1000 [--seed 0] [--record build/faults.json]
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]

import server
from fire import commit, small_engine

CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
NOBODY = 65534
Before = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """A command line, and the names of what it leaves in its folder."""

    name: str
    argv: tuple[str, ...]
    leaves: tuple[str, ...]


def jobs(engine: Path, graph: Path, packed: Path, image: Path, large: Path) -> list[Job]:
    """Every kind of output, by the verbs that write them."""
    predict = ("predict", str(engine), str(image))
    found = [
        Job(f"predict {name}", (*predict, "--out", name), (name,)) for name in ("m.npy", "m.tif", "m.png", "m.zarr")
    ]
    objects = ("--output", "instances", "--objects", "o.csv", "--geojson", "o.geojson")
    tables = (*predict, "--out", "i.tif", *objects)
    return [
        *found,
        Job("predict large m.tif", ("predict", str(engine), str(large), "--out", "l.tif"), ("l.tif",)),
        Job("predict raw r.npy", (*predict, "--out", "r.npy", "--output", "raw"), ("r.npy",)),
        Job("predict objects", tables, ("i.tif", "o.csv", "o.geojson")),
        Job("pack", ("pack", str(engine), "--out", "p.urt.tar"), ("p.urt.tar",)),
        Job("unpack", ("unpack", str(packed), "--out", "u.urt"), ("u.urt",)),
        Job("verify", ("verify", str(engine), "--images", str(image)), ()),
        Job("inspect", ("inspect", str(graph), "--json"), ()),
    ]


def digest(path: Path) -> str:
    """Of a file, or of all files in a folder with their names."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            total.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return total.hexdigest()


class Failures(list[str]):
    """Said as they come."""

    def append(self, failure: str) -> None:
        super().append(failure)
        print(failure, flush=True)


class Faults:
    """Jobs that are run, disturbed, and run again."""

    def __init__(self, work: Path, engine: Path) -> None:
        import numpy as np

        from unet_rt.drawing.microscopy import microscopy
        from unet_rt.engine.archive import pack

        self.folder, self.log, self.temporary = work / "run", work / "log", work / "tmp"
        for folder in (self.folder, self.temporary):
            folder.mkdir()
        os.environ["TMPDIR"] = str(self.temporary)
        tempfile.tempdir = None
        pack(engine, work / "good.urt.tar")
        np.save(work / "i.npy", microscopy((300, 280), seed=3).image)
        np.save(work / "l.npy", np.tile(microscopy((300, 280), seed=4).image, (6, 5)))
        os.chmod(work, 0o755)
        named = next(engine.glob("model*.onnx"))
        self.said: int | None = None
        self.jobs = jobs(engine, named, work / "good.urt.tar", work / "i.npy", work / "l.npy")
        self.failures = Failures()
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.good: dict[str, list[str]] = {}
        for job in self.jobs:
            for _ in range(2):
                self.clear()
                start = time.monotonic()
                code, said = self.run(job)
                assert code == 0, (job, said)
                self.seconds[job.name] = time.monotonic() - start
                found = [digest(self.folder / name) for name in job.leaves]
                assert self.good.setdefault(job.name, found) == found, f"{job.name}: not the same twice"

    def clear(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def start(self, job: Job, before: Before | None = None, *, real: bool = False) -> int:
        """A process that runs the job: its number. ``before`` is done first; ``real``: as a command of its own."""
        if real:
            environment = {**os.environ, "TMPDIR": str(self.temporary)}
            with self.log.open("wb") as log:
                command = [sys.executable, "-m", "unet_rt", *job.argv]
                return subprocess.Popen(
                    command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=log,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                ).pid  # fmt: skip
        if self.said is not None:
            os.close(self.said)
        self.said, said = os.pipe()  # which no limit on files cuts
        pid = os.fork()
        if pid:
            os.close(said)
            return pid
        code = 99
        try:
            for ours in list(weakref.finalize._registry):  # what this process would tidy up at its end
                ours.atexit = False
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.chdir(self.folder)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(said, 2)
            if before is not None:
                before()
            from unet_rt.cli.main import main

            code = main(list(job.argv))
            sys.stderr.flush()
            atexit._run_exitfuncs()
        except BaseException:  # noqa: BLE001 - it is a process of its own
            traceback.print_exc()
        finally:
            os._exit(code)

    def run(self, job: Job, before: Before | None = None) -> tuple[int, str]:
        """(exit code, stderr) of a job."""
        _, status = os.waitpid(self.start(job, before), 0)
        return os.waitstatus_to_exitcode(status), self.heard()

    def heard(self) -> str:
        """What the last process that was forked said on stderr, once it has ended."""
        if self.said is None:
            return ""
        with os.fdopen(self.said, "rb") as stream:
            self.said = None
            return stream.read().decode("utf-8", "replace")

    def check(self, job: Job, what: str) -> None:
        """Outputs are whole or absent; the same call gives the same bytes, and nothing but them is there."""
        self.counts[what.partition(" ")[0]] += 1
        for name, good in zip(job.leaves, self.good[job.name], strict=True):
            path = self.folder / name
            if path.exists() and digest(path) != good:
                self.failures.append(f"{job.name}: {what}: {name} is there, and not whole")

    def again(self, job: Job) -> None:
        overwrite = any((self.folder / name).exists() for name in job.leaves)
        code, said = self.run(Job(job.name, (*job.argv, *(("--overwrite",) if overwrite else ())), job.leaves))
        found = [digest(self.folder / name) if (self.folder / name).exists() else "" for name in job.leaves]
        if code or found != self.good[job.name]:
            self.failures.append(f"{job.name}: the rerun ends with {code}, {said.strip()[-200:]}")
        litter = {p.name for p in self.folder.iterdir()} - set(job.leaves)
        if litter:
            self.failures.append(f"{job.name}: the rerun leaves {sorted(litter)}")
        self.clear()

    def kill(self, job: Job, draw: random.Random, *, real: bool) -> None:
        """A signal at a random moment of the job."""
        number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        pid = self.start(job, real=real)
        time.sleep(draw.random() * (self.seconds[job.name] * 1.1 + (0.8 if real else 0)))
        if os.waitpid(pid, os.WNOHANG)[0]:
            self.check(job, "ended before")
            return
        os.kill(pid, number)
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            said = "" if real else self.heard()
        before_main = code == -number and not said  # or after it
        if not (code in (0, CODES[number]) or before_main or real) or said.count("\n") > 1:
            self.failures.append(f"{job.name}: {number.name} ends with {code}: {said.strip()[-300:]}")
        if number != signal.SIGKILL:
            parts = [p.name for p in self.folder.iterdir() if p.name.endswith(".part")]
            if parts and code == CODES[number] and not self.dead_parts:
                self.failures.append(f"{job.name}: {number.name} leaves {parts}")
        else:
            self.dead_parts = True
        self.check(job, f"{number.name} at a random moment")

    dead_parts = False

    def kills(self, count: int, draw: random.Random, until: float) -> None:
        while sum(self.counts[s.name] for s in CODES) < count and time.monotonic() < until:
            job = draw.choice(self.jobs)
            self.dead_parts = False
            for _ in range(3):
                self.kill(job, draw, real=draw.random() < 0.1)
                if any((self.folder / name).exists() for name in job.leaves):
                    break  # another run would be refused
            self.again(job)

    def wants(self) -> None:
        """Too little of everything: one line, exit code 2, nothing left."""

        def limit(which: int, value: int) -> Before:
            return lambda: resource.setrlimit(which, (value, value))

        def nobody() -> None:
            from unet_rt.cli.main import main

            with (
                tempfile.TemporaryDirectory() as scratch
            ):  # what is imported on the way may be in places of root's alone
                os.chdir(scratch)
                main(list(job.argv))
                os.chdir(self.folder)
            os.chmod(self.folder, 0o555)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)

        def no_temporary_folder() -> None:
            for name in ("TMPDIR", "TEMP", "TMP"):
                os.environ[name] = "/nowhere"
            tempfile.tempdir = None

        cases: list[tuple[str, Before]] = [
            *((f"files of {n} bytes", limit(resource.RLIMIT_FSIZE, n)) for n in (0, 100, 600, 5000, 20_000)),
            *((f"{n} descriptors", limit(resource.RLIMIT_NOFILE, n)) for n in (16, 24, 40)),
            ("no folder for temporary files", no_temporary_folder),
        ]
        if os.geteuid() == 0:
            cases.append(("read-only, as another user", nobody))
        for job in self.jobs:
            for what, before in cases:
                code, said = self.run(job, before)
                os.chmod(self.folder, 0o755)
                litter = {p.name for p in self.folder.iterdir()} - set(job.leaves)
                stages = {name for name in litter if ".stage" in name}  # kept on purpose: the same call goes on
                if (
                    code not in (0, 1, 2)
                    or (code and said.count("\n") != 1)
                    or "internal error" in said
                    or litter - stages
                ):
                    self.failures.append(f"{job.name}: {what}: {code}, {said.strip()[-300:]}, leaves {sorted(litter)}")
                self.check(job, f"want of {what}")
                self.clear()

    def two_writers(self) -> None:
        """Of two that write the same at once each ends well or says why; what is there is whole."""
        for job in self.jobs:
            both = Job(job.name, (*job.argv, *(("--overwrite",) if job.leaves else ())), job.leaves)
            pids = [self.start(both) for _ in range(2)]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            if 0 not in codes or not set(codes) <= {0, 2}:
                self.failures.append(f"{job.name}: two writers end with {codes}")
            self.check(job, "two-writers")
            self.again(job)

    def changing_inputs(self) -> None:
        """An image that is cut while it is read: an error, or the result of what was there; never a bus error."""
        job = next(job for job in self.jobs if "large" in job.name)
        path = Path(job.argv[2])
        data = path.read_bytes()
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            pid = self.start(job)
            time.sleep(self.seconds[job.name] * share)
            os.truncate(path, len(data) // 3)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            path.write_bytes(data)
            if code not in (0, 2):
                self.failures.append(f"{job.name}: an image that is cut ends with {code}")
            self.check(job, "changed-input")
            os.utime(path)
            shutil.rmtree(self.folder)
            self.folder.mkdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="no more kills after")
    parser.add_argument("--engine", type=Path, help="an engine of the shipped network (default: it is built)")
    parser.add_argument("--record", type=Path, help="JSON to write")
    parser.add_argument("--only", choices=("kills", "others"))
    args = parser.parse_args()
    start = time.monotonic()
    server.import_all()
    with tempfile.TemporaryDirectory(prefix="faults-") as work:
        faults = Faults(Path(work), args.engine or small_engine(Path(work)))
        if args.only != "kills":
            faults.wants()
            faults.two_writers()
            faults.changing_inputs()
        if args.only != "others":
            faults.kills(args.kills, random.Random(args.seed), start + args.seconds)
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "seconds": round(time.monotonic() - start), "seed": args.seed,
        "tried": dict(faults.counts), "failures": faults.failures,
    }  # fmt: skip
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{dict(faults.counts)} in {record['seconds']} s; {len(faults.failures)} failures")
    return 1 if faults.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
