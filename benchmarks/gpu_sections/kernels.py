"""Our kernels as the pipeline calls them, each against a copy of the same bytes."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_rt.kernels import calls
from unet_rt.kernels.request import Affine, Operation, Placement

from .section import Section
from .timing import wall

ROTATED_BYTES = 512 << 20  # what one round of a kernel's buffers takes: many times any L2


NUMPY_OF = {
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.uint8: "|u1",
    torch.int8: "|i1",
    torch.int16: "<u2",
    torch.int64: "<u8",
}


class Raw:
    """A torch tensor for dtypes that torch names in no array interface: int16 as uint16, int64 as uint64."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": NUMPY_OF[tensor.dtype],
            "data": (tensor.data_ptr(), False),
            "strides": tuple(s * tensor.element_size() for s in tensor.stride()),
            "version": 3,
            "stream": None,
        }


def shared(tensor: Tensor) -> Any:
    """What the kernels are given: the tensor itself, or one that says it is unsigned; NumPy arrays on the CPU."""
    unsigned = tensor.dtype in (torch.int16, torch.int64)
    if tensor.device.type == "cpu":
        array = tensor.numpy()
        return array.view(array.dtype.str.replace("i", "u")) if unsigned else array
    return Raw(tensor) if unsigned else tensor


@dataclass
class Case:
    """A kernel on one set of arrays: ``make(seed)`` gives a launcher; ``touched`` bytes are read and written by one."""

    name: str
    touched: int
    make: Callable[[int], Callable[[dict[str, Any]], object]]


# Bytes and names of dtypes; torch has no uint16 of its own for these.
BYTES = {torch.uint8: 1, torch.int8: 1, torch.int16: 2, torch.float32: 4, torch.float16: 2}
NAMES = {torch.uint8: "uint8", torch.int16: "uint16", torch.float32: "float32", torch.float16: "float16"}
Launch = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Shapes:
    """Sizes in pixels of the tiles that kernels are given: ``side`` x ``side`` of them, of ``tile`` px, ``kept`` of it."""

    device: str
    dry: bool
    tile: int
    kept: int
    step: int
    side: int

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype.is_floating_point:
            return torch.randn(*shape, device=self.device).to(dtype)
        high = {torch.uint8: 255, torch.int8: 127, torch.int16: 32767}[dtype]
        return torch.randint(0, high, shape, device=self.device, dtype=torch.int32).to(dtype)

    def empty(self, *shape: int, dtype: torch.dtype) -> Any:
        return shared(torch.empty(shape, device=self.device, dtype=dtype))

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
        return shared(torch.zeros(*shape, device=self.device, dtype=dtype))


def grid(n: int, pitch: int, start: int = 0) -> np.ndarray:
    """(n * n, 2) corners, ``pitch`` px apart."""
    return np.array([[start + pitch * i, start + pitch * j] for i in range(n) for j in range(n)], np.int64)


def kernel_cases(device: str, dry: bool) -> Iterator[Case]:
    """As the pipeline calls them: 64 tiles of 572 px (388 kept) of the paper's network, and 16 of them."""
    shapes = Shapes(device, dry, 60, 20, 16, 2) if dry else Shapes(device, dry, 572, 388, 384, 8)
    yield from gather_cases(shapes)
    for dtype in (torch.float16, torch.float32):
        yield from stitch_cases(shapes, dtype)
        yield blend_case(shapes, dtype)
    yield from finish_cases(shapes)
    yield from concat_cases(shapes)


