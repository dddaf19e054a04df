"""What only a device has: PyTorch's tensors and streams, graphs, pointers that lie, the kernel that engines embed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flat_kernels as kernels
import numpy as np
import pytest
import reference
import test_kernels as cpu
from watched_kernels import BEYOND

import unet_rt
from unet_rt.errors import BackendError, ImageError
from unet_rt.kernels import native


@pytest.mark.gpu
@pytest.mark.torch
def test_torch_tensors_on_their_stream() -> None:
    import torch

    image = torch.arange(3 * 700 * 900, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(3, 700, 900).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    starts = np.array([[-5, 3], [300, 411]])
    with torch.cuda.stream(stream):
        out = torch.zeros(2, 3, 256, 252, device="cuda", dtype=torch.float16)
        kernels.tile_gather(image, starts, out, divisor=255.0, stream=stream.cuda_stream)
        last = torch.zeros(2, 3, 256, 252, device="cuda").to(memory_format=torch.channels_last)
        kernels.tile_gather(image, starts, last, divisor=255.0, stream=stream.cuda_stream)
    stream.synchronize()
    expected, _ = reference.tile_gather(image.cpu().numpy(), starts, (256, 252), np.float32, divisor=255.0)
    cpu.same(out.cpu().numpy(), expected.astype(np.float16))
    cpu.same(last.cpu().contiguous().numpy(), expected)
    with pytest.raises(ImageError, match="requires grad"):
        kernels.tile_gather(torch.zeros(1, 4, 4, device="cuda", requires_grad=True), [[0, 0]], out)


@pytest.mark.gpu
@pytest.mark.torch
def test_a_graph_is_launched_with_new_tables() -> None:
    import torch

    image = cpu.pixels((1, 300, 400), "uint16")
    window = torch.from_numpy(image.astype(np.int32)).cuda()
    starts = torch.zeros(4, 2, dtype=torch.int64, device="cuda")
    tiles = torch.zeros(4, 1, 64, 64, device="cuda")
    size = torch.full((4, 2), 64, dtype=torch.int64, device="cuda")
    origin = torch.zeros_like(size)
    mask = torch.zeros(1, 364, 464, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    native.graph_begin(stream.cuda_stream)
    kernels.tile_gather(window, starts, tiles, divisor=7.0, stream=stream.cuda_stream)
    kernels.tile_stitch(tiles, origin, starts, size, mask, stream=stream.cuda_stream)
    graph = native.graph_end(stream.cuda_stream)
    try:
        for shift in (0, 11, 77):
            new = np.array([[0, 0], [64, 0], [0, 64], [64, 64]]) + shift
            starts.copy_(torch.from_numpy(new))
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            native.graph_launch(graph, stream.cuda_stream)
            stream.synchronize()
            assert torch.cuda.memory_allocated() == before
            expected = image[0, shift : shift + 128, shift : shift + 128] / np.float32(7)
            cpu.same(mask[0, shift : shift + 128, shift : shift + 128].cpu().numpy(), expected)
    finally:
        native.graph_destroy(graph)


@pytest.mark.gpu
def test_host_memory_is_not_taken_for_the_device_s() -> None:
    array = np.zeros((1, 1, 4), np.float32)

    def posing(shape: tuple[int, ...]) -> Any:
        interface = {"shape": shape, "typestr": "<f4", "data": (array.ctypes.data, False), "version": 3}
        return SimpleNamespace(__cuda_array_interface__=interface)

    with pytest.raises(BackendError, match="host memory"):
        kernels.crop_concat(posing((1, 1, 2)), posing((1, 1, 2)), posing((1, 2, 2)))


@pytest.mark.gpu
def test_the_memory_checker_finds_nothing() -> None:
    paths = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    checker = shutil.which("compute-sanitizer", path=paths)
    if checker is None:
        pytest.xfail("compute-sanitizer, of the CUDA toolkit, is not installed: nobody watched the kernels")
    script = Path(__file__).parents[1] / "helpers" / "watched_kernels.py"
    searched = [str(Path(unet_rt.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [checker, "--tool", "memcheck", sys.executable, str(script), "device"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # in one, so that the order of lines is that of events
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(searched)},
    )
    before, line, after = done.stdout.partition(BEYOND)
    assert line, done.stdout
    assert "Invalid __global__ read" in after, "the memory checker sees nothing"
    assert "Invalid" not in before


@pytest.mark.gpu
@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_kernel_that_engines_embed(dtype: str) -> None:
    """crop_concat.ptx, launched by the driver with one thread per vector, and with fewer."""
    import torch

    path = Path(unet_rt.__file__).parent / "crop_concat.ptx"
    driver = ctypes.CDLL("libcuda.so.1")
    torch.zeros(1, device="cuda")  # makes the context current
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), path.read_bytes() + b"\0") == 0
    name = f"unet_rt_crop_concat_{'f32' if dtype == 'float32' else 'f16'}".encode()
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, name) == 0
    for n, c1, h1, w1, c2, h, w in [(2, 3, 60, 71, 4, 51, 58), (1, 16, 64, 64, 16, 56, 56), (1, 1, 5, 4, 2, 5, 3)]:
        skip, up = cpu.pixels((n, c1, h1, w1), dtype), cpu.pixels((n, c2, h, w), dtype, seed=1)
        for blocks in (n * (c1 + c2) * h * (-(-w // 4) + 1) // 256 + 1, 2):
            memory = [torch.from_numpy(a).cuda() for a in (skip, up)]
            out = torch.zeros(n, c1 + c2, h, w, device="cuda", dtype=memory[0].dtype)
            torch.cuda.synchronize()
            values: list[Any] = [ctypes.c_void_p(a.data_ptr()) for a in memory]
            values += [ctypes.c_int32(size) for size in (n, c1, h1, w1, c2, h, w)] + [ctypes.c_void_p(out.data_ptr())]
            pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
            assert driver.cuLaunchKernel(function, blocks, 1, 1, 256, 1, 1, 0, None, pointers, None) == 0
            torch.cuda.synchronize()
            cpu.same(out.cpu().numpy(), reference.crop_concat(skip, up))
    driver.cuModuleUnload(module)
