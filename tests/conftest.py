"""What all tests share: markers for optional libraries and devices, and the folder of real data.

A test whose library, device or data is missing is skipped with the reason. ``UNET_RT_REQUIRE`` names, separated by
commas, what may not be missing (``gpu``, ``vulkan``, a library's marker, ``shared``): there a skip is a failure.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

LIBRARIES = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
    "ncnn": ("pnnx",),  # its converter, without which there is nothing to run
    "monai": ("monai",),
    "nnunet": ("nnunetv2",),
}
SHARED = Path(__file__).resolve().parents[2] / "shared"


def required() -> set[str]:
    """What ``UNET_RT_REQUIRE`` names; an unknown name is an error, so that a typing slip does not switch it off."""
    names = {name.strip() for name in os.environ.get("UNET_RT_REQUIRE", "").split(",")} - {""}
    known = {*LIBRARIES, "gpu", "vulkan", "shared"}
    if unknown := names - known:
        raise pytest.UsageError(f"UNET_RT_REQUIRE names {sorted(unknown)}; known are {sorted(known)}")
    return names


@cache
def gpu_missing() -> str | None:
    """Why there is no CUDA device, asked of the driver itself; None if there is one."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return f"no CUDA driver ({name} cannot be loaded)"
    if code := driver.cuInit(0):
        return f"the CUDA driver does not start (cuInit returned {code})"
    count = ctypes.c_int(0)
    if code := driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"the CUDA driver does not count its devices (cuDeviceGetCount returned {code})"
    return None if count.value else "the CUDA driver sees no device"


@cache
def vulkan_missing() -> str | None:
    """Why there is no Vulkan device; None if there is one. Mesa's software device goes first where it is installed."""
    drivers = sorted(Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
    if drivers:
        os.environ.setdefault("VK_DRIVER_FILES", str(drivers[0]))
    from unet_rt.backends.ncnn.library import vulkan_devices

    if vulkan_devices():
        return None
    return "Vulkan lists no device; apt-get install mesa-vulkan-drivers brings one in software"


def missing(marker: str) -> str | None:
    """Why a test with this marker cannot run here; None if it can."""
    if marker == "gpu":
        return gpu_missing()
    if marker == "vulkan":
        return vulkan_missing()
    modules = LIBRARIES[marker]
    if any(find_spec(module) for module in modules):
        return None
    return f"{' or '.join(modules)} is not installed"


def pytest_configure(config: pytest.Config) -> None:
    """Check ``UNET_RT_REQUIRE`` before anything runs."""
    required()


def pytest_report_header() -> str:
    """Say which unet_rt is tested: the installed one, or a source tree on the path."""
    spec = find_spec("unet_rt")
    where = "not found" if spec is None else spec.origin or "a folder without __init__.py"
    return f"unet_rt: {where}; required: {', '.join(sorted(required())) or 'nothing'}; shared data: {SHARED.is_dir()}"


def skip_or_fail(name: str, reason: str) -> NoReturn:
    """Skip for want of something, or fail where it is required."""
    if name in required():
        pytest.fail(f"UNET_RT_REQUIRE names {name}, but {reason}", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here."""
    for marker in ("gpu", "vulkan", *LIBRARIES):
        if item.get_closest_marker(marker) and (reason := missing(marker)):
            skip_or_fail(marker, reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a GPU is required, a GPU test that skips itself, for whatever reason, is a failure, too."""
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    no_data = "shared" in getattr(item, "fixturenames", ()) and not SHARED.is_dir()
    if skipped and not no_data and item.get_closest_marker("gpu") and "gpu" in required():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"UNET_RT_REQUIRE names gpu, but the test was skipped: {reason}"
    return report


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real images and trained networks beside the repository: ``data/`` and ``models/``."""
    if not SHARED.is_dir():
        skip_or_fail("shared", f"there is no real data: {SHARED} does not exist")
    return SHARED


@pytest.fixture(scope="session")
def sample_images() -> list[NDArray[np.uint16]]:
    """Three drawn micrographs of odd sizes: realistic pixels for the network that ships with the package."""
    from unet_rt.drawing.microscopy import microscopy

    return [microscopy(shape, seed=seed).image for seed, shape in enumerate([(300, 260), (211, 330), (257, 257)], 500)]


@pytest.fixture(scope="session")
def engine_folder(tmp_path_factory: pytest.TempPathFactory, sample_images: list[NDArray[np.uint16]]) -> Path:
    """An FP32 engine of the shipped network in ONNX Runtime, proven on ``sample_images``. Read it, do not change it."""
    import unet_rt as urt
    from unet_rt.cli.demo import shipped_model

    folder = tmp_path_factory.mktemp("engine") / "nuclei.urt"
    urt.build(
        shipped_model(), samples=sample_images, out=folder, backend="onnxruntime", precision="fp32", tile=(192, 192)
    ).close()
    return folder


@pytest.fixture(scope="session")
def exact_folder(engine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same engine with its exact halo (its own was measured, tiles of 192 px being small): tiles leave no seams."""
    from unet_rt.engine.folder import read_folder
    from unet_rt.engine.write import write_folder

    opened = read_folder(engine_folder)
    folder = tmp_path_factory.mktemp("exact") / "exact.urt"
    spec = replace(opened.spec, halo="exact", halo_limit=None)
    write_folder(folder, spec, {kind: opened.file(kind) for kind in opened.files})
    return folder
