"""Arrays, streams and events of a GPU. Without one: views are those of NumPy, and what is missing is said."""

from __future__ import annotations

import gc
import importlib.util
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_device import HostDevice, host
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, basic_indices

from unet_rt.cli import doctor
from unet_rt.errors import BackendError, DeviceMemoryError
from unet_rt.kernels import device as gpu
from unet_rt.kernels import native
from unet_rt.kernels.device import Device
from unet_rt.kernels.memory import DeviceArray
from unet_rt.system import facts as machine

Array = np.ndarray[Any, np.dtype[Any]]


def filled(device: Any, values: Array) -> DeviceArray:
    """A C-contiguous copy on the device."""
    target: DeviceArray = device.empty(values.shape, values.dtype)
    stream = device.stream()
    pinned = device.pinned(values.shape, values.dtype)
    pinned[...] = values
    device.copy_in(target, pinned, stream)
    stream.synchronize()
    return target


# --- views ----------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_views_are_numpys(data):
    """Any chain of indexing and transposing gives the shape, strides and contents that NumPy gives."""
    dtype = data.draw(st.sampled_from(["u1", "u2", "f2", "f4", "f8"]))
    size = data.draw(array_shapes(max_dims=4, max_side=5))
    values = data.draw(arrays(dtype, size, elements={"allow_nan": False} if dtype[0] == "f" else None))
    device = HostDevice()
    on_device, expected = filled(device, values), values
    for _ in range(data.draw(st.integers(0, 3))):
        if data.draw(st.booleans()):
            index = data.draw(basic_indices(expected.shape, allow_newaxis=True, max_dims=5))
            on_device, expected = on_device[index], np.asarray(expected[index])
            if not expected.ndim:
                break
        else:
            axes = data.draw(st.permutations(range(expected.ndim)))
            on_device, expected = on_device.transpose(*axes), expected.transpose(axes)
    assert (on_device.shape, on_device.dtype, on_device.nbytes) == (expected.shape, expected.dtype, expected.nbytes)
    if expected.size:
        assert on_device.contiguous == expected.flags.c_contiguous
        np.testing.assert_array_equal(host(on_device), expected)
    np.testing.assert_array_equal(on_device.to_host(device.stream()), expected)


def test_reshaping_and_repeating():
    device = HostDevice()
    values = np.arange(24, dtype=np.int16).reshape(4, 6)
    array = filled(device, values)
    np.testing.assert_array_equal(host(array.reshape(2, 2, 6)), values.reshape(2, 2, 6))
    np.testing.assert_array_equal(host(array[1:3].reshape(12)), values[1:3].reshape(12))
    np.testing.assert_array_equal(array[:1].repeat_first(5).to_host(device.stream()), np.repeat(values[:1], 5, axis=0))
    np.testing.assert_array_equal(host(array.view(np.uint16)), values.view(np.uint16))
    for wrong in (lambda: array[:, ::2].reshape(12), lambda: array.view(np.int32)):
        with pytest.raises(BackendError):
            wrong()


def test_the_interface_is_numpys_but_for_the_place():
    array = HostDevice().empty((3, 4), np.float32)
    stated = array[1:].__cuda_array_interface__
    assert stated == {
        "shape": (2, 4),
        "typestr": "<f4",
        "data": (array.pointer + 16, False),
        "strides": None,
        "stream": None,
        "version": 3,
    }
    assert array[:, 1:].__cuda_array_interface__["strides"] == (16, 4)
    assert array[:0].__cuda_array_interface__["data"] == (0, False)


# --- what is missing ------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said(monkeypatch):
    def found(**modules: bool) -> None:
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: (
                SimpleNamespace() if modules.get(name) else None if name in modules else real(name, *rest)
            ),
        )

    monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda((), "", "no NVIDIA driver is installed"))
    assert gpu.missing_reason() == "no NVIDIA driver is installed"
    monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda(("A", "B"), "13.1", None))
    assert "cuda:2" in str(gpu.missing_reason(2))
    with monkeypatch.context():
        found(**{"unet_rt._cuda": False, "pycuda": True})
        monkeypatch.setattr(native, "cuda_status", lambda: "no CUDA compiler was found")
        assert "UNET_RT_CUDA=ON" in str(gpu.missing_reason())
        assert "no CUDA compiler was found" in str(gpu.missing_reason())
    found(**{"unet_rt._cuda": True, "pycuda": False})
    reason = str(gpu.missing_reason(1))
    assert "PyCUDA is not installed" in reason
    assert "conda-forge" in reason
    assert "CUDA_ENABLE_CURAND = False" in reason
    with pytest.raises(BackendError, match="cuda:1 cannot be used: PyCUDA is not installed"):
        Device.open(1)
    report = doctor.collect()
    assert report["devices"]["unusable"] == {"cuda:0": reason, "cuda:1": reason}
    assert doctor.format(report).count("not usable: PyCUDA is not installed") == 2


