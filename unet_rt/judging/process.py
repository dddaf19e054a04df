"""A contender in a process of its own: no library's threads, memory or settings are another's.

The parent asks by pickled messages over pipes; the process measures itself, so that the way there and back is in no time.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..baseline.samples import SampleWindow
from ..errors import (
    BackendError,
    ContractError,
    EngineError,
    GraphError,
    ImageError,
    ParityError,
    TileError,
    UnetRtError,
    first_line,
)
from ..system import timing
from ..tiling.grid import TileGrid
from .contenders import Contender, Entry, open_contender
from .rounds import Run

Array = npt.NDArray[Any]
START = "import sys; sys.path[:] = sys.argv[1:]; from unet_rt.judging.process import serve; serve()"
RAISED = (ContractError, EngineError, GraphError, ImageError, ParityError, TileError)  # here as there
PACKAGE = str(Path(__file__).parents[2])  # where this very package lies, whatever stands on the path by now
END_S = 10.0  # that a process has to end by itself


@dataclass(frozen=True)
class Task:
    """What every contender is given.

    Attributes:
        tile: (1, C, *tile), normalised pixels.
        timed, judged: Windows that are timed, and that labels are compared on.
        timed_grid, judged_grid: Their tiles, with the contender's own halo.
        untiled: The judged window in one tile; None where the network has no whole-image result.
    """

    tile: Array
    timed: SampleWindow
    judged: SampleWindow
    timed_grid: TileGrid
    judged_grid: TileGrid
    untiled: TileGrid | None


class ContenderProcess:
    """The parent's side: a process that loads one contender and answers questions about it, until ``close``."""

    def __init__(self, entry: Entry) -> None:
        """Starts the process; it imports what it needs meanwhile."""
        self.name, self.spec, self.is_engine = entry.title, entry.spec, entry.is_engine
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - until close
        path = [PACKAGE, *(os.path.abspath(part) for part in sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, *path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        self._entry = entry

    def open(self) -> None:
        """Loads the contender.

        Raises:
            UnetRtError: As the contender's own, or BackendError where the process ended.
        """
        self._ask("open", pickle.dumps(self._entry))

    def prepare(self, task: Task) -> None:
        """Hands over what all that follows is done with."""
        self._ask("prepare", task)

    def first_run(self) -> int:
        """Bytes of memory that the first run on the timed window takes beyond the loaded contender."""
        return int(self._ask("first_run"))

    def run_tile(self) -> Run:
        """One run of a tile."""
        return self._ask("run_tile")  # type: ignore[no-any-return]

    def run_window(self) -> Run:
        """One run of the timed window, from pixels to labels."""
        return self._ask("run_window")  # type: ignore[no-any-return]

    def values(self, *, untiled: bool) -> Array:
        """The network's own values (K, *spatial) of the judged window, in tiles or in one."""
        return self._ask("values", untiled)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise BackendError(f"{self.name} has no process")
        try:
            pickle.dump((method, arguments), stdin)
            stdin.flush()
            kind, answer = pickle.load(stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise BackendError(f"the process of {self.name} ended ({self._last_line()}); leave it out") from error
        if kind == "done":
            return answer
        raise next((error for error in RAISED if error.__name__ == kind), BackendError)(answer)

    def _last_line(self) -> str:
        """What the process said last, beside its exit status."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f"exit status {self._process.returncode}" + (f": {lines[-1][:300]}" if lines else "")


# --- the process's own side -------------------------------------------------------------------------------------------


class _Served:
    """What the process does when it is asked; methods by the names of :class:`ContenderProcess`."""

    def __init__(self, resources: ExitStack) -> None:
        self._resources = resources
        self._contender: Contender | None = None
        self._task: Task | None = None

    def open(self, entry: bytes) -> None:
        try:
            opened = pickle.loads(entry)
        except (AttributeError, ImportError, pickle.UnpicklingError) as error:
            raise BackendError(
                f"eager PyTorch runs in a process of its own, which cannot import the module ({first_line(error)}); put its "
                "class into a file that can be imported, or pass a function of such a file that makes it"
            ) from error
        self._contender = open_contender(opened, self._resources)

    def prepare(self, task: Task) -> None:
        self._task = task

    @property
    def _both(self) -> tuple[Contender, Task]:
        if self._contender is None or self._task is None:
            raise BackendError("a contender is asked before it was opened and prepared")
        return self._contender, self._task

    def first_run(self) -> int:
        contender, task = self._both
        with timing.MemoryWatch() as watch:
            contender.labels(task.timed, task.timed_grid)
        return watch.grown

    def run_tile(self) -> Run:
        contender, task = self._both
        return _measured(lambda: contender.run(task.tile))

    def run_window(self) -> Run:
        contender, task = self._both
        return _measured(lambda: contender.labels(task.timed, task.timed_grid))

    def values(self, untiled: bool) -> Array:
        contender, task = self._both
        grid = task.untiled if untiled and task.untiled is not None else task.judged_grid
        return np.ascontiguousarray(contender.tiled(task.judged, grid))


def _measured(call: Callable[[], object]) -> Run:
    """One run, by this process's clock and by what the system says of its threads."""
    waited, busy, begun = timing.waited_s(), time.process_time(), time.perf_counter()
    call()
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    after = timing.waited_s()
    if waited is None or after is None:
        return Run(seconds, None)
    waiting = max(0.0, after - waited)
    return Run(seconds, waiting / (waiting + busy) if waiting + busy > 0 else 0.0)


def serve() -> None:
    """Answers questions from stdin until it ends; what libraries print goes to stderr."""
    questions: IO[bytes] = os.fdopen(os.dup(0), "rb")
    answers: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    with ExitStack() as resources, suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        served = _Served(resources)
        while True:
            method, arguments = pickle.load(questions)
            try:
                answer = "done", getattr(served, method)(*arguments)
            except UnetRtError as error:
                answer = type(error).__name__, str(error)
            except Exception as error:  # noqa: BLE001 - a module of the user's, or a library, raises anything
                answer = "BackendError", f"{type(error).__name__}: {first_line(error)}"
            pickle.dump(answer, answers)
            answers.flush()
