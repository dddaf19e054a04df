"""Runs recorded as CUDA graphs: what is enqueued often is captured at its second run, and replayed from the third on."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

from ...errors import BackendError
from ...kernels import native

if TYPE_CHECKING:
    from ...kernels.stream import Stream


log = logging.getLogger("unet_rt")

_MOST_GRAPHS = 32  # rings of two or three buffers, two tiles, a few batch sizes


class Recordings:
    """CUDA graphs of runs on one stream, by a profile and the addresses of the arrays; those used last are kept.

    Args:
        stream: What runs are enqueued on.
        title: What is recorded, for messages.
    """

    def __init__(self, stream: Stream, title: str) -> None:
        self._stream, self._title = stream, title
        self._graphs: OrderedDict[tuple[int, ...], int] = OrderedDict()  # 0: seen once, not yet recorded
        self._recording = True

    def run(self, key: tuple[int, ...], execute: Callable[[], None], possible: Callable[[int], bool]) -> None:
        """Enqueues one run: by ``execute``, or by replaying what it did.

        Args:
            key: Number of the profile, and all addresses.
            execute: Enqueues the run.
            possible: Whether the library can be recorded on a stream.
        """
        stream = self._stream.handle
        if not self._recording or capturing(stream):
            execute()  # where someone else records, this is a part of it
            return
        handle = self._graphs.get(key)
        if handle:
            self._graphs.move_to_end(key)
            native.graph_launch(handle, stream)
            return
        if handle is None:  # the first run loads kernels, and compiles them in TensorRT-RTX
            execute()
            self._remember(key, 0)
            return
        handle = self._record(execute, possible)
        if handle:
            self._remember(key, handle)
            native.graph_launch(handle, stream)
        else:
            execute()

    def forget(self, addresses: Set[int]) -> None:
        """Drops what was recorded on any of these arrays; the stream has been waited for."""
        for key in [key for key in self._graphs if addresses & set(key[1:])]:
            self._destroy(self._graphs.pop(key))

    def clear(self) -> None:
        """Drops everything."""
        for handle in self._graphs.values():
            self._destroy(handle)
        self._graphs.clear()

    def _record(self, execute: Callable[[], None], possible: Callable[[int], bool]) -> int:
        """A CUDA graph of one run; 0 where the library cannot be recorded, after which it is not tried again."""
        stream = self._stream.handle
        reason: object = "it says so"
        if possible(stream):
            native.graph_begin(stream)
            try:
                execute()
                return native.graph_end(stream)
            except BackendError as error:
                _discard(stream)
                reason = error
        self._recording = False
        log.info("%s: runs cannot be recorded as a CUDA graph (%s); they are launched one by one", self._title, reason)
        return 0

    def _remember(self, key: tuple[int, ...], handle: int) -> None:
        self._graphs[key] = handle
        self._graphs.move_to_end(key)
        while len(self._graphs) > _MOST_GRAPHS:
            _, old = self._graphs.popitem(last=False)
            self._destroy(old)

    def _destroy(self, handle: int) -> None:
        if handle:
            self._stream.synchronize()  # it may still run
            native.graph_destroy(handle)


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def capturing(stream: int) -> bool:
    """Whether a stream is being captured at the moment; asked of the driver, which loaded before anything here."""
    status = ctypes.c_int(0)
    code = _driver().cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status))
    return code != 0 or status.value != 0


def _discard(stream: int) -> None:
    """Ends a capture that failed, if it has not ended itself; what it holds is nothing."""
    if capturing(stream):
        try:
            native.graph_destroy(native.graph_end(stream))
        except BackendError:
            return  # a capture that was invalidated ends with an error
