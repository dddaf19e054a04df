"""Hostile files, drawn by seed: good ones of every kind, changed. A file is a function of its kind and seed alone."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    255,
    1000,
    10_001,
    65_536,
    10**6,
    10**9,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    -(2**63),
)
FLOATS = (0.0, -1.0, 0.5, 1e-5, 1e5, 1e30, float("inf"), float("-inf"), float("nan"))


# --- bytes ------------------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, draw: random.Random, head: int = 0) -> bytes:
    """Some bytes changed, added, removed or doubled; half of the time within the first ``head`` of them, where given."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        size = min(len(found), head) if head and draw.random() < 0.5 else len(found)
        if not size:
            break
        at, length = draw.randrange(size), draw.choice((1, 2, 4, 8, 64))
        what = draw.randrange(7)
        if what == 0:
            found[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            found[at : at + length] = draw.randbytes(length)
        elif what == 2:
            number = draw.choice(NUMBERS) & (2 ** (8 * min(length, 8)) - 1)
            found[at : at + length] = number.to_bytes(length, draw.choice(("little", "big")))
        elif what == 3:
            del found[at : at + length]
        elif what == 4:
            found[at:at] = found[at : at + length]
        elif what == 5:
            other = draw.randrange(len(found))
            found[at : at + length] = found[other : other + length]
        else:
            del found[at:]
    return bytes(found)


# --- JSON -------------------------------------------------------------------------------------------------------------


def mutate_json(document: Any, draw: random.Random) -> Any:
    """A document with some values of another type, out of range, missing, doubled or deep."""
    found = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        waiting = [found]
        while waiting:
            value = waiting.pop()
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            for key, item in items:
                places.append((value, key))
                waiting.append(item)
        if not places:
            return strange(draw)
        holder, key = draw.choice(places)
        what = draw.randrange(5)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[draw.choice(("", "new", "__class__", str(key) * 2))] = holder[key]
        elif what == 2 and isinstance(holder[key], list) and holder[key]:
            holder[key] = holder[key] * draw.choice((0, 2, 3))
        elif what == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = draw.choice(
                (-holder[key], holder[key] + 1, holder[key] * 10**6, float(holder[key]), *NUMBERS)
            )
        else:
            holder[key] = strange(draw)
    return found


def strange(draw: random.Random) -> Any:
    deep: Any = 0
    for _ in range(draw.choice((3, 400))):
        deep = [deep]
    choices = (
        None,
        True,
        False,
        "",
        "x",
        "nan",
        "\u0000",
        "../secret.bin",
        "1/0",
        {},
        [],
        [None],
        {"a": 1},
        [[1], [2]],
        deep,
    )
    return draw.choice((*choices, *NUMBERS, *FLOATS))


# --- ONNX -------------------------------------------------------------------------------------------------------------


@cache
def networks(count: int = 64) -> list[bytes]:
    from drawn_networks import draw_network

    return [draw_network(seed)[0].SerializeToString() for seed in range(count)]


def onnx_bytes(draw: random.Random) -> bytes:
    return mutate_bytes(draw.choice(networks()), draw, 2000)


def onnx_structure(draw: random.Random) -> bytes:
    """A graph whose numbers, types, operators or wires are changed."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.ModelProto.FromString(draw.choice(networks()))
    graph = model.graph
    for _ in range(draw.choice((1, 1, 2, 3, 5))):
        node = draw.choice(graph.node)
        what = draw.randrange(16)
        if what <= 2 and node.attribute:
            a = draw.choice(node.attribute)
            if a.ints:
                a.ints[draw.randrange(len(a.ints))] = draw.choice(NUMBERS)
            elif a.type == onnx.AttributeProto.INT:
                a.i = draw.choice(NUMBERS)
            elif a.type == onnx.AttributeProto.FLOAT:
                a.f = draw.choice(FLOATS)
            elif a.type == onnx.AttributeProto.STRING:
                a.s = draw.choice((b"", b"reflect", b"cubic", b"SAME_UPPER", b"\xff\xfe", b"floor", b"align_corners"))
        elif what == 3 and node.attribute:
            a = draw.choice(node.attribute)
            if draw.random() < 0.5:
                node.attribute.remove(a)
            else:
                a.type = draw.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
        elif what == 4:
            node.op_type = draw.choice(
                [*{n.op_type for n in graph.node}, "Foo", "", "Loop", "Scan", "Unsqueeze", "Split", "Einsum"]
            )
        elif what == 5:
            node.domain = draw.choice(("com.microsoft", "nowhere", "ai.onnx", "ai.onnx.ml"))
        elif what == 6 and node.input:
            k = draw.randrange(len(node.input))
            node.input[k] = draw.choice(
                ["", *(n for m in graph.node for n in m.output), *(t.name for t in graph.initializer)]
            )
        elif what == 7 and node.input:
            del node.input[draw.randrange(len(node.input)) :]
        elif what == 8 and graph.initializer:
            t = draw.choice(graph.initializer)
            if t.dims:
                t.dims[draw.randrange(len(t.dims))] = draw.choice(NUMBERS)
        elif what == 9 and graph.initializer:
            draw.choice(graph.initializer).data_type = draw.choice((*range(24), 99, -1))
        elif what <= 11 and graph.initializer:
            t = draw.choice(graph.initializer)
            try:
                value = numpy_helper.to_array(t).copy()
            except (ValueError, TypeError, KeyError):
                continue
            if value.size and value.dtype.kind in "if":
                flat = value.reshape(-1)
                with np.errstate(all="ignore"):
                    new = np.asarray(draw.choice(NUMBERS if value.dtype.kind == "i" else FLOATS)).astype(value.dtype)
                flat[draw.randrange(flat.size)] = new
                t.CopyFrom(numpy_helper.from_array(value, t.name))
        elif what == 12:
            dims = draw.choice([*graph.input, *graph.output]).type.tensor_type.shape.dim
            if dims:
                draw.choice(dims).dim_value = draw.choice(NUMBERS)
        elif what == 13:
            nodes = list(graph.node)
            draw.shuffle(nodes)
            del graph.node[:]
            graph.node.extend(nodes)
        elif what == 14:
            model.opset_import[0].version = draw.choice((1, 6, 9, 10, 11, 13, 17, 21, 99, -1))
        else:
            name = draw.choice([n.op_type for n in graph.node])
            imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
            inner = [helper.make_node(name, ["a"], ["b"], domain=draw.choice(("", "local"))) for _ in range(2)]
            model.functions.append(helper.make_function("local", name, ["a"], ["b"], inner, imports))
            node.op_type, node.domain = name, "local"
    return model.SerializeToString()


# --- images -----------------------------------------------------------------------------------------------------------


@cache
def pixels() -> np.ndarray[Any, np.dtype[Any]]:
    from unet_rt.drawing.microscopy import microscopy

    return microscopy((72, 80), seed=3).image


@cache
def tiffs() -> list[bytes]:
    import tifffile

    image, found = pixels(), []
    stack = np.stack([image] * 3)
    forms: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (image, {}, {}),
        (image, {}, {"compression": "zlib", "predictor": True}),
        (image, {}, {"tile": (32, 32), "compression": "zlib"}),
        (image, {"bigtiff": True}, {"tile": (16, 16)}),
        (image, {"byteorder": ">"}, {"rowsperstrip": 7}),
        (stack, {"imagej": True}, {}),
        (stack, {"ome": True}, {"metadata": {"axes": "ZYX", "PhysicalSizeX": 0.5}}),
        ((image >> 8).astype(np.uint8), {}, {"compression": "lzw"}),
        (np.stack([image >> 8] * 3, -1).astype(np.uint8), {}, {"photometric": "rgb"}),
        (image.astype(np.float32), {}, {"tile": (48, 48), "compression": "zstd"}),
    ]
    for array, file, page in forms:
        stream = io.BytesIO()
        with tifffile.TiffWriter(stream, **file) as tiff:
            tiff.write(array, **page)
        found.append(stream.getvalue())
    return found


def tiff(draw: random.Random) -> bytes:
    """Often where tifffile puts the directory: at the beginning."""
    return mutate_bytes(draw.choice(tiffs()), draw, 700)


@cache
def pngs() -> list[bytes]:
    from PIL import Image

    image, found = pixels(), []
    eight = (image >> 8).astype(np.uint8)
    for array in (image, eight, np.stack([eight] * 3, -1), eight > 20):
        for form in ("PNG", "BMP") if array.dtype != np.uint16 else ("PNG",):
            stream = io.BytesIO()
            Image.fromarray(array).save(stream, form)
            found.append(stream.getvalue())
    return found


def png(draw: random.Random) -> bytes:
    return mutate_bytes(draw.choice(pngs()), draw, 120)


def npy(draw: random.Random) -> bytes:
    image = pixels()
    array = draw.choice(
        (image, image.astype(">f8"), np.asfortranarray(image), image.astype(np.float16), image[None], image > 9)
    )
    stream = io.BytesIO()
    np.save(stream, array)
    if draw.random() < 0.5:
        return mutate_bytes(stream.getvalue(), draw, 128)
    shape = list(array.shape)
    shape[draw.randrange(len(shape))] = draw.choice(("True", "None", "'a'", "1.5", "[1]", *NUMBERS))
    descr = draw.choice((repr(array.dtype.str), "'<c16'", "'|O'", "'<M8[s]'", "'<U3'", "[('a', '<u2')]", "'<f2'", "3"))
    order, sizes = draw.choice(("True", "False", "1")), ", ".join(map(str, shape))
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': ({sizes},), }}"
    header = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + array.tobytes()


# --- folders ----------------------------------------------------------------------------------------------------------


def write_zarr(folder: Path, draw: random.Random) -> None:
    """A Zarr of version 2 or 3, an array or an OME image, of which metadata or a chunk are changed."""
    import zarr

    image, version = pixels(), draw.choice((2, 3))
    names = ["zarr.json"] if version == 3 else [".zarray", ".zattrs", ".zgroup"]
    if draw.random() < 0.5:
        array = zarr.create_array(folder, shape=image.shape, dtype=image.dtype, chunks=(32, 32), zarr_format=version)
        array[:] = image
    else:
        group = zarr.create_group(folder, zarr_format=version)
        array = group.create_array("0", shape=image.shape, dtype=image.dtype, chunks=(48, 48))
        array[:] = image
        axes = [
            {"name": "y", "type": "space", "unit": "micrometer"},
            {"name": "x", "type": "space", "unit": "micrometer"},
        ]
        scale = {"coordinateTransformations": [{"type": "scale", "scale": [0.5, 0.5]}]}
        multiscales = [{"version": "0.4", "axes": axes, "datasets": [{"path": "0", **scale}]}]
        group.attrs.update(
            {"ome": {"version": "0.5", "multiscales": multiscales}} if version == 3 else {"multiscales": multiscales}
        )
    metadata = sorted(p for p in folder.rglob("*") if p.name in names)
    others = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in names)
    what = draw.randrange(8)
    if what == 0 and others:
        chunk = draw.choice(others)
        chunk.write_bytes(mutate_bytes(chunk.read_bytes(), draw))
    elif what == 1:
        path = draw.choice(metadata)
        path.write_bytes(mutate_bytes(path.read_bytes(), draw))
    elif what == 2:
        draw.choice([*metadata, *others]).unlink()
    else:
        path = draw.choice(metadata)
        path.write_text(json.dumps(mutate_json(json.loads(path.read_text()), draw)))


def write_engine(folder: Path, draw: random.Random, good: Path) -> None:
    """An engine whose spec was forged: its key is right, what it says is not."""
    from unet_rt.engine.folder import spec_key

    shutil.copytree(good, folder)
    path = folder / "spec.json"
    document = json.loads(path.read_text())
    document = mutate_json(document, draw)
    if isinstance(document, dict) and draw.random() < 0.9:
        try:
            document["key"] = spec_key(document)
        except (ValueError, RecursionError):
            pass
    try:
        path.write_text(json.dumps(document))
    except RecursionError:
        path.write_text("[" * 100_000)


def archive(draw: random.Random, packed: bytes) -> bytes:
    """An archive with changed bytes, or with members of other names, kinds and sizes."""
    if draw.random() < 0.4:
        spec_end = 512 + len(packed.split(b"\0", 1)[0]) + 8192
        return mutate_bytes(packed, draw, spec_end)
    stream = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(packed)) as given,
        tarfile.open(fileobj=stream, mode="w", format=draw.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as made,
    ):
        members = given.getmembers()
        victim = draw.randrange(len(members))
        for k, member in enumerate(members):
            data = given.extractfile(member)
            content = b"" if data is None else data.read()
            if k == victim:
                what = draw.randrange(8)
                if what == 0:
                    member.name = draw.choice(
                        ("../secret.bin", "/etc/x", "a/b", "..", "", "x" * 300, "spec.json", "a\\b", "c:d")
                    )
                elif what == 1:
                    member.type = draw.choice(
                        (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE)
                    )
                    member.linkname = "../secret.bin"
                elif what == 2:
                    content = mutate_bytes(content, draw, 4000)
                    member.size = len(content)
                elif what == 3:
                    key = draw.choice(
                        (
                            "size",
                            "mtime",
                            "path",
                            "GNU.sparse.size",
                            "GNU.sparse.map",
                            "GNU.sparse.major",
                            "hdrcharset",
                            "uid",
                        )
                    )
                    member.pax_headers = {
                        key: draw.choice(("x", "-1", "1e99", "nan", "0", "99999999999", "\u0000", "inf"))
                    }
                elif what == 4:
                    continue
                elif what == 5:
                    made.addfile(copy.copy(member), io.BytesIO(content))
                elif what == 6 and member.name == "spec.json":
                    try:
                        content = json.dumps(mutate_json(json.loads(content), draw)).encode()
                    except RecursionError:
                        content = b"[" * 100_000
                    member.size = len(content)
                else:
                    member.mode, member.mtime, member.uid = draw.choice(
                        ((0, 0, 0), (0o7777, -1, 2**40), (0o644, 2**40, 1))
                    )
            try:
                made.addfile(member, io.BytesIO(content) if member.isreg() else None)
            except (ValueError, OSError, tarfile.TarError):
                continue
    return stream.getvalue()


def draw_of(kind: str, seed: int) -> random.Random:
    """The same numbers for the same kind and seed, in every version of Python."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{kind} {seed}".encode()).digest()[:8], "little"))


FILES: dict[str, tuple[str, Callable[[random.Random], bytes]]] = {
    "onnx-bytes": ("m.onnx", onnx_bytes),
    "onnx-structure": ("m.onnx", onnx_structure),
    "tiff": ("i.tif", tiff),
    "png": ("i.png", png),
    "npy": ("i.npy", npy),
}
KINDS = (*FILES, "zarr", "spec", "archive")
