"""The context of a GPU, and the streams and events in it, on PyCUDA.

The primary context of the device is used, which PyTorch, CuPy and ONNX Runtime share, so that memory and streams can be
handed back and forth. It is made current for the length of each call only; any thread may call. Streams do not wait for
the legacy default stream: order is what events say, and :meth:`Stream.after` and :meth:`Stream.before` for streams of
other libraries.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BackendError, DeviceMemoryError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which PyCUDA does not name
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Context:
    """The primary context of GPU ``index``, retained by whoever makes this value; ``closed`` once it was let go.

    Attributes:
        index: As in ``cuda:<index>``.
        driver: PyCUDA's module ``pycuda.driver``.
        closed: Whether the context was let go: what is destroyed later is left to the driver.
    """

    def __init__(self, index: int, driver: Any, primary: Any) -> None:
        self.index, self.driver, self.closed = index, driver, False
        self._context = primary

    def detach(self) -> None:
        """Lets the context go, at the interpreter's end."""
        self.closed = True
        self._context.detach()

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Makes the context current for this thread. Every call of this package does so itself."""
        self._context.push()
        try:
            yield
        except self.driver.MemoryError as error:
            raise DeviceMemoryError(
                f"cuda:{self.index} is out of memory ({str(error).strip()}); use a smaller --tile or --batch, or free what "
                "others hold"
            ) from error
        except self.driver.Error as error:
            raise BackendError(
                f"cuda:{self.index}: {error}; the device may have to be opened by a new process"
            ) from error
        finally:
            self.driver.Context.pop()

    def bear_captures(self) -> None:
        """Lets this thread wait for events while another one records a CUDA graph.

        Libraries record in the mode that forbids this to all threads (ONNX Runtime, PyTorch), and a thread that does it
        all the same spoils the recording.
        """
        mode = ctypes.c_int(_RELAXED)
        with self.activate():
            check_status(
                driver_library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)),
                "cuThreadExchangeStreamCaptureMode",
            )

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        with self.activate():
            free, total = self.driver.mem_get_info()
        return int(free), int(total)

    def synchronize(self) -> None:
        """Waits for everything on the device, in all streams of this process."""
        with self.activate():
            self.driver.Context.synchronize()

    def stream(self) -> Stream:
        return Stream(self)

    def event(self, timing: bool = False) -> Event:
        return Event(self, timing)


class Stream:
    """Work on the device in the order in which it is enqueued."""

    def __init__(self, device: Context) -> None:
        self.device = device
        self.raw: Any = None  # PyCUDA's
        with device.activate():
            self.raw = device.driver.Stream(_NON_BLOCKING)
        self.handle = int(self.raw.handle)

    def synchronize(self) -> None:
        """Waits until all that was enqueued is done; errors of that work are raised here."""
        with self.device.activate():
            self.raw.synchronize()

    def record(self, event: Event) -> None:
        """Marks this place in the stream."""
        with self.device.activate():
            event.raw.record(self.raw)

    def wait(self, event: Event) -> None:
        """What is enqueued from now on runs after the place that ``event`` marks now (at once if it was never recorded)."""
        with self.device.activate():
            self.raw.wait_for_event(event.raw)

    def after(self, handle: int) -> None:
        """What is enqueued here from now on runs after all that another library's stream (cudaStream_t) holds now."""
        order_streams(self.device, handle, self.handle)

    def before(self, handle: int) -> None:
        """What another library's stream gets from now on runs after all that is enqueued here now."""
        order_streams(self.device, self.handle, handle)

    def __del__(self) -> None:
        if self.raw is not None and not self.device.closed:
            with self.device.activate():
                self.raw = None


class Event:
    """A place in a stream."""

    def __init__(self, device: Context, timing: bool = False) -> None:
        self.device = device
        self.raw: Any = None
        flags = device.driver.event_flags
        # Waiting threads sleep: several may wait at once, and they share the cores with those that copy.
        how = flags.BLOCKING_SYNC if timing else flags.BLOCKING_SYNC | flags.DISABLE_TIMING
        with device.activate():
            self.raw = device.driver.Event(int(how))

    def synchronize(self) -> None:
        """Waits until the place is reached; returns at once if it was never recorded."""
        with self.device.activate():
            self.raw.synchronize()

    def done(self) -> bool:
        """Whether the place was reached."""
        with self.device.activate():
            return bool(self.raw.query())

    def seconds_since(self, start: Event) -> float:
        """Device time between two places that were reached; both events were made with ``timing``."""
        with self.device.activate():
            return float(self.raw.time_since(start.raw)) / 1e3

    def __del__(self) -> None:
        if self.raw is not None and not self.device.closed:
            with self.device.activate():
                self.raw = None


def order_streams(device: Context, first: int, then: int) -> None:
    """What stream ``then`` gets from now on runs after all that stream ``first`` holds now.

    The driver is called directly: PyCUDA has no streams that it has not made itself.
    """
    library, event = driver_library(), ctypes.c_void_p()
    with device.activate():
        check_status(library.cuEventCreate(ctypes.byref(event), ctypes.c_uint(2)), "cuEventCreate")  # without timing
        try:
            check_status(library.cuEventRecord(event, ctypes.c_void_p(first)), "cuEventRecord")
            check_status(library.cuStreamWaitEvent(ctypes.c_void_p(then), event, ctypes.c_uint(0)), "cuStreamWaitEvent")
        finally:
            library.cuEventDestroy_v2(event)  # it lives until it is reached


@functools.cache
def driver_library() -> Any:
    """NVIDIA's driver library, initialised."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    check_status(library.cuInit(ctypes.c_uint(0)), "cuInit")
    return library


def check_status(status: int, call: str) -> None:
    """BackendError unless a call of the driver returned success."""
    if status:
        raise BackendError(f"the NVIDIA driver answers error {status} to {call}; see unet-rt doctor")
