"""The C interface called as C calls it: what it computes, what it refuses, and that nothing makes it crash."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import flat_kernels as kernels
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unet_rt
from unet_rt.kernels import native

OK, CALL, DTYPE, SHAPE, PLACE, NUMBER, OVERLAP, MEMORY, DEVICE = range(9)  # as in unet_rt.h
DTYPES = [np.dtype(d) for d in ("u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8")]
Pointer, Int, Long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Array(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("data", Pointer),
        ("dtype", Int),
        ("axes", Int),
        ("shape", Long * 5),
        ("stride", Long * 5),
    ]


class Error(ctypes.Structure):
    _fields_: ClassVar[Any] = [("code", Int), ("text", ctypes.c_char * 508)]


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [("size", ctypes.c_size_t), *fields.items()]})


PLACES = {"source_start": Pointer, "target_start": Pointer, "extent": Pointer}
TAIL = {"threads": Int, "on_device": Int, "reserved": Int}
CALLS: dict[str, type[Any]] = {
    "gather": structure(
        "Gather", window=Array, out=Array, starts=Pointer, image_shape=Pointer, window_start=Pointer, offset=Pointer,
        divisor=Pointer, low=Pointer, high=Pointer, constant=ctypes.c_double, border=Int, **TAIL,
    ),
    "stitch": structure("Stitch", tiles=Array, out=Array, **PLACES, threshold=Pointer, values=Pointer, op=Int, **TAIL),
    "blend": structure(
        "Blend", tiles=Array, weight=Array, total=Array, weight_total=Array, **PLACES, threads=Int, on_device=Int
    ),
    "blend_finish": structure(
        "Finish", total=Array, weight_total=Array, out=Array, threshold=Pointer, values=Pointer, op=Int, threads=Int
    ),
    "crop_concat": structure("Concat", skip=Array, up=Array, out=Array, offset=Pointer, threads=Int, reserved=Int),
    "histogram": structure("Histogram", values=Array, counts=Pointer, threads=Int, reserved=Int),
}  # fmt: skip
COUNTING = ("gather", "blend_finish")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    folder = Path(native.cpu().__file__).parent
    path = next(path for path in sorted(folder.glob("*unet_rt.*")) if path.suffix in (".so", ".dylib", ".dll"))
    return ctypes.CDLL(str(path))


def described(array: Any) -> Array:
    if isinstance(array, Array):
        return array
    shape, stride = (Long * 5)(*array.shape), (Long * 5)(*array.strides)
    return Array(array.ctypes.data, DTYPES.index(array.dtype), array.ndim, shape, stride)


def run(library: ctypes.CDLL, name: str, **arguments: Any) -> tuple[int, str]:
    """The code of a call and its text; arrays are described, tables pass by their addresses."""
    call, kinds = CALLS[name](), dict(CALLS[name]._fields_)
    call.size = arguments.pop("size", ctypes.sizeof(call))
    for key, value in arguments.items():
        if kinds[key] is Array:
            setattr(call, key, described(value))
        else:
            setattr(call, key, value.ctypes.data if isinstance(value, np.ndarray) else value)
    error, count = Error(code=-1), Long(-1)
    counter = (ctypes.byref(count),) if name in COUNTING else ()
    code = getattr(library, f"unet_rt_{name}")(ctypes.byref(call), *counter, ctypes.byref(error))
    assert code == error.code
    assert bool(error.text) == bool(code), "an error has a text, and nothing else has"
    return code, error.text.decode()


def table(*rows: Any) -> Any:
    return np.array(rows, np.int64)


def good(name: str) -> dict[str, Any]:
    """The arguments of a call that is right, on arrays of its own."""
    rng = np.random.default_rng(0)
    tiles, total = rng.normal(size=(2, 3, 8, 9)).astype("f4"), rng.normal(size=(3, 20, 20)).astype("f4")
    places = {
        "source_start": table((1, 1), (0, 2)),
        "target_start": table((0, 0), (9, 9)),
        "extent": table((7, 6), (5, 7)),
    }
    ones = np.ones((20, 20), "f4")
    return {
        "gather": {
            "window": rng.integers(0, 99, (1, 40, 50)).astype("u2"), "out": np.zeros((2, 1, 16, 17), "f4"),
            "starts": table((-3, 5), (30, 40)), "offset": np.array([3.0]), "divisor": np.array([2.0]),
        },
        "stitch": {"tiles": tiles, "out": np.zeros((20, 20), "u1"), "op": 3, **places},
        "blend": {"tiles": tiles, "weight": ones[:8, :9].copy(), "total": total, "weight_total": ones, **places},
        "blend_finish": {"total": total, "weight_total": ones, "out": np.zeros((3, 20, 20), "f4"), "op": 1},
        "crop_concat": {
            "skip": rng.normal(size=(1, 2, 12, 12)).astype("f4"), "up": rng.normal(size=(1, 3, 8, 9)).astype("f4"),
            "out": np.zeros((1, 5, 8, 9), "f4"),
        },
        "histogram": {"values": rng.integers(0, 256, (7, 9)).astype("u1"), "counts": np.zeros(256, np.int64)},
    }[name]  # fmt: skip


WRITTEN = {
    "gather": "out",
    "stitch": "out",
    "blend": "total",
    "blend_finish": "out",
    "crop_concat": "out",
    "histogram": "counts",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_from_c_gives_what_python_gives(library: ctypes.CDLL, name: str) -> None:
    given_here, expected = good(name), good(name)
    assert run(library, name, **given_here) == (OK, "")
    e = expected
    if name == "gather":
        kernels.tile_gather(e["window"], e["starts"], e["out"], offset=3.0, divisor=2.0)
    elif name == "stitch":
        kernels.tile_stitch(e["tiles"], e["source_start"], e["target_start"], e["extent"], e["out"], op="argmax")
    elif name == "blend":
        places = (e["source_start"], e["target_start"], e["extent"])
        kernels.tile_blend(e["tiles"], *places, e["weight"], e["total"], e["weight_total"])
    elif name == "blend_finish":
        kernels.blend_finish(e["total"], e["weight_total"], e["out"], op="softmax")
    elif name == "crop_concat":
        kernels.crop_concat(e["skip"], e["up"], e["out"])
    else:
        e["counts"] += np.bincount(e["values"].ravel(), minlength=256)
    np.testing.assert_array_equal(given_here[WRITTEN[name]], e[WRITTEN[name]])
    assert given_here[WRITTEN[name]].any()


def changed(key: str, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    """A change of one array's description."""

    def change(arguments: dict[str, Any]) -> None:
        array = described(arguments[key])
        for field, value in fields.items():
            if isinstance(value, tuple):
                getattr(array, field)[value[0]] = value[1]
            else:
                setattr(array, field, value)
        arguments[key] = array

    return change


