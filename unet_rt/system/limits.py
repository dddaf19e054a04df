"""Threads and memory that this process may use: affinity, quotas, cgroups."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import sys
import time
from functools import cache
from pathlib import Path

RECENT_S = 1.0  # the files that say what memory is left take half as long as a small picture
_ROOT = Path("/")

# ------------------------------------------------------------------------------------------------------ control groups


def read_text(path: Path) -> str | None:
    """Content of a small file, None if it does not exist or may not be read."""
    try:
        return path.read_text()
    except OSError:
        return None


def _unescape(field: str) -> str:
    """A path field of mountinfo: blanks are written as ``\\040``."""
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _cgroups(controller: str, root: Path) -> tuple[tuple[int, Path], ...]:
    """(version, folder) of every control group that bounds this process, from its own up to the top that is visible.

    A process stays in its group: its folders are looked for once.
    """
    return _own_cgroups(controller) if root == _ROOT else _find_cgroups(controller, root)


@cache
def _own_cgroups(controller: str) -> tuple[tuple[int, Path], ...]:
    return _find_cgroups(controller, _ROOT)


def _find_cgroups(controller: str, root: Path) -> tuple[tuple[int, Path], ...]:
    """As :func:`_cgroups`, from the files below ``root``.

    A quota of any ancestor holds too. Inside a container the path in /proc/self/cgroup may be the host's while the
    mount shows a part of the tree; mountinfo's root field says which.
    """
    memberships: dict[str, str] = {}  # controller ("" for version 2) -> path in the hierarchy
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            memberships[name] = path
    folders: list[tuple[int, Path]] = []
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
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
    return tuple(folders)


def _quota(root: Path) -> float | None:
    """CPUs that the control groups allow (1.5 = three halves of a core), None without a quota."""
    quotas: list[float] = []
    for version, folder in _cgroups("cpu", root):
        if version == 2:
            fields = (read_text(folder / "cpu.max") or "").split()
        else:
            fields = [read_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if len(fields) != 2:
            continue
        try:
            quota, period = int(fields[0]), int(fields[1])
        except ValueError:  # "max": no quota at this level
            continue
        if quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def threads(*, root: Path = _ROOT) -> int:
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


def _value(text: str | None, name: str) -> int | None:
    """The number in the line ``name value`` or ``name: value kB``; None where there is none."""
    found = re.search(rf"^{name}:?\s+(\d+)", text or "", re.MULTILINE)
    return int(found[1]) if found else None


def _cgroup_memory(root: Path) -> int | None:
    """Bytes left below the tightest memory limit of the control groups, None without a limit."""
    left: list[int] = []
    for version, folder in _cgroups("memory", root):
        names: tuple[str, ...] = ("memory.max", "memory.high")
        usage, files = "memory.current", "inactive_file"
        if version == 1:
            names = ("memory.limit_in_bytes",)
            usage, files = "memory.usage_in_bytes", "total_inactive_file"
        texts = [(read_text(folder / name) or "").strip() for name in names]
        bounds = [
            int(text) for text in texts if text.isdigit() and int(text) < 1 << 60
        ]  # version 1: none is about 2^63
        used = read_text(folder / usage) if bounds else None
        if used is None or not used.strip().isdigit():
            continue
        # The kernel gives the page cache of files back before it kills anybody.
        reclaimable = _value(read_text(folder / "memory.stat"), files) or 0
        left += [max(bound - max(int(used) - reclaimable, 0), 0) for bound in bounds]
    return min(left, default=None)


def memory_bytes(*, root: Path = _ROOT) -> int:
    """Bytes that this process may still allocate: memory available, at most what the control groups leave."""
    meminfo = read_text(root / "proc/meminfo")
    kilobytes = _value(meminfo, "MemAvailable")
    if kilobytes is None:
        kilobytes = _value(meminfo, "MemFree")
    if kilobytes is not None:
        available = kilobytes * 1024
    else:
        available = _windows_memory() if sys.platform == "win32" else physical_bytes()
    limit = _cgroup_memory(root)
    return available if limit is None else min(available, limit)


_read: tuple[float, int] = (-math.inf, 0)  # when memory was looked at for recent_memory_bytes, and what was left


def recent_memory_bytes() -> int:
    """What :func:`memory_bytes` gave within the last second: for callers that ask for every small picture."""
    global _read
    now = time.monotonic()
    if now - _read[0] > RECENT_S:
        _read = (now, memory_bytes())
    return _read[1]


def physical_bytes() -> int:
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
    statm = read_text(Path("/proc/self/statm"))
    if statm is not None:
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return _windows_rss()[0]
    listed = command("ps", "-o", "rss=", "-p", str(os.getpid()))
    return int(listed) * 1024 if listed.isdigit() else peak_rss_bytes()


def release_memory() -> None:
    """Gives freed memory back to the system, where the C library keeps it for later."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # of glibc alone
            ctypes.CDLL(None).malloc_trim(0)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    # Not getrusage where this exists: Linux carries ru_maxrss through execve, so a small child of a big parent
    # reports its parent's peak.
    peak = _value(read_text(Path("/proc/self/status")), "VmHWM")
    if peak is not None:
        return peak * 1024
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


def command(*words: str) -> str:
    """Output of a short system command, "" if there is no such command."""
    import subprocess

    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
