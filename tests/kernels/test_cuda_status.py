"""A CPU build survives whatever ``nvcc`` it meets, and says what was wrong (cmake/CudaStatus.cmake)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
include("{module}")
unet_rt_cuda_status(status {wanted})
file(WRITE status.txt "${{status}}")
"""
COMPILERS = {
    "its toolkit is gone": ("exec /opt/cuda-0/bin/nvcc", "/opt/cuda-0/bin/nvcc: not found"),
    "refuses the host compiler": (
        "echo 'host_config.h:143:2: error: #error -- unsupported GNU version!' >&2; exit 1",
        "unsupported GNU version",
    ),
    "does nothing": ("exit 0", "compiles nothing"),
}


def status(folder: Path, wanted: str, compiler: str) -> tuple[str | None, str]:
    """(status or None where configuring failed, output of CMake) with ``compiler`` as the CUDA compiler."""
    cmake = shutil.which("cmake")
    if cmake is None or not (ROOT / "cmake/CudaStatus.cmake").is_file():
        pytest.skip("needs cmake and the source tree")
    (folder / "try.cmake").write_text(SCRIPT.format(module=(ROOT / "cmake/CudaStatus.cmake").as_posix(), wanted=wanted))
    environment = {**os.environ, "CUDACXX": compiler}
    done = subprocess.run(
        [cmake, "-P", "try.cmake"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    found = folder / "status.txt"
    return (found.read_text() if found.exists() else None), " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(os.name == "nt", reason="the odd compilers are shell scripts")
@pytest.mark.parametrize("case", COMPILERS)
def test_odd_compiler(case: str, tmp_path: Path) -> None:
    script, reason = COMPILERS[case]
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    found, _ = status(tmp_path, "AUTO", str(compiler))
    assert found is not None
    assert found.startswith(f"the CUDA compiler {compiler} was tried and does not work")
    assert reason in found
    (tmp_path / "status.txt").unlink()
    found, output = status(tmp_path, "ON", str(compiler))
    assert found is None
    assert "UNET_RT_CUDA=ON, but the CUDA module cannot be built" in output
    assert reason in output


def test_missing_compiler_and_off(tmp_path: Path) -> None:
    found, _ = status(tmp_path, "AUTO", str(tmp_path / "nowhere"))
    assert found is not None
    assert "does not work" in found
    found, _ = status(tmp_path, "OFF", str(tmp_path / "nowhere"))
    assert found == "switched off when this was built (UNET_RT_CUDA=OFF)"