def put(**arguments: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda before: before.update(arguments)


def sharing(key: str, other: str) -> Callable[[dict[str, Any]], Any]:
    """One array begins where another one does."""
    return lambda arguments: changed(key, data=described(arguments[other]).data)(arguments)


REFUSED = [
    *[(name, "an older or newer struct", put(size=8), CALL) for name in CALLS],
    *[(name, "fewer than no threads", put(threads=-1), CALL) for name in CALLS],
    ("gather", "a null window", changed("window", data=None), CALL),
    ("gather", "no dtype", changed("window", dtype=99), DTYPE),
    ("gather", "integers out", changed("out", dtype=0), DTYPE),
    ("gather", "axes beyond the struct", changed("window", axes=2**30), SHAPE),
    ("gather", "no axis", changed("out", axes=-1), SHAPE),
    ("gather", "a negative size", changed("window", shape=(1, -5)), SHAPE),
    ("gather", "a size beyond 2^48", changed("window", shape=(1, 2**49)), SHAPE),
    ("gather", "more elements than 64 bits count", changed("window", shape=(1, 2**48), axes=2, stride=(0, 2**60)), SHAPE),
    ("gather", "a stride beyond memory", changed("window", stride=(1, -(2**63))), SHAPE),
    ("gather", "a stride before memory", changed("window", stride=(1, -(2**55))), SHAPE),
    ("gather", "channels that differ", changed("out", shape=(1, 2)), SHAPE),
    ("gather", "an output that lies over itself", changed("out", stride=(2, 4)), OVERLAP),
    ("gather", "an output in its window", sharing("out", "window"), OVERLAP),
    ("gather", "no starts", put(starts=None), CALL),
    ("gather", "starts at an odd address", put(starts=np.zeros(64, "u1")[1:]), CALL),
    ("gather", "a start beyond 2^48", put(starts=table((2**62, 0), (0, 0))), PLACE),
    ("gather", "a window outside its image", put(window_start=table(1, 1)), SHAPE),
    ("gather", "pixels that the window lacks", put(image_shape=table(400, 500), window_start=table(9, 9)), PLACE),
    ("gather", "no such border", put(border=7), CALL),
    ("gather", "a divisor of 0", put(divisor=np.array([0.0])), NUMBER),
    ("gather", "an offset that is no number", put(offset=np.array([np.nan])), NUMBER),
    ("gather", "an empty clip", put(low=np.array([2.0]), high=np.array([1.0])), NUMBER),
    ("gather", "a divisor without an offset", put(offset=None), CALL),
    ("gather", "tables on a device", put(on_device=1), CALL),
    ("stitch", "a part outside its tile", put(source_start=table((2, 1), (0, 2))), PLACE),
    ("stitch", "a part outside the output", put(target_start=table((0, 0), (2**62, 9))), PLACE),
    ("stitch", "a part of negative size", put(extent=table((-1, 6), (5, 7))), PLACE),
    ("stitch", "parts that share places", put(target_start=table((0, 0), (6, 5))), OVERLAP),
    ("stitch", "an output in its tiles", sharing("out", "tiles"), OVERLAP),
    ("stitch", "no such operation", put(op=5), CALL),
    ("stitch", "a threshold without bounds", lambda a: a.update(op=4, out=np.zeros((3, 20, 20), "u1")), CALL),
    ("stitch", "labels as floats", put(out=np.zeros((20, 20), "f4")), DTYPE),
    ("stitch", "more classes than labels", lambda a: a.update(tiles=np.zeros((2, 257, 8, 9), "f4")), NUMBER),
    ("blend", "a weight of another shape", put(weight=np.ones((8, 8), "f4")), SHAPE),
    ("blend", "totals that share memory", sharing("total", "weight_total"), OVERLAP),
    ("blend", "a total in its tiles", sharing("total", "tiles"), OVERLAP),
    ("blend_finish", "an output in its total", sharing("out", "total"), OVERLAP),
    ("blend_finish", "other spatial shapes", put(out=np.zeros((3, 20, 19), "f4")), SHAPE),
    ("crop_concat", "a skip that is too small", put(skip=np.ones((1, 2, 7, 12), "f4")), SHAPE),
    ("crop_concat", "an offset outside the skip", put(offset=table(5, 0)), PLACE),
    ("crop_concat", "dtypes that differ", put(up=np.ones((1, 3, 8, 9), "f2")), DTYPE),
    ("crop_concat", "a skip in its output", sharing("skip", "out"), OVERLAP),
    ("histogram", "values that are not in C order", put(values=np.zeros((6, 6), "u1").T[:, ::2]), SHAPE),
    ("histogram", "values of 32 bits", put(values=np.zeros(6, "u4")), DTYPE),
    ("histogram", "counts among the values", lambda a: a.update(values=a["counts"].view("u1")), OVERLAP),
    ("histogram", "no counts", put(counts=None), CALL),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "change", "code"), REFUSED, ids=[f"{n}: {w}" for n, w, _, _ in REFUSED])
