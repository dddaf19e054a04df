"""OME-Zarr outputs: blocks in any order, by any process; opened again by zarr itself."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from flat_image import open_image
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_rt.contract.contract import Contract
from unet_rt.errors import OutputError
from unet_rt.images.pixels import Origin
from unet_rt.outputs.shape import Shape
from unet_rt.outputs.zarr import NO_DATA, ZarrOutput
from unet_rt.prediction.files import check_target

Array = npt.NDArray[Any]
ARRAY = Origin("array")
MASK = Shape((700, 1100), (), "", 0, np.dtype("uint8"))


def pixels(shape: Shape, seed: int = 0) -> Array:
    """(planes, K, *spatial): blobs of labels with empty regions, or noise."""
    rng = np.random.default_rng(seed)
    size = (shape.planes, max(1, shape.channels), *shape.spatial)
    if shape.dtype.kind == "f":
        return rng.normal(size=size).astype(shape.dtype)
    coarse = rng.integers(0, 4, (*size[:-2], -(-size[-2] // 64), -(-size[-1] // 64)))
    blobs = np.maximum(coarse - 1, 0).repeat(64, -2).repeat(64, -1)
    return blobs[..., : size[-2], : size[-1]].astype(shape.dtype)


def blocks(shape: Shape, block: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...], tuple[slice, ...]]]:
    for plane in range(shape.planes):
        for start in itertools.product(*(range(0, n, b) for n, b in zip(shape.spatial, block, strict=True))):
            window = tuple(slice(a, a + b) for a, b in zip(start, block, strict=True))
            yield plane, start, window


def write_all(output: ZarrOutput, whole: Array, block: tuple[int, ...]) -> None:
    for plane, start, window in blocks(output.shape, block):
        files = output.write(plane, start, whole[(plane, slice(None), *window)])
        assert all(file.is_file() for file in files)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Shape, tuple[int, ...], tuple[int, ...]]:
    """(what is written, chunk, block)."""
    spatial = draw(st.lists(st.integers(1, 40), min_size=2, max_size=3))
    free = "T" if len(spatial) == 3 else draw(st.sampled_from(["", "T", "Z", "I", "TZ", "ZT"]))
    planes = tuple(draw(st.integers(1, 3)) for _ in free)
    dtype = draw(st.sampled_from(["uint8", "uint16", "int32", "float32"]))
    chunk = tuple(draw(st.integers(1, n)) for n in spatial)
    chunk = tuple(max(c, -(-n // 4)) for c, n in zip(chunk, spatial, strict=True))  # few files
    block = tuple(c * draw(st.integers(1, 3)) for c in chunk)
    return Shape(tuple(spatial), planes, free, draw(st.sampled_from([0, 1, 3])), np.dtype(dtype)), chunk, block


@settings(max_examples=10, deadline=None)
@given(layouts())
def test_blocks_of_any_layout_come_back(layout: tuple[Shape, tuple[int, ...], tuple[int, ...]]) -> None:
    shape, chunk, block = layout
    whole = pixels(shape)
    with TemporaryDirectory() as folder:
        output = ZarrOutput.create(Path(folder) / "a.zarr", shape, chunk, ARRAY, None)
        write_all(output, whole, block)
        again = ZarrOutput.open(output.folder)
        assert (again.shape, again.chunk) == (shape, chunk)
        for plane in range(shape.planes):
            stop = tuple(-(-n // 2) for n in shape.spatial)
            start = tuple(n // 2 for n in stop)
            window = (slice(None), *map(slice, start, stop))
            expected = whole[plane][window]
            assert np.array_equal(again.read(plane, start, stop), expected if shape.channels else expected[0])
        output.finish()
        stored = zarr.open_group(output.folder, mode="r")["0"]
        letters = list(stored.metadata.dimension_names)
        assert letters == sorted(letters, key="tczyx".index)
        assert stored.shape[-len(chunk) :] == shape.spatial
        assert set(stored.chunks[: -len(chunk)]) <= {1}


def test_a_mask_is_a_label_image_with_a_pyramid(tmp_path: Path) -> None:
    shape = Shape((1300, 1100), (2,), "Z", 0, np.dtype("uint8"))
    whole = pixels(shape)
    origin = Origin("ome", tags={"PhysicalSizeZ": 2000.0, "PhysicalSizeZUnit": "nm"})
    output = ZarrOutput.create(tmp_path / "mask.ome.zarr", shape, (256, 512), origin, (0.5, 0.25))
    write_all(output, whole, (512, 512))
    output.finish()
    group = zarr.open_group(output.folder, mode="r", zarr_format=3)
    assert sorted(group.array_keys()) == ["0", "1", "2"]
    for level in range(3):
        assert np.array_equal(group[str(level)][:], whole[:, 0, :: 2**level, :: 2**level])
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5"
    assert ome["image-label"] == {}
    (multiscale,) = ome["multiscales"]
    assert multiscale["axes"] == [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
    scales = [d["coordinateTransformations"] for d in multiscale["datasets"]]
    assert scales == [[{"type": "scale", "scale": [2.0, 0.5 * f, 0.25 * f]}] for f in (1, 2, 4)]
    assert [d["path"] for d in multiscale["datasets"]] == ["0", "1", "2"]
    assert group.metadata.consolidated_metadata is not None
    # Nothing but what zarr reads, and chunks of zeros take no file.
    files = [p for p in output.folder.rglob("*") if p.is_file()]
    assert {p.name for p in files} - {"zarr.json"} <= set("0123456789")
    empty = sum(not whole[plane][(0, *window)].any() for plane, _, window in blocks(shape, (256, 512)))
    chunks = sum(p.name != "zarr.json" for p in files if (output.folder / "0") in p.parents)
    assert chunks == 2 * 6 * 3 - empty


def test_labels_and_channels_are_named_as_the_format_names_them(tmp_path: Path) -> None:
    """``image-label`` for the values of a mask, ``omero`` for channels; both stay when the pyramid is added."""
    names = {0: "background", 128: "nucleus", 255: NO_DATA}
    mask = ZarrOutput.create(tmp_path / "mask.zarr", MASK, (350, 550), ARRAY, None, names=names)
    mask.finish()
    found = zarr.open_group(mask.folder, mode="r").attrs["ome"]["image-label"]
    assert found["properties"] == [{"label-value": value, "class": name} for value, name in names.items()]
    assert [c["label-value"] for c in found["colors"]] == [0, 128, 255]
    assert [c["rgba"][3] for c in found["colors"]] == [0, 255, 0]  # background and gaps show what lies below
    for colour in found["colors"]:
        assert len(colour["rgba"]) == 4
        assert all(0 <= part <= 255 for part in colour["rgba"])
    shape = Shape((600, 500), (), "", 2, np.dtype("float32"))
    channels = ZarrOutput.create(
        tmp_path / "p.zarr", shape, (600, 500), ARRAY, None, names={0: "background", 1: "nucleus"}, highest=1
    )
    channels.finish()
    found = zarr.open_group(channels.folder, mode="r").attrs["ome"]["omero"]["channels"]
    assert [c["label"] for c in found] == ["background", "nucleus"]
    assert [c["window"] for c in found] == [{"min": 0, "max": 1, "start": 0, "end": 1}] * 2
    assert len({c["color"] for c in found}) == 2
    assert all(len(c["color"]) == 6 and int(c["color"], 16) >= 0 for c in found)
    with open_image(channels.folder, Contract(channels=("nucleus",)), network_channels=1) as source:
        assert "channel 1 of 2 by name (nucleus)" in source.reading


def test_probabilities_have_a_pyramid_of_means(tmp_path: Path) -> None:
    shape = Shape((1025, 700), (), "", 2, np.dtype("float32"))
    whole = pixels(shape)
    output = ZarrOutput.create(tmp_path / "p.zarr", shape, (512, 512), ARRAY, (0.5, 0.5))
    write_all(output, whole, (512, 512))
    output.finish()
    group = zarr.open_group(output.folder, mode="r")
    (multiscale,) = group.attrs["ome"]["multiscales"]
    assert "image-label" not in group.attrs["ome"]
    assert multiscale["axes"][0] == {"name": "c", "type": "channel"}
    even = whole[0, :, :1024]
    means = even.reshape(2, 512, 2, 350, 2).mean((2, 4))
    # Sums of 4 float32: each of 3 additions is off by at most half a unit in the last place of values below 8.
    assert np.abs(group["1"][:, :512] - means).max() <= 3 * 2**-22
    assert np.abs(group["1"][:, 512] - whole[0, :, 1024].reshape(2, 350, 2).mean(2)).max() <= 2**-22
    assert group["2"].shape == (2, 257, 175)
    # The sample at 0 of level 2 is the mean of samples 0 to 3, whose middle lies at 1.5.
    assert multiscale["datasets"][2]["coordinateTransformations"] == [
        {"type": "scale", "scale": [1.0, 2.0, 2.0]},
        {"type": "translation", "translation": [0.0, 0.75, 0.75]},
    ]


def test_float_zeros_are_stored_as_they_are(tmp_path: Path) -> None:
    shape = Shape((64, 64), (), "", 0, np.dtype("float32"))
    output = ZarrOutput.create(tmp_path / "z.zarr", shape, (64, 64), ARRAY, None)
    (file,) = output.write(0, (0, 0), np.full((64, 64), -0.0, np.float32))
    assert file.is_file()
    assert np.signbit(output.read(0, (0, 0), (64, 64))).all()


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = pixels(MASK)
    folders = [tmp_path / "once.zarr", tmp_path / "twice.zarr"]
    for folder in folders:
        output = ZarrOutput.create(folder, MASK, (256, 256), ARRAY, None)
        if folder == folders[1]:
            write_all(output, 2 - whole, (256, 512))  # chunks that are zero in the end are not zero now
            output.finish()
            (folder / "0" / "c" / "0.partial").touch()  # a writer was killed
        write_all(output, whole, (256, 512))
        output.finish()
    once, twice = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert once == twice


OTHER = """
import sys
from pathlib import Path
import numpy as np
from unet_rt.outputs.zarr import ZarrOutput
from unet_rt.outputs.zarr_metadata import NO_DATA

