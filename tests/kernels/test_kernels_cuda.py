"""The CUDA kernels: the tests of the CPU kernels again, and what devices have besides.

``bodies`` runs the bodies of the kernels on the host (module ``_cuda_host``), ``device`` the kernels themselves.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flat_kernels as kernels
import numpy as np
import pytest
import reference
import test_kernels as cpu
from device_kernels import DeviceKernels, device_kernels, host_module
from hypothesis import given, settings
from hypothesis import strategies as st
from watched_kernels import BEYOND

import unet_rt
from unet_rt.errors import BackendError, ImageError, OutputError, TileError
from unet_rt.kernels import native

SAME_AS_ON_THE_CPU = [
    name
    for name in dir(cpu)
    if name.startswith(("test_gather", "test_stitch", "test_blend", "test_crop", "test_labels", "test_exp"))
    and not name.endswith("_errors")
]
assert len(SAME_AS_ON_THE_CPU) >= 23
globals().update({name: getattr(cpu, name) for name in SAME_AS_ON_THE_CPU})
# A device's first example waits for its kernels to be loaded. Copies: settings belong to a function.
test_gather_geometry, test_stitch_geometry = (
    settings(deadline=None)(given(data=st.data())(test.hypothesis.inner_test))  # type: ignore[attr-defined]
    for test in (cpu.test_gather_geometry, cpu.test_stitch_geometry)
)


@pytest.fixture(
    scope="module", autouse=True, params=["bodies", pytest.param("device", marks=[pytest.mark.gpu, pytest.mark.torch])]
)
def device(request: pytest.FixtureRequest) -> Iterator[DeviceKernels]:
    """Also what ``kernels`` means to the tests of the CPU kernels."""
    with device_kernels(request.param) as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "kernels", found)
        yield found


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
def test_every_small_integer_is_divided_as_if_by_division(device: DeviceKernels, dtype: str, out_dtype: str) -> None:
    """The kernel multiplies by the reciprocal and corrects: the bits of the quotient, for all pixels, many divisors."""
    info = np.iinfo(dtype)
    every = np.arange(info.min, info.max + 1, dtype=dtype)
    rng = np.random.default_rng(0)
    divisors = [255.0, 65535.0, 3.0, -7.0, 1e-12, -1e12, np.nextafter(np.float32(2), np.float32(0)), 2.0**-40, 1.0]
    divisors += (rng.standard_normal(23) * 10.0 ** rng.uniform(-6, 6, 23)).tolist()
    offsets = [0.0, -0.0, 0.1, -1e5, 17.0, 2.0**-41, 1e13, *rng.uniform(-300, 300, 25)]
    clips = [(-np.inf, np.inf), (-np.inf, 99.9), (0.1, 200.0), (-0.0, np.inf)] * 8
    window = np.broadcast_to(every, (len(divisors), 1, every.size))
    options: dict[str, Any] = {
        "offset": np.float32(offsets),
        "divisor": np.float32(divisors),
        "clip": ([low for low, _ in clips], [high for _, high in clips]),
    }
    found, expected = (np.zeros((1, len(divisors), 1, every.size), out_dtype) for _ in range(2))
    device.tile_gather(window, [[0, 0]], found, **options)
    kernels.tile_gather(window, [[0, 0]], expected, **options)
    np.testing.assert_array_equal(found.view(f"u{found.itemsize}"), expected.view(f"u{found.itemsize}"))


@pytest.mark.parametrize("op", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("width", [64, 61])  # rows of all channels alike within 16 bytes, and not
def test_same_bits_as_the_cpu(device: DeviceKernels, op: Any, dtype: str, width: int) -> None:
    tiles = (np.random.default_rng(1).standard_normal((2, 5, 20, width)) * 8).astype(dtype)
    part = ([[0, 0], [3, 2]], [[0, 0], [20, 1]], [[20, width], [17, width - 3]])
    found, expected = (np.zeros((5, 37, width), np.float32) for _ in range(2))
    device.tile_stitch(tiles, *part, found, op=op)
    kernels.tile_stitch(tiles, *part, expected, op=op)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    total, weight = np.abs(expected) * 3 + 1, np.random.default_rng(2).uniform(0.1, 4, (37, width)).astype(np.float32)
    device.blend_finish(total, weight, found, op=op)
    kernels.blend_finish(total, weight, expected, op=op)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_more_than_a_launch_takes(device: DeviceKernels) -> None:
    """Tiles, channels and thresholds beyond one launch's parameters; more planes than blocks."""
    window = cpu.pixels((37, 30, 41), "uint8")
    starts = [[y, x] for y in range(-8, 25, 4) for x in range(-9, 36, 6)]
    assert len(starts) > 64
    options = {"offset": np.arange(37), "divisor": np.arange(1, 38)}
    out = np.zeros((len(starts), 37, 8, 11), np.float16)
    device.tile_gather(window, starts, out, **options)
    cpu.same(out, reference.tile_gather(window, starts, (8, 11), np.float16, **options)[0])
    tiles = cpu.pixels((70, 130, 2, 5), "float32")
    table = np.array([[2 * (n // 7), 5 * (n % 7)] for n in range(70)])
    parts = (table * 0, table, table * 0 + [2, 5])
    for op in cpu.EXACT_OPS:
        cpu.check_stitch(tiles, *parts, (20, 35), op, **({"threshold": np.arange(130)} if op == "threshold" else {}))
    cpu.check_blend(tiles, *parts, (20, 35))
    overlapping = np.array([[n % 5, n % 11] for n in range(70)])
    cpu.check_blend(tiles[:, :3], table * 0, overlapping, parts[2], (7, 16))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_tables_on_the_device(device: DeviceKernels, axes: int) -> None:
    """The same results, for as many tiles as there are."""
    on_device = DeviceKernels(device.memory, tables=True)
    window = cpu.pixels((2, *(14, 23, 18)[:axes]), "uint16")
    tile = (6, 9, 5)[:axes]
    starts = list(itertools.product(*[range(-4, 12, 3)] * axes))
    out = np.zeros((len(starts), 2, *tile), np.float32)
    on_device.tile_gather(window, starts, out, divisor=3.0)
    cpu.same(out, reference.tile_gather(window, starts, tile, divisor=3.0)[0])
    size = np.array([[max(t - n % 3, 0) for t in tile] for n in range(len(starts))])
    target = np.array(starts) + 4
    spatial = tuple(int(s) for s in (target + tile).max(axis=0))
    tiles = cpu.pixels(out.shape, "float32")
    found, expected = ((np.zeros((2, *spatial), "f4"), np.zeros(spatial, "f4")) for _ in range(2))
    weight = np.random.default_rng(5).uniform(0.01, 1, tile).astype(np.float32)
    on_device.tile_blend(tiles, size * 0, target, size, weight, *found)
    reference.tile_blend(tiles, size * 0, target, size, weight, *expected)
    cpu.same(found[0], expected[0])
    cpu.same(found[1], expected[1])
    apart = np.array([np.unravel_index(n, (6,) * axes) for n in range(len(starts))]) * tile
    spatial = tuple(6 * t for t in tile)
    for op in cpu.EXACT_OPS:
        options = {"threshold": 0.5} if op == "threshold" else {}
        mask, twin = (cpu.target_of(op, 2, spatial) for _ in range(2))
        on_device.tile_stitch(tiles, size * 0, apart, size, mask, op=op, **options)
        reference.tile_stitch(tiles, size * 0, apart, size, twin, op=op, **options)
        cpu.same(mask, twin)


def test_tables_that_nobody_could_check(device: DeviceKernels) -> None:
    """Nothing outside the arrays is touched: missing pixels are the nearest, parts that do not fit are left out."""
    on_device = DeviceKernels(device.memory, tables=True)
    window = cpu.pixels((1, 6, 7), "uint8")
    out = np.zeros((2, 1, 4, 5), np.float32)
    starts = [[-40, 1 << 40], [3, -2]]
    on_device.tile_gather(window, starts, out, image_shape=(100, 1 << 47), window_start=(50, 70))
    assert set(out[0].ravel()) <= set(window[0].ravel().astype(np.float32))
    tiles = np.ones((6, 1, 4, 5), np.float32)
    zero, whole = [0, 0], [4, 5]
    source = [zero, [-1, 0], [1, 0], zero, zero, [1 << 62, 0]]
    target = [zero, [4, 0], [4, 0], [5, 0], [4, -1], [4, 0]]
    size = [whole, whole, whole, whole, whole, [1 << 62, 1]]
    mask = np.zeros((1, 8, 5), np.float32)
    on_device.tile_stitch(tiles, source, target, size, mask)
    assert (mask[:, :4] == 1).all()
    assert (mask[:, 4:] == 0).all()
    total, weights = np.zeros_like(mask), np.zeros_like(mask[0])
    on_device.tile_blend(tiles, source, target, size, np.full((4, 5), 2, np.float32), total, weights)
    np.testing.assert_array_equal(total, 2 * mask)
    np.testing.assert_array_equal(weights, 2 * mask[0])


def test_channels_last_crop_concat(device: DeviceKernels) -> None:
    """All three arrays channels-last, as engines have them, with channels that fill 16 bytes and that do not."""
    for dtype, channels in itertools.product(("float32", "float16", "int8"), ((8, 16), (3, 5), (16, 1))):
        arrays = [
            np.moveaxis(cpu.pixels((2, *size, count), dtype), -1, 1)
            for size, count in zip(((12, 15), (9, 10)), channels, strict=True)
        ]
        out = np.moveaxis(np.zeros((2, 9, 10, sum(channels)), dtype), -1, 1)
        device.crop_concat(*arrays, out)
        cpu.same(np.ascontiguousarray(out), reference.crop_concat(*arrays))


# ------------------------------------------------------------------------------------------------- arrays and errors


class ThroughDlpack:
    """A CUDA array that speaks nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, stream: int | None = None) -> Any:
        return self.array.__dlpack__()


# What the device does with a pointer does not depend on its origin.
@pytest.mark.parametrize("device", ["bodies"], indirect=True)
def test_dlpack_alone(device: DeviceKernels) -> None:
    window = cpu.pixels((2, 9, 12), "uint16")
    out = np.zeros((1, 2, 4, 5), np.float32)
    kernels.tile_gather(ThroughDlpack(window[:, ::2, 1:]), [[-1, 2]], ThroughDlpack(out))
    cpu.same(out, reference.tile_gather(window[:, ::2, 1:], [[-1, 2]], (4, 5))[0])
    with pytest.raises(ImageError, match="DLPack type 5"):
        kernels.tile_gather(ThroughDlpack(window.astype(np.complex64)), [[-1, 2]], ThroughDlpack(out))


class Temporary:
    """A CUDA array of which nothing is ever read."""

    def __init__(self, shape: tuple[int, ...], gone: list[int]) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<f4", "data": (4096, False), "version": 3}
        weakref.finalize(self, gone.append, 1)


@pytest.mark.parametrize("device", ["bodies"], indirect=True)
def test_arrays_live_until_the_launch(device: DeviceKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those to which nobody else holds a reference."""
    gone, launched = list[int](), list[int]()
    module = SimpleNamespace(crop_concat=lambda *_: launched.append(len(gone)))
    monkeypatch.setattr(native, "cuda", lambda: module)
    kernels.crop_concat(Temporary((1, 1, 4), gone), Temporary((1, 1, 2), gone), Temporary((1, 2, 2), gone))
    assert (launched, len(gone)) == ([0], 3)


@pytest.mark.slow  # what was compiled is watched in test_kernels_compiled.py
@pytest.mark.parametrize("device", ["bodies"], indirect=True)
def test_bodies_touch_nothing_beside_their_arrays(device: DeviceKernels) -> None:
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("valgrind is not installed (apt-get install valgrind)")
    host_module()
    script = Path(__file__).parents[1] / "helpers" / "watched_kernels.py"
    paths = [str(Path(unet_rt.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Arrays from the C library, each a block of its own.
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "PYTHONPATH": os.pathsep.join(paths)}
    command = [valgrind, "--undef-value-errors=no", "-q", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    before, _, after = done.stderr.partition(BEYOND)
    invalid = re.compile(r"Invalid (?:read|write)(?:(?!Address).)*_cuda_host.*?Address[^\n]*", re.DOTALL)
    assert invalid.findall(after), "the memory checker sees nothing"
    assert not invalid.findall(before)


def test_device_errors(device: DeviceKernels) -> None:
    window, out = np.zeros((1, 8, 9), np.uint8), np.zeros((1, 1, 4, 4), np.float32)
    start = np.zeros((1, 2), np.int64)
    with pytest.raises(BackendError, match="window lives on a CUDA device and out on the host"):
        kernels.tile_gather(device.put(window), start, out)
    with pytest.raises(BackendError, match="starts lives on a CUDA device"):
        kernels.tile_gather(window, device.put(start), out)
    with pytest.raises(TileError, match=r"\(N, 2\) int64"):
        kernels.tile_gather(device.put(window), device.put(start.astype(np.int32)), device.put(out))
    with pytest.raises(TileError, match="the window holds 0 to 7"):
        kernels.tile_gather(device.put(window), [[6, 0]], device.put(out), image_shape=(20, 9))
    with pytest.raises(OutputError, match="non_finite"):
        kernels.tile_gather(device.put(window), start, device.put(out), non_finite=device.put(out))
    tiles = device.put(out)
    with pytest.raises(BackendError, match="all three alike"):
        kernels.tile_stitch(tiles, device.put(start), start, start + 1, device.put(np.zeros((1, 8, 8), np.float32)))
    out.flags.writeable = False
    with pytest.raises(OutputError, match="read-only"):
        kernels.tile_gather(device.put(window), start, device.put(out))
    array = SimpleNamespace(__cuda_array_interface__={"shape": (1,)})
    with pytest.raises(ImageError, match="typestr"):
        kernels.tile_gather(array, start, array)


def test_streams_are_those_of_the_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    module = SimpleNamespace(crop_concat=lambda *arguments: seen.append(arguments[-1]))
    monkeypatch.setattr(native, "cuda", lambda: module)

    def array(stream: int | None) -> Any:
        typestr, shape = "<f4", (1, 1, 4)
        if stream is None:
            return SimpleNamespace(
                __cuda_array_interface__={"shape": (1, 2, 4), "typestr": typestr, "data": (64, False), "version": 2}
            )
        return SimpleNamespace(
            __cuda_array_interface__={"shape": shape, "typestr": typestr, "data": (64, False), "stream": stream}
        )

    kernels.crop_concat(array(7), array(7), array(None))
    kernels.crop_concat(array(7), array(8), array(None), stream=9)
    with pytest.raises(BackendError, match=r"different CUDA streams \(\[7, 8\]\)"):
        kernels.crop_concat(array(7), array(8), array(None))
    assert seen == [7, 9]


def test_without_kernels_or_device_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    native.cpu()
    with monkeypatch.context() as patch:
        patch.setattr(native, "cuda", IMPORTED)
        patch.setattr(native.importlib, "import_module", absent)
        assert "UNET_RT_CUDA=ON" in str(native.cuda_missing())
        array = SimpleNamespace(__cuda_array_interface__={})
        with pytest.raises(BackendError, match="no CUDA kernels"):
            kernels.tile_gather(array, [[0, 0]], array)


IMPORTED = native.cuda.__wrapped__


def test_the_module_loads_without_a_driver() -> None:
    """And says what is missing when it is called. Where there is a device, nothing is."""
    module = pytest.importorskip("unet_rt._cuda")
    assert {name for name in dir(module) if name.startswith(("tile", "blend", "crop"))} == {
        name for name in dir(native.cpu()) if name.startswith(("tile", "blend", "crop"))
    }
    if module.missing():
        with pytest.raises(BackendError, match=r"driver|device"):
            module.crop_concat(
                (64, 7, (1, 1, 2), (8, 8, 4)), (128, 7, (1, 1, 2), (8, 8, 4)), (192, 7, (1, 2, 2), (16, 8, 4)), [0], 0
            )
        with pytest.raises(BackendError, match=r"driver|device"):
            module.graph_begin(0)
    # Nor without the toolkit: the runtime is linked into it, so that it names no library of it.
    for path in Path(module.__file__).parent.glob("*_cuda.*so"):
        assert b"libcudart.so" not in path.read_bytes(), path


def test_every_launch_is_checked() -> None:
    sources = Path(__file__).resolve().parents[2] / "csrc"
    if not sources.is_dir():
        pytest.skip("needs the source tree")
    files = [path for pattern in ("*.cu", "*.h", "*.cpp") for path in sources.glob(pattern)]
    launches = [text for path in files for text in path.read_text().split("<<<")[1:]]
    assert launches
    for text in launches:
        assert re.match(r"[^;]*;\s*check\(cudaGetLastError\(\)", text)