def test_what_cannot_be_right_is_refused_and_nothing_written(
    library: ctypes.CDLL, name: str, what: str, change: Callable[[dict[str, Any]], Any], code: int
) -> None:
    arguments = good(name)
    before, written = arguments[WRITTEN[name]].copy(), arguments[WRITTEN[name]]
    change(arguments)
    found, text = run(library, name, **arguments)
    assert (found, bool(text)) == (code, True), text
    np.testing.assert_array_equal(written, before)


def test_the_interface_says_which_it_is(library: ctypes.CDLL) -> None:
    library.unet_rt_version.restype = ctypes.c_char_p
    header = (Path(unet_rt.get_include()) / "unet_rt.h").read_text(encoding="utf-8")
    assert f"#define UNET_RT_INTERFACE {library.unet_rt_interface()} " in header
    assert library.unet_rt_version().decode() == unet_rt.__version__
    for name in CALLS:  # no call at all, and nobody who wants to know why
        assert getattr(library, f"unet_rt_{name}")(None, *([None] if name in COUNTING else []), None) == CALL


def test_channels_of_one_image_share_no_memory(library: ctypes.CDLL) -> None:
    """Interleaved with its output, or beside it in the same rows: told from memory that is shared."""
    image = np.zeros((40, 50, 2), "f4")
    image[..., 0] = np.arange(2000).reshape(40, 50)
    assert (
        run(library, "gather", window=image[None, ..., 0], out=image[None, None, ..., 1], starts=table((0, 0)))[0] == OK
    )
    np.testing.assert_array_equal(image[..., 1], image[..., 0])
    halves = np.zeros((40, 100), "f4")
    halves[:, :50] = image[..., 0]
    call = {"window": halves[None, :, :50], "starts": table((0, 0))}
    assert run(library, "gather", **call, out=halves[None, None, :, 50:])[0] == OK
    np.testing.assert_array_equal(halves[:, 50:], halves[:, :50])
    assert run(library, "gather", **call, out=halves[None, None, :, 49:99])[0] == OVERLAP


