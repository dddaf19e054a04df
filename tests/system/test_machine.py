"""Threads and memory on made-up control groups; facts of this machine held against other sources."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import unet_rt
from unet_rt.system import facts as machine
from unet_rt.system import limits

GIB = 1 << 30
linux = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version2(root: Path, member: str, mount_root: str = "/", **levels: dict[str, str]) -> Path:
    """A version 2 tree. ``levels``: folder ("top", or its path with _ for /) -> {file name: content}."""
    mount = f"30 23 0:26 {mount_root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    files = {
        "proc/self/cgroup": f"0::{member}\n",
        "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda rw\n" + mount,
    }
    for level, contents in levels.items():
        folder = "" if level == "top" else level.replace("_", "/") + "/"
        files |= {f"sys/fs/cgroup/{folder}{name}": text for name, text in contents.items()}
    return write(root, files)


def version1(root: Path, member: str, mount_root: str = "/", **folders: dict[str, str]) -> Path:
    """A version 1 tree: controllers cpu,cpuacct and memory with the same member path."""
    mounts = "".join(
        f"{30 + k} 25 0:{k} {mount_root} /sys/fs/cgroup/{name} rw shared:{k} - cgroup cgroup rw,{name}\n"
        for k, name in enumerate(("cpu,cpuacct", "memory"))
    )
    groups = f"9:memory:{member}\n4:cpu,cpuacct:{member}\n1:name=systemd:/init.scope\n0::/init.scope\n"
    files = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts}
    for folder, contents in folders.items():
        controller, *path = folder.split("_")
        name = {"cpu": "cpu,cpuacct"}.get(controller, controller)
        files |= {"/".join(["sys/fs/cgroup", name, *path, file]): text for file, text in contents.items()}
    return write(root, files)


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the affinity mask hold eight CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


# -------------------------------------------------------------------------------------------------------------- threads


@linux
@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("text", "threads"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),  # one and a half: two threads use it up
        ("50000 100000\n", 1),
        ("1000 100000\n", 1),
        ("9900000 100000\n", 8),
        ("garbage\n", 8),
        ("", 8),
    ],
)
def test_quota_of_version_2(text: str, threads: int, tmp_path: Path) -> None:
    root = version2(tmp_path, "/pod", pod={"cpu.max": text})
    assert limits.threads(root=root) == threads


@linux
@given(quota=st.integers(1_000, 10_000_000), period=st.integers(1_000, 1_000_000))
def test_quota_is_rounded_up_and_at_most_the_affinity(
    quota: int, period: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = version2(tmp_path_factory.mktemp("cgroup"), "/", top={"cpu.max": f"{quota} {period}\n"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
        assert limits.threads(root=root) == max(1, min(8, math.ceil(quota / period)))


@linux
@pytest.mark.usefixtures("eight_cpus")
def test_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    root = version2(
        tmp_path,
        "/slurm/job/step",
        slurm={"cpu.max": "max 100000\n"},
        slurm_job={"cpu.max": "300000 100000\n"},
        slurm_job_step={"cpu.max": "500000 100000\n"},
    )
    assert limits.threads(root=root) == 3


@linux
@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(("quota", "threads"), [("-1", 8), ("250000", 3), ("100000", 1)])
def test_quota_of_version_1(quota: str, threads: int, tmp_path: Path) -> None:
    files = {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": "100000\n"}
    root = version1(tmp_path, "/docker/abc", cpu_docker_abc=files)
    assert limits.threads(root=root) == threads


@linux
@pytest.mark.usefixtures("eight_cpus")
def test_a_container_that_sees_the_host_s_path(tmp_path: Path) -> None:
    # Docker without a cgroup namespace: membership by the host's path, the mount shows that group as its top.
    files = {"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n"}
    assert limits.threads(root=version1(tmp_path / "a", "/docker/abc", "/docker/abc", cpu=files)) == 4
    # A namespace that does not contain the process writes "..", and only the top is known.
    root = version2(tmp_path / "b", "/../../other", top={"cpu.max": "500000 100000\n"})
    assert limits.threads(root=root) == 5
    # A group whose name begins like the mount's root is not inside it.
    root = version2(tmp_path / "c", "/docker/abcdef", "/docker/abc", top={"cpu.max": "600000 100000\n"})
    assert limits.threads(root=root) == 6


@linux
@pytest.mark.usefixtures("eight_cpus")
def test_without_control_groups_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits.threads(root=tmp_path) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert limits.threads(root=tmp_path) == 1


def test_systems_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert limits.threads(root=tmp_path) == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert limits.threads(root=tmp_path) == 1


@linux
def test_the_real_affinity_is_followed() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from unet_rt.system import limits; "
    code += "print(limits.threads())"
    package = str(Path(unet_rt.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"


# --------------------------------------------------------------------------------------------------------------- memory


def meminfo(root: Path, available: int) -> Path:
    text = f"MemTotal:       {64 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable:   {available // 1024} kB\n"
    return write(root, {"proc/meminfo": text})


@linux
@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "max", "memory.current": str(9 * GIB)}, 20 * GIB),
        ({"memory.max": str(8 * GIB), "memory.current": str(3 * GIB)}, 5 * GIB),
        (
            # 2 of the 3 GiB are page cache, which the kernel takes back.
            {
                "memory.max": str(8 * GIB),
                "memory.current": str(3 * GIB),
                "memory.stat": f"anon 5\ninactive_file {2 * GIB}\n",
            },
            7 * GIB,
        ),
        ({"memory.max": str(8 * GIB), "memory.high": str(4 * GIB), "memory.current": str(GIB)}, 3 * GIB),
        ({"memory.max": str(8 * GIB), "memory.current": str(9 * GIB)}, 0),
        ({"memory.max": str(90 * GIB), "memory.current": str(GIB)}, 20 * GIB),
        ({"memory.max": str(8 * GIB)}, 20 * GIB),
    ],
)
def test_memory_of_version_2(files: dict[str, str], left: int, tmp_path: Path) -> None:
    root = meminfo(version2(tmp_path, "/pod", pod=files), 20 * GIB)
    assert limits.memory_bytes(root=root) == left


@linux
def test_memory_of_version_1(tmp_path: Path) -> None:
    unlimited = {"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": f"{30 * GIB}\n"}
    root = meminfo(version1(tmp_path, "/job", memory=unlimited, memory_job=unlimited), 20 * GIB)
    assert limits.memory_bytes(root=root) == 20 * GIB
    bounded = {
        "memory.limit_in_bytes": f"{6 * GIB}\n",
        "memory.usage_in_bytes": f"{4 * GIB}\n",
        "memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
    }
    version1(tmp_path, "/job", memory=unlimited, memory_job=bounded)
    assert limits.memory_bytes(root=root) == 3 * GIB


@linux
def test_memory_of_this_machine() -> None:
    record = machine.describe()
    assert 16 << 20 < limits.memory_bytes() <= record["memory_bytes"]
    assert record["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_looked_at_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, left = [1000.0], [5]
    monkeypatch.setattr(limits, "_read", (-math.inf, 0))
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(limits, "memory_bytes", lambda: left[0])
    assert limits.recent_memory_bytes() == 5
    left[0], now[0] = 7, now[0] + 0.5
    assert limits.recent_memory_bytes() == 5
    now[0] += 1
    assert limits.recent_memory_bytes() == 7


def test_resident_memory_follows_allocations() -> None:
    size = 96 << 20
    before, peak_before = limits.rss_bytes(), limits.peak_rss_bytes()
    block = np.ones(size, np.uint8)
    during = limits.rss_bytes()
    del block
    after = limits.rss_bytes()
    assert during - before > 0.9 * size
    assert during - after > 0.9 * size
    assert limits.peak_rss_bytes() >= max(peak_before, during - (4 << 20))


@linux
def test_a_child_does_not_inherit_the_peak() -> None:
    block = np.ones(256 << 20, np.uint8)
    code = "from unet_rt.system import limits; print(limits.peak_rss_bytes())"
    package = str(Path(unet_rt.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < block.nbytes


# ------------------------------------------------------------------------------------------------------------------ CPU

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8480C
flags\t\t: fpu sse4_2 avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile hypervisor

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
GRAVITON = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd aes asimddp sve i8mm bf16\nCPU part\t: 0xd40\n"


def test_cpu_of_linux(tmp_path: Path) -> None:
    root = write(tmp_path / "xeon", {"proc/cpuinfo": XEON})
    assert machine.cpu_name(root=root) == "Intel(R) Xeon(R) Platinum 8480C"
    wanted = {"sse4_2", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile"}
    assert machine.cpu_features(root=root) == wanted
    root = write(tmp_path / "graviton", {"proc/cpuinfo": GRAVITON})
    assert machine.cpu_features(root=root) == {"asimd", "asimddp", "sve", "i8mm", "bf16"}
    assert machine.cpu_name(root=root)


@linux
def test_features_agree_with_numpy() -> None:
    package = "numpy._core" if importlib.util.find_spec("numpy._core") else "numpy.core"  # NumPy 2, 1
    known = importlib.import_module(f"{package}._multiarray_umath").__cpu_features__
    features = machine.cpu_features()
    for ours, theirs in (("avx2", "AVX2"), ("avx512f", "AVX512F"), ("asimd", "ASIMD"), ("sse4_2", "SSE42")):
        if theirs in known:
            assert (ours in features) == known[theirs], ours


# --------------------------------------------------------------------------------------------------------------- NVIDIA


class Driver:
    """A CUDA driver library of two GPUs, or of a status."""

    def __init__(self, status: int = 0, names: tuple[str, ...] = ("NVIDIA H200", "NVIDIA T4")) -> None:
        self.status, self.names = status, names

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuGetErrorString(self, status: int, text: Any) -> int:
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"no CUDA-capable device is detected"
        return 0

    def cuDriverGetVersion(self, number: Any) -> int:
        ctypes.cast(number, ctypes.POINTER(ctypes.c_int))[0] = 13010
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = len(self.names)
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_int))[0] = index
        return 0

    def cuDeviceGetName(self, buffer: Any, size: int, handle: Any) -> int:
        buffer.value = self.names[handle.value].encode()
        return 0


@pytest.mark.parametrize(
    ("driver", "wanted"),
    [
        (Driver(), machine.Cuda(("NVIDIA H200", "NVIDIA T4"), "13.1", None)),
        (
            Driver(status=100),
            machine.Cuda(
                (),
                "",
                "the NVIDIA driver found no usable GPU (cuInit: error 100, no CUDA-capable device is detected)",
            ),
        ),
        (
            Driver(names=()),
            machine.Cuda((), "13.1", "the NVIDIA driver lists no GPU (CUDA_VISIBLE_DEVICES may hide it)"),
        ),
    ],
)
def test_what_the_driver_says(driver: Driver, wanted: machine.Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    machine.cuda.cache_clear()
    try:
        assert machine.cuda() == wanted
    finally:
        machine.cuda.cache_clear()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    machine.cuda.cache_clear()
    try:
        found = machine.cuda()
        assert found.devices == ()
        assert found.missing is not None
        assert "no NVIDIA driver is installed" in found.missing
    finally:
        machine.cuda.cache_clear()


@pytest.mark.gpu
def test_the_real_driver() -> None:
    found = machine.cuda()
    assert found.devices
    assert found.missing is None
    assert all(found.devices)


def test_the_record_is_json_and_imports_nothing_heavy() -> None:
    record = machine.describe()
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["numpy"] == np.__version__
    assert record["threads"] <= record["cores"]
    code = "import sys; from unet_rt.system import facts; facts.describe(); "
    code += "print({'torch', 'openvino', 'onnxruntime', 'onnx'} & set(sys.modules))"
    package = str(Path(unet_rt.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"
