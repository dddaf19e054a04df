"""Trials of convolutions: what the kernels count is what is wrong, by bodies of the kernels and compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import host_device
import numpy as np
import pytest
from device_kernels import Interpreter, host_module
from host_device import HostDevice, host
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backends_cudnn import convolved, plain, strided, watched

from unet_rt.backends.cudnn_api import Convolution
from unet_rt.backends.cudnn_plan import Buffer, Plan, Region
from unet_rt.backends.cudnn_proof import Arrays, Faults, Proof

Array = np.ndarray[Any, np.dtype[Any]]
Size = tuple[int, int]


@pytest.fixture(scope="module", params=["bodies", "compiled"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    pytest.importorskip("torch")
    module = host_module()
    if not hasattr(module, "steps_fill"):
        pytest.skip("unet_rt._cuda_host is older than its sources; build it again")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "bodies":
            yield Place(HostDevice(), Enqueued(module))
            return
        interpreter = Interpreter("cudnn_steps")
        patch.setattr(host_device, "HostMemory", watched(interpreter.memory))
        with interpreter.listening():
            yield Place(HostDevice(), Enqueued(module))


class Enqueued:
    """The step kernels in the order of the stream."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.stream: Any = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.stream.enqueue(lambda: getattr(self.module, name)(*args))


@dataclass
class Place:
    device: HostDevice
    kernels: Enqueued

    def case(self, what: Convolution, plan: Plan, x: Region, y: Region, seed: int = 0) -> Case:
        return Case(self, what, plan, x, y, seed)