def gather_cases(shapes: Shapes) -> Iterator[Case]:
    """The window of a grid of overlapping tiles, mirrored 92 px (not a multiple of 16 bytes) at two edges."""
    tile, step, side = shapes.tile, shapes.step, shapes.side
    margin = (tile - shapes.kept) // 2
    for n, apart, what in ((side, tile, "side by side"), (side, step, "overlapping"), (side // 2, step, "overlapping")):
        for source, target in (
            (torch.uint8, torch.float32),
            (torch.uint8, torch.float16),
            (torch.int16, torch.float32),
            (torch.int16, torch.float16),
        ):
            if (apart == tile or n != side) and source == torch.int16:
                continue
            width = (n - 1) * apart + tile - margin
            starts = grid(n, apart, -margin)

            def gather(
                _: int,
                width: int = width,
                starts: np.ndarray = starts,
                source: torch.dtype = source,
                target: torch.dtype = target,
            ) -> Launch:
                window = shared(shapes.rand(1, width, width, dtype=source))
                out = shapes.empty(len(starts), 1, tile, tile, dtype=target)
                numbers = Affine(np.full(1, 31.7, np.float32), np.full(1, 57.3, np.float32), None)
                return lambda options: calls.tile_gather(window, starts, out, affine=numbers, **options)

            yield Case(
                f"tile_gather {NAMES[source]} to {NAMES[target]}, {n * n} tiles {what}",
                width * width * BYTES[source] + n * n * tile * tile * BYTES[target],
                gather,
            )


def stitch_cases(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    """Cores of network outputs to their places in a band of the canvas."""
    kept, step, n = shapes.kept, shapes.step, shapes.side
    tables = (np.full((n * n, 2), (kept - step) // 2), grid(n, step), np.full((n * n, 2), step))
    ops = (("copy", 2), ("softmax", 2), ("sigmoid", 1), ("argmax", 2), ("threshold", 1), ("argmax", 5))
    for op, channels in ops:
        shape = (n * step, n * step) if op == "argmax" else (channels, n * step, n * step)
        label = op in ("argmax", "threshold")

        def stitch(
            _: int, op: Any = op, channels: int = channels, shape: tuple[int, ...] = shape, label: bool = label
        ) -> Launch:
            tiles = shared(shapes.rand(n * n, channels, kept, kept, dtype=dtype))
            out = shapes.empty(*shape, dtype=torch.uint8 if label else torch.float32)
            bound = 0.0 if op == "threshold" else None
            asked, place = Operation(op, bound), Placement(*tables)
            return lambda options: calls.tile_stitch(tiles, place, out, asked, **options)

        yield Case(
            f"tile_stitch {op}, {channels} x {NAMES[dtype]}, {n * n} tiles",
            channels * (n * step) ** 2 * BYTES[dtype] + math.prod(shape) * (1 if label else 4),
            stitch,
        )


def blend_case(shapes: Shapes, dtype: torch.dtype) -> Case:
    """Outputs side by side, weighted and summed."""
    kept, side = shapes.kept, shapes.side
    wide, area = side * kept, (side * kept) ** 2
    tables = (np.zeros((side * side, 2), np.int64), grid(side, kept), np.full((side * side, 2), kept))

    def blend(_: int) -> Launch:
        tiles = shared(shapes.rand(side * side, 2, kept, kept, dtype=dtype))
        weight = shared(shapes.rand(kept, kept).abs() + 0.1)
        total, weights = shapes.zeros(2, wide, wide), shapes.zeros(wide, wide)
        return lambda options: calls.tile_blend(tiles, Placement(*tables), weight, total, weights, **options)

    name = f"tile_blend, 2 x {NAMES[dtype]}, {side * side} tiles"
    return Case(name, 2 * area * BYTES[dtype] + 4 * kept * kept + 2 * 3 * area * 4, blend)


def finish_cases(shapes: Shapes) -> Iterator[Case]:
    """Sums over their weights, decided."""
    wide = shapes.side * shapes.kept
    for op, written in (("argmax", 1), ("softmax", 8)):

        def finish(_: int, op: Any = op) -> Launch:
            total, weights = shared(shapes.rand(2, wide, wide)), shared(shapes.rand(wide, wide).abs() + 0.1)
            shape = (wide, wide) if op == "argmax" else (2, wide, wide)
            out = shapes.empty(*shape, dtype=torch.uint8 if op == "argmax" else torch.float32)
            count = {} if shapes.device == "cpu" else {"uncovered": shapes.zeros(1, dtype=torch.int64)}
            return lambda options: calls.blend_finish(total, weights, out, Operation(op), **count, **options)

        yield Case(f"blend_finish {op}, 2 channels", wide * wide * (3 * 4 + written), finish)


def concat_cases(shapes: Shapes) -> Iterator[Case]:
    """The first skip connection of the paper's network: 568 px cropped to 392, 64 + 64 channels."""
    s, u, c, n = (24, 16, 8, 1) if shapes.dry else (568, 392, 64, 4)
    for dtype in (torch.float32, torch.float16, torch.int8):
        for layout in (torch.contiguous_format, torch.channels_last):

            def concat(_: int, dtype: torch.dtype = dtype, layout: Any = layout) -> Launch:
                skip = shared(shapes.rand(n, c, s, s, dtype=dtype).contiguous(memory_format=layout))
                up = shared(shapes.rand(n, c, u, u, dtype=dtype).contiguous(memory_format=layout))
                out = torch.empty(n, 2 * c, u, u, device=shapes.device, dtype=dtype).contiguous(memory_format=layout)
                kept_out = shared(out)
                return lambda options: calls.crop_concat(skip, up, kept_out, **options)

            said = f"{str(dtype).removeprefix('torch.')} {'channels last' if layout == torch.channels_last else 'NCHW'}"
            yield Case(f"crop_concat {said}, batch {n}", 4 * c * u * u * n * BYTES[dtype], concat)


def section_kernels(section: Section) -> None:
    """Each kernel against a copy of the same bytes, launched from Python and replayed from a CUDA graph."""
    for case in kernel_cases(section.device, section.dry):
        if case.name.startswith(section.without):
            continue
        if section.left < 8:
            section.failed(case.name, "no time was left")
            continue
        with section.part(case.name):
            section.add("rows", **measure_kernel(section, case))
            if not section.dry:
                torch.cuda.empty_cache()
    section.clocks("after the kernels")


def measure_kernel(section: Section, case: Case) -> dict[str, Any]:
    sets = 2 if section.dry else max(3, min(64, math.ceil(ROTATED_BYTES / case.touched)))
    launches = [case.make(k) for k in range(sets)]
    half = case.touched // 2
    sources = [torch.randint(0, 255, (half,), device=section.device, dtype=torch.uint8) for _ in range(sets)]
    targets = [torch.empty_like(s) for s in sources]
    options: dict[str, Any] = {}

    def all_kernels() -> None:
        for launch in launches:
            launch(options)

    def all_copies() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    row: dict[str, Any] = {"name": case.name, "bytes": case.touched, "sets": sets}
    if section.dry:
        passes: dict[str, Callable[[], object]] = {"kernel": all_kernels, "copy": all_copies}
        clock: Callable[[Callable[[], object]], float] = wall
    else:
        stream = torch.cuda.Stream()
        options["stream"] = stream.cuda_stream
        torch.cuda.synchronize()  # the arrays are filled
        with torch.cuda.stream(stream):
            all_kernels()
            all_copies()
            stream.synchronize()
            passes = {"kernel": all_kernels, "copy": all_copies}
            for name, work in list(passes.items()):
                with section.part(f"{case.name}: {name} in a CUDA graph"):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=stream):
                        work()
                    passes[f"{name}_graph"] = graph.replay
        clock = functools.partial(_events, stream)
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(3 if section.dry else 12):
        for name, work in passes.items():
            spent = clock(work)
            if turn >= 2 or section.dry:
                times[name].append(spent / sets)
    us = {name: statistics.median(found) * 1e6 for name, found in times.items()}
    row |= {f"{name}_us": value for name, value in us.items()}
    row["share"] = us["copy"] / us["kernel"]
    row["gb_s"] = case.touched / us["kernel"] / 1e3
    if "kernel_graph" in us:
        copied = min(us[name] for name in ("copy", "copy_graph") if name in us)
        row |= {"share_graph": copied / us["kernel_graph"], "gb_s_graph": case.touched / us["kernel_graph"] / 1e3}
    return row


def _events(stream: Any, work: Callable[[], object]) -> float:
    """Seconds on the device for one pass over all buffer sets, repeated for 5 ms at least."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for count in (1, 0):
            repeats = count or max(1, min(200, math.ceil(5 / max(begin.elapsed_time(end), 1e-3))))
            begin.record(stream)
            for _ in range(repeats):
                work()
            end.record(stream)
            end.synchronize()
    return begin.elapsed_time(end) / repeats / 1e3
