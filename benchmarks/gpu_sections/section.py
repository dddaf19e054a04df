"""A section of the measurement on a GPU: what it knows, what it writes after every step, what the driver says."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

NETS = ("paper", "nuclei")


class DeviceLost(BaseException):
    """After an illegal access every call of the process fails; whoever is named here made it."""


def alive() -> bool:
    """Whether the device still answers this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@dataclass
class Section:
    """What a section knows and writes: ``figures`` goes to ``path`` after every step."""

    name: str
    dry: bool
    work: Path
    deadline: float
    without: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 4, 16)
    rounds: int = 7
    nets: tuple[str, ...] = NETS
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """``cuda:0``, or ``cpu`` in a dry run."""
        return "cpu" if self.dry else "cuda:0"

    @property
    def left(self) -> float:
        """Seconds until this section is stopped."""
        return self.deadline - time.time()

    def say(self, text: str) -> None:
        print(f"[{self.name} {time.strftime('%H:%M:%S')}] {text}", flush=True)

    def add(self, table: str, **row: Any) -> None:
        """A row of a table, written and printed at once."""
        self.figures.setdefault(table, []).append(row)
        self.say(", ".join(f"{k} {_short(v)}" for k, v in row.items() if not isinstance(v, dict | list)))
        self.save()

    def failed(self, what: str, error: BaseException | str) -> None:
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        if not isinstance(error, str):
            traceback.print_exception(error, limit=-4, file=sys.stdout)
        self.figures.setdefault("failed", []).append({"what": what, "why": text[:1500]})
        self.say(f"FAILED {what}: {text[:300]}")
        self.save()
        if not self.dry and not alive():
            raise DeviceLost(what)

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A step whose failure is recorded and ends nothing else."""
        if not self.dry:  # a crash leaves no other word
            self.figures["doing"] = what
            self.save()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the record
            self.failed(what, error)

    def save(self) -> None:
        path = self.work / f"section-{self.name}.json"
        path.with_suffix(".new").write_text(json.dumps(self.figures, indent=1, default=str), encoding="utf-8")
        path.with_suffix(".new").replace(path)

    def clocks(self, when: str) -> None:
        """What the driver says about clocks, temperature and power at this moment."""
        if not self.dry:
            self.figures.setdefault("clocks", []).append({"when": when, **smi()})


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value)


SMI = (
    "name,driver_version,compute_cap,memory.total,memory.used,pstate,clocks.sm,clocks.mem,clocks.max.sm,"
    "temperature.gpu,power.draw,power.limit,clocks_event_reasons.active"
)


def smi() -> dict[str, str]:
    """The first GPU's facts from ``nvidia-smi``; what it does not know is left out."""
    for asked in (SMI, SMI.replace(",clocks_event_reasons.active", "")):
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "--id=0"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"error": str(error)}
        if done.returncode == 0:
            values = done.stdout.strip().splitlines()[0].split(", ")
            return dict(zip(asked.split(","), values, strict=False))
    return {"error": (done.stdout + done.stderr).strip()[:300]}


def synchronize(device: str) -> None:
    """Waits for everything on the device, whatever library enqueued it (one primary context for all)."""
    if device != "cpu":
        torch.cuda.synchronize()
