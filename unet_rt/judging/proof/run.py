"""Runs sections, each in a process of its own with a time limit; a crash or a hang of one costs the others nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .section import figures_path

MARGIN_S = 12.0  # kept back for collecting and writing
LEAST_S = 5.0  # what a section is begun for
AGAIN_S = 40.0
TRIES = 3
GRACE_S = 10.0  # beyond its limit, which a section keeps by itself

Results = dict[str, Any]


@dataclass(frozen=True)
class Runner:
    """How sections are started, and what is done with what they leave.

    Attributes:
        command: Of a section's process, from its name, its limit in seconds, and what it is to leave out.
        work: Folder that the sections share.
        seconds: For all together.
        write: Receives all results after each section.
        suspects: What can be left out of a section that it ended, in the order of suspicion.
    """

    command: Callable[[str, float, Sequence[str]], list[str]]
    work: Path
    seconds: float
    write: Callable[[Results], object]
    suspects: Sequence[str] = ()
    _begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left of all."""
        return self.seconds - (time.monotonic() - self._begun)

    def run(self, limits: Mapping[str, float]) -> Results:
        """All sections, each within its limit in seconds and what is left of all.

        Interrupted, what was found until then is written first.
        """
        results: Results = {}
        for name, most in limits.items():
            if min(most, self.left - MARGIN_S) < LEAST_S:
                results[name] = {"ended": f"not begun: {max(0.0, self.left):.0f} s were left of {self.seconds:.0f}"}
                continue
            notes: list[str] = ["interrupted"]
            try:
                notes = self._try(name, most)
                results[name] = self.collect(name, notes)
                self.write(results)
            except BaseException:  # while the section ran, or while its figures were written
                results[name] = self.collect(name, notes)
                results.update({other: {"ended": "not begun: interrupted"} for other in limits if other not in results})
                self.write(results)
                raise
        return results

    def _try(self, name: str, most: float) -> list[str]:
        """Runs a section, again without what ended it; what there is to say of how it ended."""
        without, notes = list[str](), list[str]()
        for _ in range(TRIES):
            if without and self.left < AGAIN_S:
                return notes
            code, note = self._child(name, min(most, self.left - MARGIN_S), without)
            if code == 0 or note:
                return [*notes, note] if note else notes
            found = self.collect(name, ())
            doing = str(found.get("doing", ""))
            why = "; ".join(f["why"][:300] for f in found.get("failed", [])[-1:])
            notes.append(f"ended with {code} in: {doing}; {why}")
            guilty = next((word for word in self.suspects if word in doing and word not in without), None)
            if guilty is None:
                return notes
            without.append(guilty)
            notes.append(f"run again without {guilty}")
        return notes

    def _child(self, name: str, limit: float, without: Sequence[str]) -> tuple[int, str]:
        """A section in a process of its own: (return code, what there is to say about it)."""
        with _ending(subprocess.Popen(self.command(name, limit, without), start_new_session=True)) as process:
            try:
                return process.wait(timeout=limit + GRACE_S), ""
            except subprocess.TimeoutExpired:
                return -1, f"stopped after {limit + GRACE_S:.0f} s"

    def collect(self, name: str, notes: Sequence[str]) -> dict[str, Any]:
        """What a section has written, and what there is to say of how it ended."""
        path = figures_path(self.work, name)
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if notes:
            figures["ended"] = "; ".join(notes)
        return figures


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and with it what it started (compilers, autotuners): it leads a group."""
    try:
        yield process
    finally:
        if sys.platform == "win32":
            process.kill()
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
