"""What nvcc makes of the CUDA kernels, interpreted (``ptx.py``): the bodies' tests again, and how memory is accessed.

The branches for devices run here, which the bodies on the host leave out; every access is checked for alignment, for
its array's bounds and for races. What interpretation would make take minutes is left to the bodies and to devices.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_kernels as cpu
import test_kernels_cuda as cuda
from device_kernels import DeviceKernels, WatchedMemory, device_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

import unet_rt

SLOW = {
    "test_stitch_geometry", "test_gather_geometry", "test_exp_is_accurate_over_its_whole_range", "test_gather_layouts",
    "test_gather_borders",
}  # fmt: skip
globals().update({name: getattr(cpu, name) for name in cuda.SAME_AS_ON_THE_CPU if name not in SLOW})
# Copies: settings belong to a function, and these functions to other modules, too.
test_gather_geometry, test_stitch_geometry = (
    settings(deadline=None, max_examples=15)(given(data=st.data())(test.hypothesis.inner_test))  # type: ignore[attr-defined]
    for test in (cpu.test_gather_geometry, cpu.test_stitch_geometry)
)
test_same_bits_as_the_cpu = cuda.test_same_bits_as_the_cpu
test_tables_that_nobody_could_check = cuda.test_tables_that_nobody_could_check
test_channels_last_crop_concat = cuda.test_channels_last_crop_concat


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[DeviceKernels]:
    """Also what ``kernels`` means to the tests of the CPU kernels."""
    with device_kernels("compiled") as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "kernels", found)
        yield found


@pytest.mark.parametrize("layout", cpu.LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_gather_layouts(layout: str, dtype: str) -> None:
    cpu.test_gather_layouts(layout, dtype, 3)


@pytest.mark.parametrize("border", cpu.BORDERS)
def test_gather_borders(border: str) -> None:
    cpu.test_gather_borders(border, (9, 14))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_every_byte_is_divided_as_if_by_division(device: DeviceKernels, dtype: str) -> None:
    cuda.test_every_small_integer_is_divided_as_if_by_division(device, dtype, "float32")


@pytest.mark.parametrize("axes", [1, 2])
def test_tables_on_the_device(device: DeviceKernels, axes: int) -> None:
    cuda.test_tables_on_the_device(device, axes)


@pytest.fixture
def counts(device: DeviceKernels) -> Any:
    """Accesses since the test began, by kind and bytes."""
    assert issubclass(device.memory, WatchedMemory)
    found = device.memory.watch.counts
    found.clear()
    return found


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Pixels or zeros at a multiple of 16 bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 16, np.uint8)
    start = -memory.ctypes.data % 16
    array = memory[start : start + size].view(dtype).reshape(shape)
    array[...] = cpu.pixels(shape, dtype)
    return array


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_gather_takes_sixteen_bytes_at_once(
    device: DeviceKernels, counts: Any, dtype: str, out_dtype: str, start: int
) -> None:
    """Of the wider of window and tile, wherever in the window the tile begins."""
    out = aligned((2, 1, 32, 64), out_dtype)
    window = aligned((1, 40, 80), dtype)
    device.tile_gather(window, [[0, start], [4, 8 + start]], out, offset=3.0, divisor=7.0)
    samples = 16 // max(window.itemsize, out.itemsize)
    written = {size: count for (what, size), count in counts.items() if what == "store"}
    assert written == {samples * out.itemsize: out.size // samples}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("op", cpu.OPS)
def test_stitch_takes_sixteen_bytes_at_once(device: DeviceKernels, counts: Any, dtype: str, op: Any) -> None:
    """Of the wider of tiles and result; where softmax reads its channels three times, that comes from the cache."""
    tiles = aligned((2, 1 if op == "threshold" else 3, 32, 64), dtype)
    kind = np.uint8 if op in ("argmax", "threshold") else np.float32
    out = aligned((*(() if op == "argmax" else (tiles.shape[1],)), 64, 64), np.dtype(kind).name)
    part = ([[0, 0], [0, 0]], [[0, 0], [32, 0]], [[32, 64], [32, 64]])
    device.tile_stitch(tiles, *part, out, op=op, **({"threshold": 0.5} if op == "threshold" else {}))
    samples = 16 // max(tiles.itemsize, out.itemsize)  # of a vector
    assert set(counts) == {("read-only load", samples * tiles.itemsize), ("store", samples * out.itemsize)}
    assert counts["store", samples * out.itemsize] * samples == out.size


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_crop_concat_copies_sixteen_bytes_at_once(
    device: DeviceKernels, counts: Any, dtype: str, channels_last: bool
) -> None:
    def made(channels: int, side: int) -> np.ndarray[Any, Any]:
        if channels_last:
            return np.moveaxis(aligned((1, side, side, channels), dtype), -1, 1)
        return aligned((1, channels, side, side), dtype)

    skip, up, out = made(32, 80), made(32, 48), made(64, 48)
    device.crop_concat(skip, up, out)
    assert counts["store", 16] * 16 == out.nbytes
    read = {size: count * size for (what, size), count in counts.items() if what == "read-only load"}
    assert read[16] >= out.nbytes // 2  # the centre of the skip connection begins 16 samples into its rows
    np.testing.assert_array_equal(out, np.concatenate([skip[:, :, 16:64, 16:64], up], 1))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("offset", [12, 14, 15])
def test_crop_concat_copies_small_elements_in_groups(
    device: DeviceKernels, counts: Any, dtype: str, offset: int
) -> None:
    """Rows of 44 elements are no whole vectors; what is left over goes by words where places are multiples of them."""
    skip, up, out = aligned((1, 3, 60, 72), dtype), aligned((1, 2, 44, 44), dtype), aligned((1, 5, 44, 44), dtype)
    device.crop_concat(skip, up, out, offset=(8, offset))
    written = {size for what, size in counts if what == "store"}
    assert min(written) == next(n for n in (4, 2, 1) if offset * skip.itemsize % n == 0)
    np.testing.assert_array_equal(out, np.concatenate([skip[:, :, 8:52, offset : offset + 44], up], 1))


def test_machine_code_takes_no_bits_for_numbers() -> None:
    """What PTX cannot show: the assembler has made a conversion to integer (F2I.U8.F16) of a float16's low byte.

    That byte was to be stored alone (ptxas 13.0; on an H200 such results lost it), while no kernel converts float16 to
    integers.
    """
    found = [*Path(unet_rt.__file__).parent.glob("*unet_rt_cuda.*")]
    library = next((path for path in found if path.suffix in (".so", ".dll")), None)
    if library is None:
        pytest.skip("the library of the CUDA kernels is not built")
    folder = next(
        (Path(p) / "nvidia" / "cu13" / "bin" for p in sys.path if (Path(p) / "nvidia/cu13/bin/nvdisasm").is_file()),
        None,
    )
    tool = shutil.which("cuobjdump", path=None if folder is None else str(folder))
    if tool is None:
        pytest.skip("there is no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    search = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
    code = subprocess.run(
        [tool, "-sass", str(library)], env={**os.environ, "PATH": search}, capture_output=True, text=True, check=True
    ).stdout
    assert code.count("Function : ") > 40
    assert not re.findall(r"F2I[A-Z0-9.]*\.F16", code)
