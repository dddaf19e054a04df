"""A section of the measurement on a GPU: what it knows, what it writes after every step, what the driver says."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from unet_rt.judging.proof import section as proof
from unet_rt.judging.proof.section import DeviceLost

__all__ = ["NETS", "DeviceLost", "Section", "smi", "synchronize"]

NETS = ("paper", "nuclei")


def alive() -> bool:
    """Whether the device still answers this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@dataclass
class Section(proof.Section):
    """A section of ``unet-rt doctor --prove`` that knows what figures are drawn from."""

    dry: bool = False
    batches: tuple[int, ...] = (1, 4, 16)
    rounds: int = 7
    nets: tuple[str, ...] = NETS

    @classmethod
    def open(cls, name: str, dry: bool, work: Path, deadline: float, **more: object) -> Section:
        """On ``cuda:0``, or on the CPU in a dry run; says what it does on stdout."""

        def say(text: str) -> None:
            print(f"[{name} {time.strftime('%H:%M:%S')}] {text}", flush=True)

        answers = (lambda: True) if dry else alive
        return cls(name, "cpu" if dry else "cuda:0", work, deadline, say, answers, dry=dry, **more)  # type: ignore[arg-type]

    def clocks(self, when: str) -> None:
        """What the driver says about clocks, temperature and power at this moment."""
        if not self.dry:
            self.figures.setdefault("clocks", []).append({"when": when, **smi()})


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
