"""What this machine lets a process use: threads, memory, CPU instructions, NVIDIA devices. Standard library only.

Containers and batch systems give a process less than the machine has, and the C library does not say so: the numbers
here follow the affinity mask and the quotas of control groups (versions 1 and 2, nested, also seen from inside a
container). Paths of Linux's /proc and /sys are read below ``root``, so that tests can bring their own.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    "tensorrt": ("tensorrt-cu13", "tensorrt", "tensorrt-rtx-cu13", "tensorrt-rtx"),
    "eager": ("torch",),
}
_PACKAGES = ("numpy", "onnx", *(name for names in DISTRIBUTIONS.values() for name in names))


# ------------------------------------------------------------------------------------------------------ control groups


def _text(path: Path) -> str | None:
    """Content of a small file, None if it does not exist or may not be read."""
    try:
        return path.read_text()
    except OSError:
        return None


def _unescape(field: str) -> str:
    """A path field of mountinfo: blanks are written as ``\\040``."""
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _cgroups(controller: str, root: Path) -> list[tuple[int, Path]]:
    """(version, folder) of every control group that bounds this process, from its own up to the top that is visible.

    A quota of any ancestor holds too. Inside a container the path in /proc/self/cgroup may be the host's while the
    mount shows a part of the tree; mountinfo's root field says which.
    """
    memberships: dict[str, str] = {}  # controller ("" for version 2) -> path in the hierarchy
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            memberships[name] = path
    folders: list[tuple[int, Path]] = []
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        before, separator, after = line.partition(" - ")
        if not separator:
            continue
        kind, _, options = [*after.split(" ", 2), "", ""][:3]
        if kind == "cgroup2":
            version, key = 2, ""
        elif kind == "cgroup" and controller in options.split(","):
            version, key = 1, controller
        else:
            continue
        if key not in memberships:
            continue
        mount_root, mount_point = (_unescape(f) for f in before.split(" ")[3:5])
        member, above = memberships[key], mount_root.rstrip("/")
        inside = member[len(above) :] if f"{member}/".startswith(f"{above}/") else ""
        top = root / mount_point.lstrip("/")
        folder = top / inside.strip("/")
        # ".." appears in the path of a process that a namespace does not contain: only the top is known then.
        if ".." in folder.parts or not folder.is_dir():
            folder = top
        while True:
            folders.append((version, folder))
            if folder == top:
                break
            folder = folder.parent
    return folders


def _quota(root: Path) -> float | None:
    """CPUs that the control groups allow (1.5 = three halves of a core), None without a quota."""
    quotas: list[float] = []
    for version, folder in _cgroups("cpu", root):
        if version == 2:
            fields = (_text(folder / "cpu.max") or "").split()
        else:
            fields = [_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if len(fields) != 2:
            continue
        try:
            quota, period = int(fields[0]), int(fields[1])
        except ValueError:  # "max": no quota at this level
            continue
        if quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def threads(*, root: Path = Path("/")) -> int:
    """Threads that can run at the same time: CPUs of the affinity mask, at most the quota rounded up, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _quota(root)
    if quota is not None:
        count = min(count, math.ceil(quota))
    return max(count, 1)


# --------------------------------------------------------------------------------------------------------------- memory


def _keys(text: str | None, *, unit: int = 1) -> dict[str, int]:
    """``name value`` or ``name: value kB`` lines as numbers."""
    found = {}
    for line in (text or "").splitlines():
        fields = line.replace(":", " ").split()
        if len(fields) >= 2 and fields[1].isdigit():
            found[fields[0]] = int(fields[1]) * unit
    return found


def _cgroup_memory(root: Path) -> int | None:
    """Bytes left below the tightest memory limit of the control groups, None without a limit."""
    left: list[int] = []
    for version, folder in _cgroups("memory", root):
        limits: tuple[str, ...] = ("memory.max", "memory.high")
        usage, cache = "memory.current", "inactive_file"
        if version == 1:
            limits = ("memory.limit_in_bytes",)
            usage, cache = "memory.usage_in_bytes", "total_inactive_file"
        used = _text(folder / usage)
        if used is None or not used.strip().isdigit():
            continue
        # The kernel gives the page cache of files back before it kills anybody.
        reclaimable = _keys(_text(folder / "memory.stat")).get(cache, 0)
        for name in limits:
            limit = (_text(folder / name) or "").strip()
            if limit.isdigit() and int(limit) < 1 << 60:  # version 1 writes "no limit" as about 2^63
                left.append(max(int(limit) - max(int(used) - reclaimable, 0), 0))
    return min(left, default=None)


