"""Tiles beside each other: several sessions of one graph, each with its share of the threads."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from .session import Array, Session, SessionBase


def run_beside(load: Callable[[int], Session], streams: int, threads: int) -> Session:
    """A session of a graph that takes ``streams`` tiles at once; a plain one where there are too few threads for that.

    Args:
        load: Opens a session with that many threads.
        streams: Tiles at once.
        threads: Of all together; 0: as many as affinity and quota allow.
    """
    alone = load(threads)
    streams = min(streams, alone.threads)
    return alone if streams < 2 else BesideSession(alone, load, streams)


class BesideSession(SessionBase):
    """Tiles are independent, and two of them on a core each take less time than one after the other on both.

    A tile that comes alone runs on all threads. The other sessions are opened with the first tiles that come together.
    """

    def __init__(self, alone: Session, load: Callable[[int], Session], streams: int) -> None:
        super().__init__(alone.precision, alone.device, alone.threads)
        self.title = alone.version
        self._alone, self._load, self._streams = alone, load, streams
        self._free: queue.SimpleQueue[Session] = queue.SimpleQueue()
        self._narrow: list[Session] = []
        self._pool: ThreadPoolExecutor | None = None

    @property
    def version(self) -> str:
        return self._alone.version

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        return self._alone.run(inputs)

    def run_many(self, tiles: Sequence[Sequence[Array]]) -> list[list[Array]]:
        """Outputs for the inputs of every tile, as :meth:`run` gives them for one."""
        self._require_process()
        with self._lock:
            self._require_open()
            if self._pool is None:
                for _ in range(self._streams):
                    self._narrow.append(self._load(self.threads // self._streams))
                    self._free.put(self._narrow[-1])
                self._pool = ThreadPoolExecutor(self._streams, thread_name_prefix="unet-rt-beside")
            return list(self._pool.map(self._run_narrow, tiles))

    def _run_narrow(self, inputs: Sequence[Array]) -> list[Array]:
        session = self._free.get()
        try:
            return session.run(inputs)
        finally:
            self._free.put(session)

    def _release(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        for session in (self._alone, *self._narrow):
            session.close()
