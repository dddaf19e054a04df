"""The queue in front of the engines: who may wait, who computes, what is left behind by those who leave."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import EngineError, ServiceError
from ..system import limits
from .job import Job
from .settings import Settings

GRACE = 10.0  # seconds in which a cancelled job has to end by itself, between two tiles
LINE_BYTES = 2**26  # of an answer; pixels and objects lie in files


class QueueFull(ServiceError):
    """More requests than the queue holds; ``seconds`` is when to come back."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(429, message)
        self.seconds = seconds


class Refused(ServiceError):
    """What a process that computes says of a job, in its words; ``kind`` is the error's name there."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(status, message)
        self.kind = kind


class Worker:
    """One process that computes, and the pipes to it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self.versions: dict[str, str] = {}

    async def start(self) -> None:
        """Starts the process; returns when it has loaded every engine.

        Raises:
            EngineError: It cannot load one.
        """
        wanted = self._settings
        asked = {
            "engines": {name: str(folder) for name, folder in wanted.engines.items()},
            "threads": wanted.threads or max(1, limits.threads() // wanted.workers),
            "max_px": wanted.max_px,
            "roots": wanted.roots,
        }
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "unet_rt.serve.worker",
            json.dumps(asked),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
        )
        said = await self._read()
        if said is None or "error" in said:
            raise EngineError("a worker ended while it loaded engines" if said is None else said["error"]["message"])
        self.versions = said["versions"]

    async def run(self, job: Job) -> dict[str, Any] | None:
        """The answer of the process; None where it has ended."""
        process = self._process
        if process is None or process.stdin is None:
            return None
        with suppress(ConnectionError):
            process.stdin.write((json.dumps(job.to_json()) + "\n").encode())
            await process.stdin.drain()
        return await self._read()

    async def _read(self) -> dict[str, Any] | None:
        process = self._process
        if process is None or process.stdout is None:
            return None
        line = await process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    async def close(self) -> int:
        """Ends the process, and returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
        return await process.wait()


class Pool:
    """Processes that compute, behind one queue. ``start`` it in the loop that uses it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.restarts = self.cancelled = self.inside = 0
        self._workers: list[Worker] = []
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        self._running: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._mean_s = 1.0
        self.spool: Path | None = None

    @property
    def versions(self) -> dict[str, str]:
        return self._workers[0].versions if self._workers else {}

    @property
    def pids(self) -> list[int]:
        """Of the processes that compute."""
        return [worker.pid for worker in self._workers]

    async def __aenter__(self) -> Pool:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Starts the processes, one after the other: the first may have to sit an exam that spares the others theirs."""
        if self.spool is not None:
            return
        self.spool = Path(tempfile.mkdtemp(prefix="unet-rt-serve-"))
        try:
            for _ in range(self.settings.workers):
                worker = Worker(self.settings)
                self._workers.append(worker)
                await worker.start()
                self._idle.put_nowait(worker)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends all processes; removes what they left."""
        tasks = list(self._running.values())
        for worker in self._workers:
            await worker.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._workers, self._idle = [], asyncio.Queue()
        if self.spool is not None:
            shutil.rmtree(self.spool, ignore_errors=True)
            self.spool = None

    @contextmanager
    def place(self) -> Iterator[Path]:
        """A place in the queue, and a folder of its own, which is removed when neither request nor job needs it.

        Raises:
            QueueFull: All places are taken.
        """
        if self.inside >= self.settings.queue:
            seconds = max(1, ceil(self.inside * self._mean_s / self.settings.workers))
            raise QueueFull(
                f"{self.inside} requests are in the queue, which holds no more; try in {seconds} s", seconds
            )
        self.inside += 1
        folder = Path(tempfile.mkdtemp(dir=self.spool))
        try:
            yield folder
        finally:
            self.inside -= 1
            task = self._running.get(str(folder))
            if task is None:
                shutil.rmtree(folder, ignore_errors=True)
            else:  # a process still writes there, and has been told to stop
                task.add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))

    async def run(self, job: Job) -> dict[str, Any]:
        """Waits for a process, has it do the job, and returns its answer. When cancelled, the job is ended as well.

        Raises:
            Refused: What the process says; 503 where it has died of the job.
        """
        worker = await self._idle.get()
        task = asyncio.create_task(self._run_on(worker, job))
        self._running[job.folder] = task
        task.add_done_callback(lambda _: self._running.pop(job.folder, None))
        try:
            answer = await asyncio.shield(task)
        except asyncio.CancelledError:
            self.cancelled += 1
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else asks for it
            with suppress(OSError):
                job.cancel.touch()
            raise
        if "error" in answer:
            raise Refused(answer["status"], answer["error"]["type"], answer["error"]["message"])
        return answer

    async def _run_on(self, worker: Worker, job: Job) -> dict[str, Any]:
        """The answer of one process, which is free again afterwards: itself, or another in its place."""
        begun = time.monotonic()
        work = asyncio.create_task(worker.run(job))
        try:
            while not (await asyncio.wait([work], timeout=GRACE))[0]:
                if job.cancel.exists() and time.time() - job.cancel.stat().st_mtime > GRACE:
                    await worker.close()  # the pipe closes, and the answer is None
            answer = work.result()
            if answer is not None:
                self._mean_s += 0.1 * (time.monotonic() - begun - self._mean_s)
                self._idle.put_nowait(worker)
                return answer
        except asyncio.CancelledError:
            work.cancel()
            raise
        code = await worker.close()
        await self._replace(worker)
        text = (
            f"the process that computed this ended ({f'signal {-code}' if code < 0 else f'exit code {code}'}), for want of "
            "memory perhaps; another has taken its place; send a smaller image, or try again"
        )
        return {"error": {"type": "WorkerDied", "message": text}, "status": 503}

    async def _replace(self, worker: Worker) -> None:
        """Starts a process anew, as often as it takes; the others go on meanwhile."""

        async def again() -> None:
            wait = 0.1
            while worker in self._workers:
                try:
                    await worker.start()
                except (EngineError, OSError):  # memory may come back
                    await worker.close()
                    await asyncio.sleep(wait)
                    wait = min(60.0, wait * 2)
                else:
                    self._idle.put_nowait(worker)
                    return

        self.restarts += 1
        task = asyncio.create_task(again(), name=f"restart {os.getpid()}")
        self._running[f"restart {self.restarts}"] = task  # type: ignore[assignment]
        name = f"restart {self.restarts}"
        task.add_done_callback(lambda _: self._running.pop(name, None))
