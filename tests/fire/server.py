"""Runs command lines of unet-rt in forked children, for :mod:`arena`: one JSON request per line, one JSON answer.

The libraries are imported once, before the forks. A child runs one request after the other until one of them ends it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]

LARGEST_FILE = 256 << 20  # bytes
ADDRESS_SPACE = 6 << 30
ERRORS = open(os.dup(2), "w")  # noqa: SIM115 - for what goes wrong in children, whose stderr is that of a case
WAIT = 6  # times the processor time allowed: other processes may be at work


# What children would import each for itself.
MODULES = """numpy onnx onnx.shape_inference onnxruntime PIL.Image tifffile zarr exactness unet_rt.cli.main
unet_rt.cli.parser unet_rt.engine.archive unet_rt.engine.load unet_rt.graph.report unet_rt.images.open unet_rt.images.raster
unet_rt.images.tiff unet_rt.images.zarr unet_rt.outputs.output unet_rt.outputs.zarr unet_rt.prediction.predict"""


def import_all() -> None:
    """Imports them here, before the forks."""
    for name in MODULES.split():
        importlib.import_module(name)


def peak_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def run(request: dict[str, Any]) -> dict[str, Any]:
    """One command line in this process: what it answered."""
    import exactness

    from unet_rt.cli.main import main

    folder = Path(request["folder"])
    os.chdir(folder)
    handles = [os.open(f"{folder}.{name}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) for name in ("out", "err")]
    for number, handle in enumerate(handles, 1):
        os.dup2(handle, number)
        os.close(handle)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that of this request
    except OSError:
        pass
    start = time.process_time()
    try:
        code: int | None = (
            exactness.main(request["argv"][1]) if request["argv"][0] == "exactness" else main(request["argv"])
        )
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - which is what is looked for
        traceback.print_exc()
        code = None
    sys.stdout.flush()
    sys.stderr.flush()
    return {"code": code, "seconds": time.process_time() - start, "peak_mb": peak_mb()}


def child(requests: int, answers: int) -> None:
    """Answers requests until there are no more."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as out:
        for line in lines:
            print(json.dumps(run(json.loads(line))), file=out, flush=True)
    atexit._run_exitfuncs()
    os._exit(0)


class Child:
    """A forked process that answers requests."""

    def __init__(self) -> None:
        here, theirs = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(here[1])
            os.close(theirs[0])
            try:
                child(here[0], theirs[1])
            except BaseException:  # noqa: BLE001 - it is a process of its own
                traceback.print_exc(file=ERRORS)
                ERRORS.flush()
            finally:
                os._exit(99)
        os.close(here[0])
        os.close(theirs[1])
        self.requests, self.answers = os.fdopen(here[1], "w"), os.fdopen(theirs[0])

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None: it took too long, or ended without one."""
        start = time.monotonic()
        print(json.dumps(request), file=self.requests, flush=True)
        ready, _, _ = select.select([self.answers], [], [], WAIT * request["seconds"])
        line = self.answers.readline() if ready else ""
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.seconds, self.late = time.monotonic() - start, not ready
        return None

    def end(self) -> int:
        """Ends it; its status."""
        self.requests.close()
        if not select.select([self.answers], [], [], 5)[0]:
            os.killpg(self.pid, signal.SIGKILL)
        self.answers.close()
        return os.waitpid(self.pid, 0)[1]


def serve() -> None:
    import_all()
    print("ready", flush=True)
    runner: Child | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if runner is not None and request["fresh"]:
            runner.end()
            runner = None
        runner = runner or Child()
        answer = runner.ask(request)
        if answer is None:
            seconds, late = runner.seconds, runner.late
            if late:
                os.killpg(runner.pid, signal.SIGKILL)
            status = runner.end()
            runner = None
            death = "took too long" if late else f"died ({os.waitstatus_to_exitcode(status)})"
            answer = {"code": None, "seconds": seconds, "peak_mb": 0.0, "death": death}
        print(json.dumps(answer), flush=True)
    if runner is not None:
        runner.end()


if __name__ == "__main__":
    serve()
