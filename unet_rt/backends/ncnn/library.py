"""The ncnn library: imported when it is needed, its Vulkan devices, what it writes to the terminal."""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import BackendError

_KINDS = ("GPU", "integrated GPU", "virtual GPU", "software")


@dataclass(frozen=True)
class VulkanDevice:
    """A device that Vulkan lists: its name, the version of its driver, and whether the processor computes for it."""

    name: str
    driver: str
    kind: str


def import_library() -> Any:
    """The module ``ncnn``.

    Raises:
        BackendError: It is broken.
    """
    try:
        import ncnn
    except (ImportError, OSError, AttributeError) as error:
        raise BackendError(
            f"ncnn is installed but cannot be imported ({error}); pip install --force-reinstall ncnn"
        ) from error
    return ncnn


def installed() -> bool:
    return importlib.util.find_spec("ncnn") is not None


@functools.cache
def vulkan_devices() -> tuple[VulkanDevice, ...]:
    """The devices of this machine that ncnn reaches through Vulkan, in its order; none where there is no driver."""
    library = import_library()
    with captured_stderr():  # it describes every device, unasked
        if library.create_gpu_instance() != 0:
            return ()
        count = library.get_gpu_count()
        infos = [library.get_gpu_info(index) for index in range(count)]
        return tuple(
            VulkanDevice(info.device_name(), _version(info.driver_version()), _KINDS[min(info.type(), 3)])
            for info in infos
        )


def _version(number: int) -> str:
    """A version as Vulkan packs it: 10 bits, 10 bits, 12 bits."""
    return f"{number >> 22}.{number >> 12 & 0x3FF}.{number & 0xFFF}"


def vulkan_index(device: str) -> int:
    """N of ``vulkan:N``.

    Raises:
        BackendError: No such device here.
    """
    index, devices = int(device.partition(":")[2] or 0), vulkan_devices()
    if index < len(devices):
        return index
    if not devices:
        raise BackendError(
            f"{device} was asked, and Vulkan lists no device here; install the driver of the graphics card "
            "(for tests without one: the package mesa-vulkan-drivers), or use --device cpu"
        )
    raise BackendError(
        f"{device} was asked, Vulkan lists {len(devices)} device(s), the last is vulkan:{len(devices) - 1}"
    )


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """What the library writes to the process's standard error meanwhile, as lines, instead of there."""
    lines = list[str]()
    with tempfile.TemporaryFile() as file:
        try:
            before = os.dup(2)
        except OSError:  # closed: nothing can be written there
            yield lines
            return
        try:
            os.dup2(file.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(before, 2)
                file.seek(0)
                lines += file.read().decode(errors="replace").splitlines()
        finally:
            os.close(before)