small = st.integers(-2, 5)
number = st.one_of(small, st.sampled_from([-(2**63), 2**63 - 1, -(2**48), 2**48, 2**31, -1]))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_call_leaves_its_memory(library: ctypes.CDLL, data: st.DataObject) -> None:
    """Descriptions at random, of arrays whose every element lies inside one block: what is accepted stays inside."""
    name = data.draw(st.sampled_from(sorted(CALLS)))
    block = np.zeros(1 << 16, "u1")
    arguments = good(name)
    tables = []
    for key, kind in CALLS[name]._fields_[1:]:
        if kind is Array and data.draw(st.booleans()):
            array = described(arguments[key])
            array.data = block.ctypes.data + (1 << 15) + data.draw(st.integers(-64, 64))
            for axis in range(5):
                array.shape[axis] = data.draw(small)
                array.stride[axis] = data.draw(st.integers(-300, 300))
            array.axes = data.draw(st.integers(-1, 6))
            array.dtype = data.draw(st.integers(-1, 9))
            arguments[key] = array
        elif kind is Pointer and key in arguments and key != "counts" and data.draw(st.booleans()):
            # The most rows and axes that the arrays above may have; numbers of any size.
            rows = [data.draw(number) for _ in range(15)] if arguments[key].dtype == np.int64 else [1.0] * 15
            tables.append(np.array(rows, arguments[key].dtype))
            arguments[key] = tables[-1]
        elif kind is Int:
            arguments[key] = data.draw(st.integers(-1, 6)) if key != "on_device" else 0
    if name == "histogram":
        tables.append(np.zeros(1 << 16, np.int64))
        arguments["counts"] = tables[-1]
    needs = {"offset", "divisor"}
    for key in needs & arguments.keys():
        tables.append(np.ones(8))
        arguments[key] = tables[-1]
    if name in ("stitch", "blend_finish"):
        tables += [np.zeros(300, "f4"), np.zeros(300, "u1")]
        arguments |= {"threshold": tables[-2], "values": tables[-1]}
    if name in ("stitch", "blend"):  # as many rows as any array has
        for key in PLACES:
            if arguments[key].size < 15:
                tables.append(np.resize(arguments[key], 15))
                arguments[key] = tables[-1]
    if name == "gather" and arguments["starts"].size < 15:
        tables.append(np.resize(arguments["starts"], 15))
        arguments["starts"] = tables[-1]
    code, text = run(library, name, **arguments)
    assert code in range(MEMORY), text


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("cl") is None, reason="there is no C compiler")
def test_the_example_builds_out_of_tree_and_finds_the_whole_image_s_mask(tmp_path: Path) -> None:
    if not (Path(unet_rt.get_cmake_dir()) / "unet_rt-config.cmake").is_file():
        pytest.skip("unet_rt is not installed: CMake writes its configuration at the installation")
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        pytest.skip("there is no CMake")
    source, build = Path(__file__).parents[2] / "examples" / "c", tmp_path / "build"
    strict = "-std=c99 -pedantic -Wall -Wextra -Werror"
    options = [f"-Dunet_rt_DIR={unet_rt.get_cmake_dir()}", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_C_FLAGS={strict}"]
    for command in ([cmake, "-S", str(source), "-B", str(build), *options], [cmake, "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    mask = tmp_path / "mask.pgm"
    done = subprocess.run([str(build / "segment"), str(mask)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 pixels differ" in done.stdout
    assert "refused, as it should be: values are not in C order" in done.stdout
    assert 0.2 < np.frombuffer(mask.read_bytes()[-700 * 930 :], "u1").mean() < 0.8