def test_arrays_of_the_host_are_no_device_arrays():
    assert not gpu.is_device_array(np.zeros(3))
    assert not gpu.is_device_array([1, 2])
    assert gpu.is_device_array(HostDevice().empty((3,), np.uint8))


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device() -> Device:
    return Device.open(0)


@pytest.mark.gpu
def test_nothing_is_missing(device):
    assert gpu.missing_reason() is None
    assert Device.open(0) is device
    free, total = device.memory()
    assert 0 < free <= total
    assert device.compute_capability >= (7, 0)
    assert device.multiprocessors > 0
    assert "not usable" not in doctor.format(doctor.collect())


@pytest.mark.gpu
def test_copies_there_and_back(device):
    stream = device.stream()
    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.bool_, np.int16, np.float16, np.float32, np.uint64):
        values = rng.integers(0, 2 if dtype == np.bool_ else 100, (3, 70, 51)).astype(dtype)
        array = filled(device, values)
        other = device.empty(values.shape, dtype)
        device.copy(other, array, stream)
        device.zero(other[1], stream)
        back = device.pinned(values.shape, dtype)
        device.copy_out(back, other, stream)
        stream.synchronize()
        expected = values.copy()
        expected[1] = 0
        np.testing.assert_array_equal(back, expected)
        for view in (np.s_[:, ::-2, 3:9], np.s_[..., 7], np.s_[2:0:-1]):
            np.testing.assert_array_equal(array[view].to_host(stream), values[view])
        np.testing.assert_array_equal(array.transpose(2, 0, 1).to_host(), values.transpose(2, 0, 1))


@pytest.mark.gpu
def test_streams_wait_for_events(device):
    """A chain of copies over two streams, each long enough to overtake where it would not wait."""
    size = 1 << 26
    a, b = device.empty((size,), np.uint8), device.empty((size,), np.uint8)
    first, second = device.stream(), device.stream()
    done, start, stop = device.event(), device.event(timing=True), device.event(timing=True)
    pinned = device.pinned((size,), np.uint8)
    back = device.pinned((1024,), np.uint8)
    pinned[...] = 0
    device.zero(a, first)
    device.zero(b, first)
    first.synchronize()
    for value in range(1, 6):
        pinned[...] = value
        first.record(start)
        device.copy_in(a, pinned, first)
        first.record(done)
        first.record(stop)
        second.wait(done)
        device.copy(b, a, second)
        device.copy_out(back, b[-1024:], second)
        second.synchronize()
        assert (back == value).all()
        assert done.done()
        assert 0 < stop.seconds_since(start) < 10


@pytest.mark.gpu
def test_memory_is_given_back_by_whichever_thread(device):
    device.synchronize()
    size = 1 << 28
    device.empty((size,), np.uint8).free()
    before = device.memory()[0]
    held = [device.empty((size,), np.uint8), device.pinned((1 << 20,), np.uint8), device.stream(), device.event()]
    assert before - device.memory()[0] >= size
    failures: list[BaseException] = []

    def drop() -> None:
        try:
            held.clear()
            gc.collect()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    assert not failures
    assert device.memory()[0] >= before - (1 << 22)
    array = device.empty((size,), np.uint8)
    array.free()
    array.free()
    with pytest.raises(DeviceMemoryError, match="out of memory"):
        device.empty((1 << 42,), np.uint8)
    assert device.memory()[0] >= before - (1 << 22)


@pytest.mark.gpu
@pytest.mark.torch
def test_torch_shares_context_memory_and_order(device):
    import torch

    values = np.arange(60, dtype=np.float32).reshape(3, 20)
    array = filled(device, values)
    tensor = torch.as_tensor(array, device="cuda")
    assert tensor.data_ptr() == array.pointer
    tensor += 1
    torch.cuda.synchronize()
    np.testing.assert_array_equal(array.to_host(), values + 1)
    side = torch.cuda.Stream()
    big = torch.zeros(1 << 26, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    ours = device.stream()
    for k, stream in enumerate((side, torch.cuda.default_stream())):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            big.fill_(7 + k)
            shared, handle = gpu.from_array(big)
            assert handle == stream.cuda_stream
            assert shared.pointer == big.data_ptr()
            ours.after(handle)
            back = np.empty(big.shape, np.uint8)
            device.copy_out(back, shared, ours)
            ours.synchronize()
            assert (back == 7 + k).all()
            device.zero(shared, ours)
            ours.before(handle)
            assert int(big.max()) == 0
    made, same = gpu.empty_like(big, (4, 5), np.uint8, device)
    assert (made.data_ptr(), tuple(made.shape), made.dtype) == (same.pointer, same.shape, torch.uint8)


@pytest.mark.gpu
def test_cupy_takes_and_gives_arrays(device):
    cupy = pytest.importorskip("cupy")
    values = np.arange(60, dtype=np.uint16).reshape(3, 20)
    array = filled(device, values)
    np.testing.assert_array_equal(cupy.asarray(array[:, ::2]).get(), values[:, ::2])
    taken, stream = gpu.from_array(cupy.asarray(values).T)
    assert stream
    assert taken.device is device
    np.testing.assert_array_equal(taken.to_host(), values.T)
