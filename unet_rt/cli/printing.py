"""Lines, progress bars and JSON on the terminal."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from contextlib import suppress
from typing import Any

EVERY_S = 10.0  # seconds between lines of progress where stderr is not a terminal


def text_stream(args: argparse.Namespace) -> Any:
    """Where a verb prints for people: stderr where --json has stdout to itself."""
    return sys.stderr if args.json else sys.stdout


class Narrator:
    """Progress on stderr while a ``with`` block runs, so that nobody has to wonder whether it still does.

    On a terminal the last sentence stands in one line that is overwritten; elsewhere it is a line every ten seconds, with
    how long that has been going on. What is worth keeping is a line of its own on both, at once.
    """

    def __init__(self, *, every_s: float = EVERY_S) -> None:
        """``every_s``: Seconds between lines where stderr is not a terminal."""
        self.on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._every_s = every_s
        self._said, self._line = (
            ("working", time.monotonic()),
            time.monotonic(),
        )  # sentence and its time; the last line's
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)

    def __enter__(self) -> Narrator:
        if not self.on_terminal:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        clear_line()

    def say(self, text: str) -> None:
        """What is being done now."""
        self._said = text, time.monotonic()
        if self.on_terminal:
            print(f"\r\033[K  {text[:110]}", end="", file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """What is worth keeping."""
        clear_line()
        print(f"  {text}", file=sys.stderr, flush=True)
        self._line = time.monotonic()

    def _repeat(self) -> None:
        while not self._done.wait(max(0.0, self._line + self._every_s - time.monotonic())):
            (text, begun), now = self._said, time.monotonic()
            if now - self._line >= self._every_s:
                with suppress(OSError, ValueError):  # whoever read it has gone: no reason to stop working
                    print(f"  {text} ... for {now - begun:.0f} s", file=sys.stderr, flush=True)
                self._line = now


def clear_line() -> None:
    """Removes the line of progress from a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


class Bar:
    """Tiles done, as progress for ``predict``: a tqdm bar for work of more than two seconds, or sentences of a narrator."""

    def __init__(self, name: str, narrator: Narrator) -> None:
        self._name, self._narrator = name, narrator
        self._first: tuple[int, float] | None = None  # tiles that an earlier run has done, and when this one began
        self._bar: Any = None
        narrator.say(f"{name}: reading")

    def __call__(self, done: int, total: int) -> None:
        before, begun = self._first = self._first or (done, time.monotonic())
        if not self._narrator.on_terminal:
            spent, text = time.monotonic() - begun, f"{self._name}: {done} of {total} tiles"
            if done > before:
                text += f", {spent:.0f} s, about {spent * (total - done) / (done - before):.0f} s left"
            self._narrator.say(text)
            return
        if self._bar is None:
            from tqdm import tqdm

            # What an earlier run has done is not counted into the speed.
            self._bar = tqdm(total=total, initial=done, desc=self._name[:30], unit="tile", delay=2, leave=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


class TrainingBar:
    """Share, step and loss of a training: a tqdm bar, or sentences of a narrator."""

    def __init__(self, narrator: Narrator) -> None:
        self._narrator = narrator
        self._bar: Any = None

    def __call__(self, share: float, step: int, loss: float) -> None:
        if not self._narrator.on_terminal:
            self._narrator.say(f"training: {share:.0%}, step {step}, loss {loss:.3f}")
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
