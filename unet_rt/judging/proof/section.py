"""A section of a proof: what it knows, and what it writes after every step, so that no crash costs what was measured."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...building.job import Say


class DeviceLost(BaseException):
    """After an illegal access every call of a process fails; whoever is named here made it."""


@dataclass
class Section:
    """What a section knows, and its ``figures``, which lie in ``work`` after every step.

    Attributes:
        name: Of the section.
        device: ``"cpu"`` or ``"cuda:N"``: what it is about.
        work: Folder for networks and engines, shared by all sections.
        deadline: When it is stopped, as ``time.time()`` has it.
        say: Receives what is being done.
        alive: Whether the device still answers this process.
        without: What is to be left out, because it ended the section before.
        figures: Rows by table, and what failed.
    """

    name: str
    device: str
    work: Path
    deadline: float
    say: Say
    alive: Callable[[], bool] = lambda: True
    without: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the section is stopped."""
        return self.deadline - time.time()

    def add(self, table: str, **row: Any) -> None:
        """A row of a table, written at once."""
        self.figures.setdefault(table, []).append(row)
        self.say(
            ", ".join(f"{key} {short_text(value)}" for key, value in row.items() if not isinstance(value, dict | list))
        )
        self.save()

    def failed(self, what: str, error: BaseException | str) -> None:
        """A step that gave nothing, and why."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.figures.setdefault("failed", []).append({"what": what, "why": text[:1500]})
        self.say(f"FAILED {what}: {text[:300]}")
        if not isinstance(error, str):
            for line in traceback.format_exception(error, limit=-4):
                self.say(line.rstrip())
        self.save()
        if not self.alive():
            raise DeviceLost(what)

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A step whose failure is recorded and ends nothing else."""
        self.figures["doing"] = what  # a crash leaves no other word
        self.save()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the record
            self.failed(what, error)
        self.figures.pop("doing", None)
        self.save()

    def save(self) -> None:
        """Writes the figures, whole."""
        path = figures_path(self.work, self.name)
        part = path.with_suffix(".new")
        part.write_text(json.dumps(self.figures, indent=1, default=str), encoding="utf-8")
        part.replace(path)


def figures_path(work: Path, name: str) -> Path:
    """Where a section's figures lie."""
    return work / f"section-{name}.json"


def short_text(value: Any) -> str:
    """A figure for people."""
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value)