output, whole = ZarrOutput.open(Path(sys.argv[1])), np.load(sys.argv[2])
for number, (plane, *window) in enumerate(np.load(sys.argv[3]).tolist()):
    if number % 2:
        place = tuple(slice(a, b) for a, b in zip(window[::2], window[1::2]))
        output.write(plane, window[::2], whole[(plane, slice(None), *place)])
"""


def test_two_processes_write_one_image(tmp_path: Path) -> None:
    whole = pixels(MASK)
    output = ZarrOutput.create(tmp_path / "m.zarr", MASK, (256, 256), ARRAY, None)
    parts = list(blocks(output.shape, (256, 256)))
    np.save(tmp_path / "whole.npy", whole)
    np.save(tmp_path / "parts.npy", [[p, *(n for s in w for n in (s.start, s.stop))] for p, _, w in parts])
    command = [
        sys.executable,
        "-c",
        OTHER,
        str(output.folder),
        *(str(tmp_path / f"{n}.npy") for n in ("whole", "parts")),
    ]
    with subprocess.Popen(command) as other:
        for plane, start, window in parts[::2]:
            output.write(plane, start, whole[(plane, slice(None), *window)])
    assert other.returncode == 0
    assert np.array_equal(output.read(0, (0, 0), MASK.spatial), whole[0, 0])


def test_finishing_takes_a_few_chunks_of_memory(tmp_path: Path) -> None:
    """The windows that the pyramid reads are at most 2 x 2 chunks, whatever the image."""
    shape = Shape((4096, 4096), (), "", 0, np.dtype("uint8"))
    output = ZarrOutput.create(tmp_path / "m.zarr", shape, (512, 512), ARRAY, None)
    output.write(0, (0, 0), np.ones((2048, 4096), np.uint8))
    sizes: list[int] = []
    kind = type(output._array)
    original = kind.__getitem__

    def spied(self: Any, window: Any) -> Any:
        found = original(self, window)
        sizes.append(prod(found.shape))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__getitem__", spied)
        output.finish()
    assert len(sizes) == 8 + 2 + 1  # and none where nothing was written
    assert max(sizes) == 4 * 512 * 512


@pytest.mark.parametrize(
    ("plane", "start", "size"),
    [
        (0, (128, 0), (256, 256)),  # off the chunks
        (0, (0, 0), (200, 256)),  # ends inside a chunk
        (0, (512, 1024), (256, 76)),  # beyond the image
        (1, (0, 0), (256, 256)),  # no such plane
    ],
)
def test_blocks_that_would_share_chunks_are_refused(
    tmp_path: Path, plane: int, start: tuple[int, int], size: tuple[int, int]
) -> None:
    output = ZarrOutput.create(tmp_path / "m.zarr", MASK, (256, 256), ARRAY, None)
    with pytest.raises(ValueError, match=r"m\.zarr"):
        output.write(plane, start, np.ones(size, np.uint8))
    with pytest.raises(ValueError, match="uint16"):
        output.write(0, (0, 0), np.ones((256, 256), np.uint16))


def test_folders_in_the_way_are_refused(tmp_path: Path) -> None:
    output = ZarrOutput.create(tmp_path / "m.zarr", MASK, (256, 256), ARRAY, None)
    with pytest.raises(OutputError, match="not empty"):
        ZarrOutput.create(output.folder, MASK, (256, 256), ARRAY, None)
    foreign = zarr.open_group(tmp_path / "foreign.zarr", mode="w", zarr_format=3)
    foreign.create_array("0", shape=(8, 8), dtype="uint8")
    for folder in (tmp_path / "foreign.zarr", tmp_path / "none.zarr", tmp_path):
        with pytest.raises(OutputError, match="not an OME-Zarr that was begun here"):
            ZarrOutput.open(folder)
    with pytest.raises(OutputError, match="at most five axes"):
        ZarrOutput.create(tmp_path / "n.zarr", Shape((8, 8), (2, 2, 2), "INP", 2, MASK.dtype), (8, 8), ARRAY, None)
    assert not (tmp_path / "n.zarr").exists()


def test_a_missing_library_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(OutputError, match=r"mask\.zarr: .* zarr, which is missing; pip install .*unet-rt\[zarr\]"):
        check_target(tmp_path / "mask.zarr", overwrite=False)
    check_target(tmp_path / "mask.tif", overwrite=False)
