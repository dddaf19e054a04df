"""What the process has from outside: signals, and the streams it was started with."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_AGAIN_S = 0.05  # until a signal is sent again whose exception went nowhere


class Interrupted(BaseException):
    """SIGINT or SIGTERM: unwinds everything, so that every output that is open is removed."""


class Signals:
    """SIGINT and SIGTERM of this process, from :meth:`catch` to :meth:`release`.

    Attributes:
        number: The first one that came; None: none did. Whatever happened after that happened because of it: libraries
            turn what interrupts them into errors of their own.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def catch(self) -> None:
        """Raises :class:`Interrupted` in the main thread from now on. Elsewhere signals are not ours."""
        with suppress(ValueError):  # not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as for a shell's background jobs
                    self._before[number] = signal.signal(number, self._came)
            sys.unraisablehook = self._unraisable

    def release(self) -> None:
        """Gives signals back to whoever had them."""
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """Lets further signals do nothing."""
        for number in self._before:
            signal.signal(number, lambda number, frame: None)

    @property
    def code(self) -> int:
        """The exit code that says which one came."""
        return 128 + (self.number or signal.SIGINT)

    def _came(self, number: int, frame: object) -> None:
        self.number = self.number or number
        raise Interrupted

    def _unraisable(self, unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, Interrupted):
            self._hook(unraisable)
            return
        import threading  # it came while something was deleted, where nothing can be raised

        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), self.number))
        again.daemon = True
        again.start()


class _Unfailing(io.FileIO):
    """A file whose writes succeed: on a full disk, or where nobody reads any more, they go nowhere."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            super().write(data)
        return len(data)


@contextmanager
def usable_streams() -> Iterator[None]:
    """stdin, stdout and stderr that are there, and take file names of any script; stderr never fails.

    Where one was closed, the next file to be opened would have its number, and libraries would print into that.
    """
    if os.name == "posix":
        while (handle := os.open(os.devnull, os.O_RDWR)) < 3:
            os.set_inheritable(handle, True)
        os.close(handle)
    out, err = sys.stdout, sys.stderr
    if out is None:
        sys.stdout = out = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="backslashreplace")
    if err is None or _number(err) == 2:
        encoding = "utf-8" if err is None else err.encoding
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Unfailing(2, "w", closefd=False)), encoding, "backslashreplace", line_buffering=True
        )
    try:
        yield
    finally:
        if err is not None:
            sys.stderr.flush()
            sys.stderr = err


def drop_stdout() -> None:
    """Lets what is left in stdout's buffer go nowhere, so that Python's exit does not fail on it again."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _number(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None
