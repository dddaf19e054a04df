"""Device memory and streams that one prediction on a GPU leaves to the next, and what the threads of one share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from ..backends.session import DeviceSession
from ..kernels.memory import DeviceArray, MemoryContext, memory_behind
from .report import Seen
from .work import Array, Computation, StageClock, Work


class Workspace:
    """Streams and buffers of one session. Buffers are found by name and replaced when they are too small."""

    def __init__(self, device: MemoryContext) -> None:
        self.device = device
        self.lock = threading.Lock()  # one prediction at a time
        self.copy_in = device.stream()
        self.copy_out = device.stream()
        self._on_device: dict[str, DeviceArray] = {}
        self._pinned: dict[str, Array] = {}
        self._used: set[str] = set()

    @property
    def held_bytes(self) -> int:
        """Of the device's memory."""
        return sum(held.nbytes for held in list(self._on_device.values()))

    def empty(self, name: str, shape: Sequence[int], dtype: npt.DTypeLike) -> DeviceArray:
        """Device memory, C-contiguous; what it held before is of no meaning."""
        kind = np.dtype(dtype)
        size = _room(prod(shape) * kind.itemsize)
        self._used.add(name)
        held = self._on_device.get(name)
        if held is None or held.nbytes < size:
            if held is not None:
                del self._on_device[name]
                held.free()
            held = self._on_device[name] = self.device.empty((size,), np.uint8)
        return DeviceArray(self.device, held.pointer, shape, kind, owner=held)

    def pinned(self, name: str, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Page-locked host memory."""
        kind = np.dtype(dtype)
        size = prod(shape) * kind.itemsize
        self._used.add(name)
        held = self._pinned.get(name)
        if held is None or held.nbytes < size:
            self._pinned.pop(name, None)
            held = None
            held = self._pinned[name] = self.device.pinned((_room(size),), np.uint8)
        return held[:size].view(kind).reshape(tuple(shape))

    def trim(self) -> None:
        """Frees what the last prediction did not use: another network output, another kind of image."""
        for name in set(self._on_device) - self._used:
            self._on_device.pop(name).free()
        for name in set(self._pinned) - self._used:
            del self._pinned[name]
        self._used.clear()

    def free(self) -> None:
        self._used.clear()
        self.trim()


def _room(size: int) -> int:
    return max(256, -(-size // 256) * 256)


WORKSPACES: WeakKeyDictionary[Any, Workspace] = WeakKeyDictionary()
_MAKING = threading.Lock()


def workspace_of(session: DeviceSession) -> Workspace:
    """The workspace of a session; one that is made now goes when the session closes."""
    with _MAKING:
        known = WORKSPACES.get(session)
        if known is None:
            known = WORKSPACES[session] = Workspace(memory_behind(session.stream))
            session.at_close(known.free)
        return known


@dataclass(frozen=True)
class Shared:
    """What the threads of one run on a GPU share.

    Attributes:
        computation: What all tiles have in common; its batch is the one in use.
        works: What is to be computed.
        session, workspace: The engine's session, and its memory.
        seen, clock, stop: What was done so far, seconds per stage, and whether a thread has ended early.
    """

    computation: Computation
    works: Sequence[Work]
    session: DeviceSession
    workspace: Workspace
    seen: Seen
    clock: StageClock = field(default_factory=StageClock)
    stop: threading.Event = field(default_factory=threading.Event)

    def distinct(self) -> list[Work]:
        """One work for each grid: all planes of a stack have the same."""
        return list({id(work.grid): work for work in self.works}.values())

    @property
    def rows(self) -> int:
        """Rows of tiles of all works."""
        return sum(work.grid.shape[0] for work in self.works)