class Case:
    """A convolution from a region to a region of a block, with weights of its own."""

    def __init__(self, place: Place, what: Convolution, plan: Plan, x: Region, y: Region, seed: int) -> None:
        device = place.device
        self.what, self.stream = what, device.stream()
        place.kernels.stream = self.stream
        self.block = device.empty((plan.bytes,), np.uint8)
        rng = np.random.default_rng(seed)
        shape = (what.filters, *what.kernel, what.channels)
        self.w = (rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5).astype(np.float16)
        self.bias = rng.uniform(-0.3, 0.3, what.filters).astype(np.float16)
        self.held = [device.empty(a.shape, np.float16) for a in (self.w, self.bias)]
        for target, source in zip(self.held, (self.w, self.bias), strict=True):
            device.copy_in(target, source, self.stream)
        start = [self.block.pointer + plan.place(region)[0] for region in (x, y)]
        self.arrays = Arrays(start[0], self.held[0].pointer, self.held[1].pointer, start[1])
        self.proof = Proof(device, self.stream, place.kernels, self.block)  # type: ignore[arg-type]

    def faults(self, launch: Callable[[], object]) -> Faults:
        return self.proof.faults(self.what, self.arrays, lambda: self.stream.enqueue(lambda: launch()))

    def convolve(self) -> None:
        convolved(self.what, *self.arrays)

    def y(self) -> Array:
        return strided(self.arrays.y, self.what, "y")

    def values(self) -> Array:
        return plain(self.block.pointer, (self.block.size // 2,))

    def outside(self, *of: str) -> Array:
        """Places in the block that are in none of these: x, y."""
        values = self.values()
        kept = values.copy()
        values[:] = 0
        for name in of:
            strided(getattr(self.arrays, name), self.what, name)[...] = 1
        found = np.flatnonzero(values == 0)
        values[:] = kept
        return found

    def exact(self) -> tuple[Array, Array]:
        """In float64: the outputs before they are rounded, and the sizes of the terms they are sums of."""
        what = self.what
        x = strided(self.arrays.x, what, "x").astype(np.float64)
        (top, left), (bottom, right) = what.before, what.after
        x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
        sums = np.zeros((what.batch, *what.out_size, what.filters)) + self.bias.astype(np.float64)
        sizes = np.abs(sums)
        for i, j in itertools.product(*map(range, what.kernel)):
            rows, columns = (
                slice(k * d, k * d + (n - 1) * s + 1, s)
                for k, d, n, s in zip((i, j), what.dilations, what.out_size, what.strides, strict=True)
            )
            taps = self.w[:, i, j].astype(np.float64).T
            sums += x[:, rows, columns] @ taps
            sizes += np.abs(x[:, rows, columns]) @ np.abs(taps)
        return np.maximum(sums, 0) if what.activation == "relu" else sums, sizes

    def close(self) -> None:
        self.proof.close()
        for array in (self.block, *self.held):
            array.free()


def placed(
    what: Convolution, step: Size = (1, 1), start: Size = (0, 0), beside: int = 0, size: Size = (0, 0)
) -> tuple[Convolution, Plan, Region, Region]:
    """``x`` in a buffer with 8 more channels; ``y`` at every ``step``-th sample from ``start`` on, behind ``beside``
    channels, in a buffer ``size`` larger than that takes.
    """
    out = what.out_size
    whole = tuple((n - 1) * s + 1 + b + more for n, s, b, more in zip(out, step, start, size, strict=True))
    maps = [
        Buffer(what.channels + 8, (what.size[0] + 1, what.size[1])),
        Buffer(what.filters + beside + 8, (whole[0], whole[1])),
    ]
    offset = 0
    for buffer in maps:
        buffer.offset = offset
        offset += -(-2 * what.batch * buffer.channels * buffer.size[0] * buffer.size[1] // 256) * 256
    plan = Plan(((what.batch, 1, 1, 1),), (), [], maps, {}, offset)
    x, y = Region(0, 0, what.channels, what.size, (1, 0)), Region(1, beside, what.filters, out, start, step)
    strides = [tuple(n // 2 for n in plan.place(region)[1:]) for region in (x, y)]
    made = Convolution(**{**vars(what), "x_strides": strides[0], "y_strides": strides[1]})
    return made, plan, x, y


SMALL = Convolution(2, (7, 9), 16, 8, (3, 3), before=(1, 0), after=(0, 2), activation="relu")
CASES = {
    "padded": placed(SMALL),
    "strided, dilated": placed(
        Convolution(2, (11, 10), 8, 16, (3, 2), strides=(2, 3), dilations=(2, 1), before=(2, 1), after=(1, 0)), beside=8
    ),
    "transposed": placed(Convolution(2, (4, 5), 24, 8, (1, 1)), step=(2, 2), start=(1, 0), beside=8, size=(2, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_counted(name: str, place: Place) -> None:
    case = place.case(*CASES[name])
    rng = np.random.default_rng(1)

    def spoiled() -> None:
        case.convolve()
        y = case.y()
        at = rng.choice(y.size, 5, replace=False)
        for k, value in zip(at, (np.nan, np.inf, -np.inf, 60000, -3), strict=True):
            y[np.unravel_index(k, y.shape)] = value
        beside = rng.choice(case.outside("x", "y"), 7, replace=False)
        case.values()[beside] = np.nextafter(case.values()[beside], np.float16(2))

    compared = 2 * np.prod(case.what.out_size) * case.what.filters
    assert case.faults(case.convolve) == Faults(0, compared, 0)
    assert case.faults(spoiled) == Faults(5, compared, 7)
    assert case.faults(lambda: None).outputs > 0.9 * compared  # what was there before is no output
    case.close()


def test_rounding_is_allowed_and_no_more(place: Place) -> None:
    """Outputs some units in the last place from the right ones are counted as the bound says."""
    case = place.case(*CASES["padded"])
    what = case.what
    terms = np.prod(what.kernel) * what.channels + 1
    counted = []

    def shifted() -> None:
        exact, sizes = case.exact()
        found = exact.astype(np.float16)
        for _ in range(by):
            found = np.nextafter(found, np.float16(np.inf))
        case.y()[...] = found
        error = np.abs(found.astype(np.float64) - exact)
        allowed = terms * sizes * 2.0**-22
        allowed += (np.abs(exact) + allowed) * 2.0**-11 + 2.0**-25
        slack = terms * sizes * 2.0**-23  # the kernel's own sums
        counted[:] = [int((error > allowed + slack).sum()), int((error > allowed - slack).sum())]

    for by in range(4):
        faults = case.faults(shifted)
        assert counted[0] <= faults.outputs <= counted[1]
        assert by > 0 or faults.outputs == 0
        assert by < 3 or faults.outputs > 0.4 * faults.compared  # about half of them are negative before ReLU: zero
    case.close()


def test_sums_beyond_float16_are_infinite(place: Place) -> None:
    case = place.case(*placed(Convolution(1, (3, 4), 8, 8, (1, 1))))
    case.stream.synchronize()
    host(case.held[0])[...] = 65504 * np.where(np.arange(64).reshape(8, 1, 1, 8) % 3, 1, -1)

    def overflowing() -> None:
        with np.errstate(over="ignore"):
            case.convolve()
        infinite.append(int(np.isinf(case.y()).sum()))

    infinite: list[int] = []
    assert not case.faults(overflowing)
    assert infinite[0] > 10
    case.close()


def test_of_many_images_the_first_and_the_last_are_compared(place: Place) -> None:
    case = place.case(*placed(Convolution(4, (3, 4), 8, 8, (1, 1)), beside=8))

    def spoiled() -> None:
        case.convolve()
        case.y()[image, 0, 0, 0] = np.nan

    for image in range(4):
        wrong = int(image in (0, 3))
        assert case.faults(spoiled) == Faults(wrong, 2 * 3 * 4 * 8, 0)
    case.close()


@pytest.mark.parametrize("place", ["bodies"], indirect=True)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_geometry(place: Place, data: st.DataObject) -> None:
    """A right convolution is right, and a value beside it, wherever it is, is found."""

    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    def pair(low: int, high: int) -> Size:
        return draw(low, high), draw(low, high)

    kernel, dilations = pair(1, 3), pair(1, 2)
    size = tuple((k - 1) * d + 1 + draw(0, 6) for k, d in zip(kernel, dilations, strict=True))
    what = Convolution(
        draw(1, 3),
        (size[0], size[1]),
        8 * draw(1, 3),
        8 * draw(1, 2),
        kernel,
        pair(1, 3),
        dilations,
        pair(0, 2),
        pair(0, 2),
        activation=data.draw(st.sampled_from(["none", "relu"])),
    )
    step = pair(1, 3)
    start = draw(0, step[0] - 1), draw(0, step[1] - 1)
    case = place.case(*placed(what, step, start, 8 * draw(0, 2), pair(0, 2)), seed=draw(0, 9))
    assert not case.faults(case.convolve)
    outside = case.outside("y")
    changed = outside[draw(0, len(outside) - 1)]

    def spilled() -> None:
        case.convolve()
        case.values()[changed] = 7

    assert case.faults(spilled).beside == 1
    case.close()


def test_numbers_of_a_block(place: Place) -> None:
    """Both signs, few alike, the same ones every time; in blocks of more than one lot, too."""
    lot = 1 << 19  # values
    block = place.device.empty((3 * lot,), np.uint8)
    stream = place.device.stream()
    place.kernels.stream = stream
    proof = Proof(place.device, stream, place.kernels, block)  # type: ignore[arg-type]
    proof.fill()
    stream.synchronize()
    values = host(block).view(np.float16).astype(np.float64)
    assert np.abs(values).max() <= 1
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 3**-0.5) < 0.01
    assert np.mean(values[lot:] == values[: lot // 2]) < 0.001
    assert len(np.unique(values)) > 10000
    hashed = np.arange(values.size, dtype=np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        hashed = (hashed ^ hashed >> np.uint32(shift)) * np.uint32(factor)
    wanted = ((hashed & np.uint32(0xFFFF)).astype(np.float64) - 32768) / 32768
    np.testing.assert_array_equal(values, wanted.astype(np.float16))  # on every device
    proof.close()
    block.free()
