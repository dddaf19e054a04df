"""Command lines run under watch: what they answered, took and left behind, and whether that is as promised.

The promise (docs/reliability.md): whatever the files hold, a command ends with 0, 1 or 2, says why in one line, takes
bounded time and memory, leaves nothing behind, and reads nothing that it was not given.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

SECONDS = 5.0  # of the processor that a command on a small file may take
PEAK_MB = 700.0  # with all libraries in it; 500 beside them
PER_CHILD = 64  # requests, then a new one


@dataclass(frozen=True)
class Outcome:
    """What a command line did.

    Attributes:
        code: Its exit code; None: it was killed, or raised.
        out, err: What it printed.
        left: Files that are there afterwards and were not before.
        seconds, peak_mb: What it took, of the processor and of memory.
        death: How it died, where it did.
    """

    code: int | None
    out: str
    err: str
    left: tuple[str, ...]
    seconds: float
    peak_mb: float
    death: str = ""


class Arena:
    """A server of forked children, in a folder of its own. ``secret`` lies outside of what commands are given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = folder / "secret.bin"
        self.secret.write_bytes(b"secret" * 1000)
        self.case, self.temporary = folder / "case", folder / "tmp"
        self._count = 0

    def __enter__(self) -> Arena:
        self.temporary.mkdir()
        environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "ORT_DISABLE_TELEMETRY": "1",
            "UNET_RT_URL_TIMEOUT": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._log = (self.folder / "server.err").open("wb")
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip
        assert self._lines.readline() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server.stdin is not None:
            self._server.stdin.close()
        self._server.wait(30)
        self._lines.close()
        self._log.close()

    @property
    def _lines(self) -> IO[str]:
        assert self._server.stdout is not None
        return self._server.stdout

    def clear(self) -> Path:
        """An empty folder for the files of a case."""
        for folder in (self.case, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        os.utime(self.secret, ns=(0, self.secret.stat().st_mtime_ns))
        return self.case

    def run(self, argv: Sequence[object], *, seconds: float = SECONDS, fresh: bool = False) -> Outcome:
        """Runs a command line in the folder of the case."""
        before = self._files()
        self._count += 1
        request = {
            "argv": [str(part) for part in argv],
            "folder": str(self.case),
            "seconds": seconds,
            "fresh": fresh or self._count % PER_CHILD == 0,
        }
        assert self._server.stdin is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._lines.readline())
        out, err = (Path(f"{self.case}.{name}").read_text("utf-8", "replace") for name in ("out", "err"))
        left = tuple(sorted(self._files() - before))
        return Outcome(answer["code"], out, err, left, answer["seconds"], answer["peak_mb"], answer.get("death", ""))

    def _files(self) -> set[str]:
        roots = (self.case, self.temporary)
        return {str(path.relative_to(self.folder)) for root in roots for path in root.rglob("*")}

    def faults(self, outcome: Outcome, *, may_leave: str = "", seconds: float = SECONDS) -> list[str]:
        """What of the promise an outcome breaks.

        Args:
            outcome: It.
            may_leave: Name in the folder of the case of what a command that succeeds leaves.
            seconds: What it may take.
        """
        found = []
        if outcome.code not in (0, 1, 2):
            found.append(outcome.death or f"exit code {outcome.code}")
        if outcome.code and outcome.err.count("\n") != 1:
            found.append(f"{outcome.err.count(chr(10))} lines on stderr")
        found += [word for word in ("internal error", "Traceback", "out of memory") if word in outcome.err]
        if any(not (c.isprintable() or c == "\n") for c in outcome.err):
            found.append("unprintable characters")
        if outcome.seconds > seconds:
            found.append(f"took {outcome.seconds:.1f} s")
        if outcome.peak_mb > PEAK_MB:
            found.append(f"took {outcome.peak_mb:.0f} MB")
        allowed = f"{self.case.name}/{may_leave}"
        litter = [name for name in outcome.left if not (outcome.code == 0 and may_leave and name.startswith(allowed))]
        if litter:
            found.append(f"left {litter[0]}")
        if self.secret.stat().st_atime_ns and self._atime_works():
            found.append("read what lies outside")
        return found

    def _atime_works(self) -> bool:
        """Whether this file system notes when a file was read."""
        probe = self.folder / "probe"
        if not probe.exists():
            probe.write_bytes(b"read")
            os.utime(probe, ns=(0, probe.stat().st_mtime_ns))
            probe.read_bytes()
        return probe.stat().st_atime_ns != 0
