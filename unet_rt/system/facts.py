"""What this machine lets a process use: threads, memory, CPU instructions, NVIDIA devices. Standard library only.

Containers and batch systems give a process less than the machine has, and the C library does not say so: the numbers
here follow the affinity mask and the quotas of control groups (versions 1 and 2, nested, also seen from inside a
container). Paths of Linux's /proc and /sys are read below ``root``, so that tests can bring their own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .limits import command, memory_bytes, physical_bytes, read_text, threads

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# Features that decide which convolution kernels the backends use, by the names of /proc/cpuinfo on x86-64.
_X86_FEATURES = frozenset(
    {
        "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
        "avx_vnni", "avx_vnni_int8", "avx512_bf16", "avx_ne_convert", "avx512_fp16", "amx_tile", "amx_bf16",
        "amx_int8", "amx_fp16"
    }
)  # fmt: skip
_ARM_FEATURES = frozenset(
    {
        "asimd", "asimdhp", "asimddp", "fphp", "sve", "sve2", "i8mm", "svei8mm", "bf16", "svebf16", "sme",
        "sme2"
    }
)  # fmt: skip

# Distributions that bring the library of a backend, the likeliest first. All of ONNX Runtime's install into one folder.
DISTRIBUTIONS = {
    "onnxruntime": (
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-directml",
        "onnxruntime-openvino",
        "onnxruntime-rocm",
        "onnxruntime-migraphx",
        "onnxruntime-qnn",
    ),
    "openvino": ("openvino",),
    "ncnn": ("ncnn", "pnnx"),
    "tensorrt": ("tensorrt-cu13", "tensorrt", "tensorrt-rtx-cu13", "tensorrt-rtx"),
    "eager": ("torch",),
}
_PACKAGES = ("numpy", "onnx", *(name for names in DISTRIBUTIONS.values() for name in names))


def _cpuinfo(root: Path) -> dict[str, str]:
    """Fields of the first CPU in /proc/cpuinfo, lower-case names; empty elsewhere than on Linux."""
    found: dict[str, str] = {}
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        name, separator, value = line.partition(":")
        if separator:
            found.setdefault(name.strip().lower(), value.strip())
    return found


def cpu_name(*, root: Path = Path("/")) -> str:
    """The CPU as its vendor calls it, or its architecture."""
    info = _cpuinfo(root)
    name = info.get("model name") or info.get("hardware")
    if not name and sys.platform == "darwin":
        name = command("sysctl", "-n", "machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine()


def cpu_features(*, root: Path = Path("/")) -> frozenset[str]:
    """Vector and matrix instructions that inference makes use of, by their Linux names (``avx2``, ``amx_bf16``, ...).

    On Windows and macOS a part of them is found; whether a backend can do BF16 is the backend's to say.
    """
    info = _cpuinfo(root)
    if info:
        flags = frozenset(f"{info.get('flags', '')} {info.get('features', '')}".split())
        return flags & (_X86_FEATURES if "flags" in info else _ARM_FEATURES)
    if sys.platform == "darwin":
        return _mac_features()
    if sys.platform == "win32":
        codes = {"sse4_2": 38, "avx": 39, "avx2": 40, "avx512f": 41, "asimddp": 43}
        kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009 - the name exists on Windows only
        return frozenset(name for name, code in codes.items() if kernel32.IsProcessorFeaturePresent(code))
    return frozenset()


def _mac_features() -> frozenset[str]:
    arm = {"asimd": "AdvSIMD", "asimdhp": "FEAT_FP16", "asimddp": "FEAT_DotProd", "bf16": "FEAT_BF16"}
    arm |= {"i8mm": "FEAT_I8MM", "sme": "FEAT_SME", "sme2": "FEAT_SME2"}
    found = {name for name, key in arm.items() if command("sysctl", "-n", f"hw.optional.arm.{key}") == "1"}
    x86 = {"sse4_2": "sse4_2", "avx": "avx1_0", "avx2": "avx2_0", "fma": "fma", "avx512f": "avx512f"}
    found |= {name for name, key in x86.items() if command("sysctl", "-n", f"hw.optional.{key}") == "1"}
    return frozenset(found)


# --------------------------------------------------------------------------------------------------------------- NVIDIA


@dataclass(frozen=True)
class Cuda:
    """What the NVIDIA driver says.

    Attributes:
        devices: Names of the GPUs, in the order of ``cuda:0``, ``cuda:1``, ...
        driver: CUDA version the driver supports ("13.1"), "" without a driver.
        missing: Why there is no device (one sentence), None if there is one.
        release: The driver's own version ("580.159.04"), "" where the system does not tell.
    """

    devices: tuple[str, ...]
    driver: str
    missing: str | None
    release: str = ""

    @property
    def identity(self) -> str:
        """Of the driver: what results may depend on. Several releases support the same CUDA version."""
        return f"{self.driver} {self.release}".rstrip()


@functools.cache
def cuda() -> Cuda:
    """Devices of the NVIDIA driver. Only its own library is asked: some CUDA runtimes abort without a device."""
    names = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return replace(_ask_driver(library), release=_driver_release())
    return Cuda((), "", f"no NVIDIA driver is installed ({names[0]} cannot be loaded)")


def _driver_release(path: Path = Path("/sys/module/nvidia/version")) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def is_cuda(device: str) -> bool:
    """Whether ``device`` names an NVIDIA GPU reached through CUDA."""
    return device.startswith("cuda")


def cuda_index(device: str) -> int:
    """N of ``cuda:N``; 0 for ``cuda``."""
    return int(device.partition(":")[2] or 0)


def _ask_driver(library: Any) -> Cuda:
    status = library.cuInit(0)
    if status != 0:
        text = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode(errors="replace")
        return Cuda((), "", f"the NVIDIA driver found no usable GPU (cuInit: error {status}, {reason})")
    number, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    driver = f"{number.value // 1000}.{number.value % 1000 // 10}"
    library.cuDeviceGetCount(ctypes.byref(count))
    devices = []
    for index in range(count.value):
        handle, buffer = ctypes.c_int(), ctypes.create_string_buffer(256)
        library.cuDeviceGet(ctypes.byref(handle), index)
        library.cuDeviceGetName(buffer, len(buffer), handle)
        devices.append(buffer.value.decode(errors="replace"))
    missing = None if devices else "the NVIDIA driver lists no GPU (CUDA_VISIBLE_DEVICES may hide it)"
    return Cuda(tuple(devices), driver, missing)


# ------------------------------------------------------------------------------------------------------------- records


def package_version(distribution: str) -> str | None:
    """Version of an installed distribution without importing it, None if it is not installed."""
    import importlib.metadata  # 20 ms that a prediction does not need

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def backend_entry_points() -> tuple[EntryPoint, ...]:
    """Where installed packages offer backends of their own: the entry points of the group ``unet_rt.backends``."""
    import importlib.metadata

    return tuple(importlib.metadata.entry_points(group="unet_rt.backends"))


def package_of(entry: EntryPoint) -> str:
    """The distribution that an entry point comes with."""
    return entry.value if entry.dist is None else entry.dist.name


def package_folder(distribution: str) -> Path | None:
    """Folder into which a distribution was installed, None if it is not installed."""
    import importlib.metadata

    try:
        return Path(str(importlib.metadata.distribution(distribution).locate_file(""))).resolve()
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """This machine as records name it (JSON values): two records are comparable where these agree."""
    outside = {package_of(entry) for entry in backend_entry_points()}
    versions = {name: package_version(name) for name in (*_PACKAGES, *sorted(outside - {*_PACKAGES}))}
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": threads(),
        "features": sorted(cpu_features()),
        "memory_bytes": physical_bytes(),
        "available_bytes": memory_bytes(),
        "gpus": list(cuda().devices),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {name: version for name, version in versions.items() if version is not None},
    }
