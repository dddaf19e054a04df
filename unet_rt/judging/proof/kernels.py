"""The kernels of this machine against what NumPy gives, and on a GPU against those of the processor, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import UnetRtError
from ...kernels import calls
from ...kernels.request import Affine, Op, Operation, Placement
from ...system import facts
from .section import Section

Array = npt.NDArray[Any]
SIDE = 509  # px, of a tile: odd, so that rows begin at every alignment
ULPS = 8.0  # of float32, that exp may differ from NumPy's


@dataclass(frozen=True)
class Case:
    """A kernel on arrays: those that it reads, the one that it fills, how it is called, what NumPy gives."""

    name: str
    read: tuple[Array, ...]
    out: Array
    call: Callable[..., object]  # of the arrays read and the one filled, stream=
    twin: Array


def section_kernels(section: Section) -> None:
    """A row per kernel: equal or how far off, and milliseconds; each on the processor, and on the GPU where there is one."""
    for case in cases():
        with section.part(f"{case.name} on cpu"):
            out = case.out.copy()
            begun = time.perf_counter()
            case.call(*case.read, out)
            milliseconds = (time.perf_counter() - begun) * 1e3
            section.add("kernels", name=case.name, device="cpu", **_agreement(out, case.twin), ms=milliseconds)
        if section.device.startswith("cuda") and case.name != "histogram":
            with section.part(f"{case.name} on {section.device}"):
                found = _on_device(section.device, case)
                section.add("kernels", name=case.name, device=section.device, **_agreement(found, out))


def _agreement(found: Array, wanted: Array) -> dict[str, Any]:
    """Whether two arrays are equal, and how far apart, as columns of a row."""
    equal = bool(np.array_equal(found, wanted, equal_nan=found.dtype.kind == "f"))
    if equal:
        return {"agrees": True, "equal": True, "max_abs": 0.0}
    error = np.abs(found.astype(np.float64) - wanted)
    bound = ULPS * np.finfo(np.float32).eps * np.maximum(np.abs(wanted), np.finfo(np.float32).tiny)
    agrees = found.dtype.kind == "f" and bool((error <= bound).all())
    return {"agrees": agrees, "equal": False, "max_abs": float(error.max())}


def _on_device(name: str, case: Case) -> Array:
    """What a kernel fills on a GPU, brought back."""
    from ...kernels.device import Device

    device = Device.open(facts.cuda_index(name))
    stream = device.stream()
    arrays = [device.empty(array.shape, array.dtype) for array in (*case.read, case.out)]
    try:
        for there, here in zip(arrays, (*case.read, case.out), strict=True):
            device.copy_in(there, np.ascontiguousarray(here), stream)
            stream.synchronize()
        case.call(*arrays, stream=stream.handle)
        found = np.empty_like(case.out)
        device.copy_out(found, arrays[-1], stream)
        stream.synchronize()
        return found
    finally:
        for array in arrays:
            array.free()


def cases() -> Iterator[Case]:
    """Every kernel on drawn values, with plain NumPy beside it."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 4096, (1, SIDE, SIDE), dtype=np.uint16)
    offset, divisor = np.array([700.5], np.float32), np.array([312.25], np.float32)
    starts = np.array([[-31, -17], [SIDE - 200, 40]], np.int64)
    padded = np.pad(image.astype(np.float32), ((0, 0), (64, 64), (64, 64)), "reflect")
    gathered = np.stack([padded[:, y + 64 : y + 64 + 211, x + 64 : x + 64 + 223] for y, x in starts])
    yield Case(
        "tile_gather",
        (image,),
        np.zeros(gathered.shape, np.float32),
        lambda window, out, **more: calls.tile_gather(
            window, starts, out, affine=Affine(offset, divisor, None), **more
        ),
        (gathered - offset) / divisor,
    )
    yield from _stitch_cases(rng)
    yield from _blend_cases(rng)
    skip, up = (rng.normal(size=(2, channels, side, side)).astype(np.float32) for channels, side in ((8, 107), (4, 99)))
    yield Case(
        "crop_concat",
        (skip, up),
        np.zeros((2, 12, 99, 99), np.float32),
        calls.crop_concat,
        np.concatenate([skip[:, :, 4:103, 4:103], up], 1),
    )
    values = rng.integers(0, 65536, 300_001, dtype=np.uint16)
    counts = np.bincount(values, minlength=65536).astype(np.int64)
    yield Case("histogram", (values,), np.zeros(65536, np.int64), calls.histogram, counts)


def _stitch_cases(rng: np.random.Generator) -> Iterator[Case]:
    tiles = rng.normal(0, 3, (2, 3, 160, 171)).astype(np.float32)
    part = np.array([150, 141], np.int64)
    table = np.array([[5, 15], [5, 15]], np.int64)
    placement = Placement(table, np.array([[0, 0], [0, 141]], np.int64), np.array([part, part]))
    whole = np.concatenate([tile[:, 5:155, 15:156] for tile in tiles], 2)
    shifted = np.exp(whole - whole.max(0))
    wanted: dict[Op, Array] = {
        "copy": whole,
        "argmax": whole.argmax(0).astype(np.uint8),
        "threshold": (whole > 0.25).astype(np.uint8),
        "sigmoid": (1 / (1 + np.exp(-whole.astype(np.float64)))).astype(np.float32),
        "softmax": (shifted / shifted.sum(0)).astype(np.float32),
    }
    for op, twin in wanted.items():
        operation = Operation(op, threshold=0.25 if op == "threshold" else None)

        def call(tiles: Any, out: Any, operation: Operation = operation, **more: Any) -> None:
            calls.tile_stitch(tiles, placement, out, operation, **more)

        yield Case(f"tile_stitch {op}", (tiles,), np.zeros(twin.shape, twin.dtype), call, twin)


def _blend_cases(rng: np.random.Generator) -> Iterator[Case]:
    tiles, weight = rng.normal(size=(2, 2, 90, 90)).astype(np.float32), rng.uniform(0.1, 1, (90, 90)).astype(np.float32)
    total, weights = np.zeros((3, 90, 130), np.float32), np.zeros((90, 130), np.float32)
    for tile, x in zip(tiles, (0, 40), strict=True):
        total[:2, :, x : x + 90] += weight * tile
        weights[:, x : x + 90] += weight
    total[2] = weights  # one array for both, as a prediction keeps them
    places = (np.array([[0, 0], [0, 0]]), np.array([[0, 0], [0, 40]]), np.array([[90, 90], [90, 90]]))
    placement = Placement(*(place.astype(np.int64) for place in places))
    yield Case(
        "tile_blend",
        (tiles, weight),
        np.zeros_like(total),
        lambda tiles, weight, out, **more: calls.tile_blend(tiles, placement, weight, out[:2], out[2], **more),
        total,
    )
    yield Case(
        "blend_finish",
        (total[:2].copy(), weights),
        np.zeros((2, 90, 130), np.float32),
        calls.blend_finish,
        total[:2] / weights,
    )


def kernels_missing(device: str) -> str | None:
    """Why kernels cannot run on a device; None if they can."""
    if not device.startswith("cuda"):
        return None
    from ...kernels import device as gpu

    try:
        return gpu.missing_reason(facts.cuda_index(device))
    except UnetRtError as error:
        return str(error)