def memory_bytes(*, root: Path = Path("/")) -> int:
    """Bytes that this process may still allocate: memory available, at most what the control groups leave."""
    meminfo = _keys(_text(root / "proc/meminfo"), unit=1024)
    available = meminfo.get("MemAvailable", meminfo.get("MemFree"))
    if available is None:
        available = _windows_memory() if sys.platform == "win32" else _physical_bytes()
    limit = _cgroup_memory(root)
    return available if limit is None else min(available, limit)


def _physical_bytes() -> int:
    """Installed memory; what is free of it has no portable answer, and macOS compresses and evicts on demand."""
    if sys.platform == "win32":
        return _windows_memory(total=True)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _windows_memory(*, total: bool = False) -> int:
    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *(
                (name, ctypes.c_uint64)
                for name in ("total", "available", "page", "page_free", "virtual", "free", "ext")
            ),
        ]

    status = Status()
    status.length = ctypes.sizeof(Status)
    windll = getattr(ctypes, "windll")  # noqa: B009 - the name exists on Windows only
    windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.total if total else status.available)


def rss_bytes() -> int:
    """Resident memory of this process now."""
    statm = _text(Path("/proc/self/statm"))
    if statm is not None:
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return _windows_rss()[0]
    listed = _command("ps", "-o", "rss=", "-p", str(os.getpid()))
    return int(listed) * 1024 if listed.isdigit() else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    # Not getrusage where this exists: Linux carries ru_maxrss through execve, so a small child of a big parent
    # reports its parent's peak.
    peak = _keys(_text(Path("/proc/self/status")), unit=1024).get("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return _windows_rss()[1]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others kibibytes


def _windows_rss() -> tuple[int, int]:
    """(now, peak) working set."""

    class Counters(ctypes.Structure):
        _fields_ = [
            ("size", ctypes.c_uint32),
            ("faults", ctypes.c_uint32),
            *((name, ctypes.c_size_t) for name in ("peak", "now", "a", "b", "c", "d", "page", "page_peak")),
        ]

    counters = Counters()
    counters.size = ctypes.sizeof(Counters)
    windll = getattr(ctypes, "windll")  # noqa: B009 - the name exists on Windows only
    windll.kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(windll.kernel32.GetCurrentProcess())
    windll.kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size)
    return int(counters.now), int(counters.peak)


# ------------------------------------------------------------------------------------------------------------------ CPU


def _command(*words: str) -> str:
    """Output of a short system command, "" if there is no such command."""
    import subprocess

    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _cpuinfo(root: Path) -> dict[str, str]:
    """Fields of the first CPU in /proc/cpuinfo, lower-case names; empty elsewhere than on Linux."""
    found: dict[str, str] = {}
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, separator, value = line.partition(":")
        if separator:
            found.setdefault(name.strip().lower(), value.strip())
    return found


def cpu_name(*, root: Path = Path("/")) -> str:
    """The CPU as its vendor calls it, or its architecture."""
    info = _cpuinfo(root)
    name = info.get("model name") or info.get("hardware")
    if not name and sys.platform == "darwin":
        name = _command("sysctl", "-n", "machdep.cpu.brand_string")
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
    found = {name for name, key in arm.items() if _command("sysctl", "-n", f"hw.optional.arm.{key}") == "1"}
    x86 = {"sse4_2": "sse4_2", "avx": "avx1_0", "avx2": "avx2_0", "fma": "fma", "avx512f": "avx512f"}
    found |= {name for name, key in x86.items() if _command("sysctl", "-n", f"hw.optional.{key}") == "1"}
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


def package_folder(distribution: str) -> Path | None:
    """Folder into which a distribution was installed, None if it is not installed."""
    import importlib.metadata

    try:
        return Path(str(importlib.metadata.distribution(distribution).locate_file(""))).resolve()
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """This machine as records name it (JSON values): two records are comparable where these agree."""
    versions = {name: package_version(name) for name in _PACKAGES}
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": threads(),
        "features": sorted(cpu_features()),
        "memory_bytes": _physical_bytes(),
        "available_bytes": memory_bytes(),
        "gpus": list(cuda().devices),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {name: version for name, version in versions.items() if version is not None},
    }
