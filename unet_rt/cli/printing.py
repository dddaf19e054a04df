"""Lines, progress bars and JSON on the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any


def text_stream(args: argparse.Namespace) -> Any:
    """Where a verb prints for people: stderr where --json has stdout to itself."""
    return sys.stderr if args.json else sys.stdout


def say(args: argparse.Namespace) -> Callable[[str], None]:
    """Progress in sentences, on stderr: one line that is overwritten on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K  {text[:110]}", end="", file=sys.stderr, flush=True)


def clear_line() -> None:
    """Removes the line of progress from a terminal."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


class Bar:
    """A tqdm bar for work of more than two seconds; silent where stderr is not a terminal."""

    def __init__(self, name: str):
        self._name, self._done = name, 0
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            # What an earlier run has done is not counted into the speed.
            self._bar = tqdm(total=total, initial=done, desc=self._name[:30], unit="tile", delay=2, leave=False)
            self._done = done
        self._bar.update(done - self._done)
        self._done = done
        if done == total:
            self._bar.close()


class TrainingBar:
    """A tqdm bar of training; silent where stderr is not a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, share: float, step: int, loss: float) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
            self._bar = tqdm(total=1.0, desc="training", bar_format=form, leave=False)
            self._bar.update(share)
        self._bar.set_postfix_str(f"step {step} loss {loss:.3f}", refresh=False)
        self._bar.update(min(share, 1.0) - self._bar.n)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()


def print_json(document: Any) -> None:
    """Prints the one JSON document of a verb."""
    from ..system.json import record_json

    print(record_json(document), end="", flush=True)
