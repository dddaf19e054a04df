"""Microscopes' own files by bioio: CZI as Zeiss's library writes it, LIF and ND2 by bioio's interface alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flat_image import open_image

import unet_rt as urt
from unet_rt.contract.contract import Contract
from unet_rt.drawing.microscopy import microscopy

ANY = Contract()
STACK = np.stack([microscopy((90, 120), seed=seed).image for seed in range(12)]).reshape(
    2, 2, 3, 90, 120
)  # T, C, Z, Y, X


class FakeImage:
    """bioio's BioImage: two scenes, the second of other pixels."""

    scenes = ("Series 1", "Series 2")
    resolution_levels = (0,)
    channel_names = ("DAPI", "GFP")
    physical_pixel_sizes = SimpleNamespace(Z=2.0, Y=0.5, X=0.25)

    def __init__(self, path: Path) -> None:
        self.scene = 0

    def set_scene(self, scene: int) -> None:
        self.scene = scene

    def set_resolution_level(self, level: int) -> None:
        pass

    @property
    def xarray_dask_data(self) -> Any:
        dask = pytest.importorskip("dask.array")
        data = dask.from_array(STACK + self.scene, chunks=(1, 1, 1, 90, 120))
        return SimpleNamespace(shape=data.shape, dims=tuple("TCZYX"), data=data)


@pytest.fixture
def bioio(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("bioio")
    module.BioImage = FakeImage  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bioio", module)
    return module


@pytest.mark.parametrize("suffix", [".lif", ".nd2"])
def test_scenes_channels_and_sizes_by_the_interface(suffix: str, tmp_path: Path, bioio: ModuleType) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"whatever")
    with pytest.raises(urt.ImageError, match="holds 2 images: 0 Series 1, 1 Series 2; choose one with --series"):
        open_image(path, ANY)
    with pytest.raises(urt.ImageError, match="no single series is called 'x'"):
        open_image(path, ANY, series="x")
    for asked in (1, "1", "Series 2"):
        with open_image(path, ANY, series=asked, channels="GFP", network_channels=1, spatial=3) as source:
            assert "series 1 of 2 (Series 2)" in source.reading
            assert source.pixel_size_um == (2.0, 0.5, 0.25)
            expected = STACK[1, 1, 1:3, 20:80, 33:90] + 1
            np.testing.assert_array_equal(source.read(1, (1, 20, 33), (3, 80, 90))[0], expected)


def test_a_missing_reader_and_damage_are_named(tmp_path: Path, bioio: ModuleType) -> None:
    class UnsupportedFileFormatError(Exception):
        pass

    (tmp_path / "a.czi").write_bytes(b"ZISRAWFILE")
    (tmp_path / "a.oir").write_bytes(b"OLYMPUSRAWFORMAT")
    for file, error, message in (
        (
            "a.oir",
            UnsupportedFileFormatError("none"),
            r"OIR \(Olympus\) needs a reader .*pip install bioio bioio-bioformats",
        ),
        ("a.czi", UnsupportedFileFormatError("none"), r"CZI \(Zeiss\) needs a reader .*pip install 'unet-rt\[czi\]'"),
        ("a.czi", ValueError("bad"), r"not a readable CZI \(Zeiss\) file \(bad\)"),
    ):

        def fail(path: Path, error: Exception = error) -> None:
            raise error

        bioio.BioImage = fail  # type: ignore[attr-defined]
        with pytest.raises(urt.ImageError, match=message):
            open_image(tmp_path / file, ANY)


def test_czi(tmp_path: Path) -> None:
    """Written by Zeiss's own library; of one scene."""
    pytest.importorskip("bioio_czi", reason="needs bioio and bioio-czi (make test-bioio)")
    czi = pytest.importorskip("pylibCZIrw.czi", reason="needs pylibCZIrw (make test-bioio)")
    path = tmp_path / "cells.czi"
    with czi.create_czi(str(path)) as document:
        for t, c, z in np.ndindex(STACK.shape[:3]):
            document.write(STACK[t, c, z][..., None], plane={"T": t, "C": c, "Z": z})
        document.write_metadata(
            "cells", channel_names={0: "DAPI", 1: "GFP"}, scale_x=0.25e-6, scale_y=0.5e-6, scale_z=2e-6
        )
    with open_image(path, ANY, channels="GFP", network_channels=1, spatial=3) as source:
        assert source.pixel_size_um == pytest.approx((2.0, 0.5, 0.25))
        assert (source.planes, source.plane_axes) == (2, "T")
        for t in range(2):
            np.testing.assert_array_equal(source.read(t, (0, 20, 33), (3, 80, 90))[0], STACK[t, 1, :, 20:80, 33:90])
    with open_image(path, ANY, network_channels=2) as source:
        np.testing.assert_array_equal(source.read(4, (0, 0), (90, 120)), STACK[1, :, 1])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(urt.ImageError, match=r"cells\.czi: "):
        open_image(path, ANY)
