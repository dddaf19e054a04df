"""Which level of a pyramid is read, and in whose pixels the result is."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from flat_image import open_image
from hypothesis import given
from hypothesis import strategies as st

import unet_rt as urt
from unet_rt.contract.contract import Contract
from unet_rt.drawing.microscopy import microscopy
from unet_rt.images.levels import FINE_ENOUGH, fine_enough, level_of_size, level_sizes, parse_level
from unet_rt.prediction import cluster
from unet_rt.prediction.request import Reading, Tables
from unet_rt.tiling.resample import resample

FACTORS = (1, 2, 4, 8)
SIZE_UM = 0.2517  # of the finest level, as scanners measure it: level 1 has a nominal 0.5 um
TILE = (192, 192)


@cache
def drawn() -> tuple[np.ndarray, ...]:
    """Microscopy at four pixel sizes; level 1 is the one that the shipped network was trained for."""
    image = microscopy((157, 203), seed=12).image
    levels = []
    for factor in FACTORS:
        shape = tuple(max(1, 2 * n // factor) for n in image.shape)  # cut to whole pixels, as scanners do
        levels.append(np.rint(resample(image[None], (0, 0), (0, 0), shape, image.shape, shape)[0]).astype(image.dtype))
    return tuple(levels)


def write_tiff(path: Path, *, size: bool = True) -> Path:
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        how: dict[str, Any] = {"photometric": "minisblack", "tile": (128, 128), "metadata": None}
        per_cm = {"resolution": (1e4 / SIZE_UM,) * 2, "resolutionunit": "CENTIMETER"} if size else {}
        tif.write(drawn()[0], subifds=len(FACTORS) - 1, **how, **per_cm)
        for pixels in drawn()[1:]:
            tif.write(pixels, subfiletype=1, **how)
    return path


def write_zarr(folder: Path, *, size: bool = True) -> Path:
    zarr = pytest.importorskip("zarr")
    group = zarr.create_group(folder)
    datasets = []
    for number, (factor, pixels) in enumerate(zip(FACTORS, drawn(), strict=True)):
        group.create_array(str(number), data=pixels, chunks=(128, 128))
        scale = {"type": "scale", "scale": [SIZE_UM * 1000 * factor] * 2}
        datasets.append({"path": str(number), "coordinateTransformations": [scale]})
    axes = [{"name": name, "type": "space"} | ({"unit": "nanometer"} if size else {}) for name in "yx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    return folder


def write_slide(path: Path) -> Path:
    pytest.importorskip("tiffslide")
    height, width = drawn()[0].shape
    about = f"Aperio Image Library v12.0.15 \r\n{width}x{height} [0,0 {width}x{height}] (240x240)"
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        how: dict[str, Any] = {"photometric": "rgb", "metadata": None, "software": False}
        for number, grey in enumerate(drawn()):
            pixels = np.stack([(grey >> 8).astype(np.uint8)] * 3, -1)
            said = f"|AppMag = 40|MPP = {SIZE_UM}" if number == 0 else " -> level"
            tif.write(pixels, tile=(240, 240), description=about + said, **how)
            if number == 0:
                tif.write(pixels[::16, ::16], rowsperstrip=16, description=f"{about} -> thumbnail", **how)
    return path


WRITERS = [
    pytest.param(write_tiff, "a.tif", id="tiff"),
    pytest.param(write_zarr, "a.zarr", id="zarr"),
    pytest.param(write_slide, "a.svs", id="slide"),
]


# --- which level ------------------------------------------------------------------------------------------------------


def test_levels_are_told_by_number_or_pixel_size() -> None:
    assert parse_level(None) is None
    assert [parse_level(text) for text in (2, "2", " 3 ")] == [2, 2, 3]
    assert [parse_level(text) for text in ("0.5um", "0.5 um", "0.5µm", "0.5μm", "2UM")] == [0.5, 0.5, 0.5, 0.5, 2.0]
    for text in ("", "auto", "0.5", "0um", "-1um", "um", "nanum", "infum", "1,2um", "1mm"):
        with pytest.raises(urt.ContractError, match=r"--level .*0\.5um"):
            parse_level(text)


sizes_um = st.floats(0.05, 50)


@given(
    finest=st.tuples(sizes_um, sizes_um, sizes_um),
    wanted=st.tuples(sizes_um, sizes_um, sizes_um),
    factors=st.lists(st.tuples(*[st.sampled_from([1, 2, 4])] * 3), max_size=4),
)
def test_the_coarsest_level_that_is_fine_enough(
    finest: tuple[float, ...], wanted: tuple[float, ...], factors: list[tuple[int, ...]]
) -> None:
    """None of its pixels is larger than wanted, or than those there are anyway; every coarser level has one that is."""
    shapes = [np.array([512, 1024, 2048])]
    for factor in factors:
        shapes.append(shapes[-1] // np.array(factor))
    sizes = level_sizes([tuple(int(n) for n in s) for s in shapes if s.min() > 0], 0, finest)
    picked = fine_enough(wanted, sizes)
    most = [max(w * (1 + FINE_ENOUGH), f) for w, f in zip(wanted, finest, strict=True)]

    def fine(level: tuple[float, ...]) -> bool:
        return all(um <= bound for um, bound in zip(level, most, strict=True))

    assert fine(sizes[picked])
    assert not any(fine(level) for level in sizes[picked + 1 :] if level != sizes[picked])


def test_sizes_follow_from_one_level() -> None:
    shapes = [(1000, 800), (500, 400), (125, 100)]
    sizes = ((0.5, 0.25), (1.0, 0.5), (4.0, 2.0))
    for opened in range(3):
        assert level_sizes(shapes, opened, sizes[opened]) == pytest.approx(np.array(sizes))
    assert level_sizes(shapes, 1, None) == ()
    assert level_sizes(shapes, 1, None, finest_um=(0.5, 0.25)) == sizes
    said = ((1.0, 1.0), (2.1, 2.0), (8.0, 8.0))  # what a file says of its levels wins over their numbers of pixels
    assert level_sizes(shapes, 0, (1.0, 1.0), said=said) == said
    assert level_sizes(shapes, 0, (1.0, 1.0), said=said, finest_um=(2, 2))[1] == (4.2, 4.0)
    assert level_of_size(0.5, ((9.0, 0.27, 0.27), (9.0, 0.52, 0.52)), "a") == 1  # along Y and X, whatever the slices
    assert fine_enough((1.0, 1.0, 1.0), ((9.0, 0.25, 0.25), (9.0, 0.5, 0.5), (9.0, 1.0, 1.0), (9.0, 2.0, 2.0))) == 2


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_a_level_by_its_pixel_size(write: Any, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    options: dict[str, Any] = {"channels": (0,), "network_channels": 1}
    for level, um in enumerate(("0.25um", "0.5um", "1um", "2um")):
        with open_image(path, Contract(), level=um, **options) as source:
            assert source.level == level
            assert source.shape == drawn()[level].shape
            assert f"level {level} of 4" in source.reading
    for wanted, level in [(0.1, 0), (0.25, 0), (0.49, 0), (0.5, 1), (0.9, 1), (1.0, 2), (100.0, 3)]:
        with open_image(path, Contract(), wanted_um=(wanted, wanted), **options) as source:
            assert source.level == level, wanted
    with open_image(path, Contract(), level=2, wanted_um=(0.1, 0.1), **options) as source:
        assert source.level == 2, "what the user says wins"
    with pytest.raises(urt.ImageError, match=r"no level has pixels of 4 um \(there are 0\.2517, 0\.50.*--resample"):
        open_image(path, Contract(), level="4um", **options)


@pytest.mark.parametrize(("write", "name"), WRITERS[:2])
def test_the_user_s_pixel_size_is_that_of_the_finest_level(write: Any, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, size=False)
    with pytest.raises(urt.ImageError, match=r"does not say its pixel size.*--pixel-size"):
        open_image(path, Contract(), level="1um")
    with open_image(path, Contract(), wanted_um=(1, 1)) as source:
        assert (source.level, source.pixel_size_um) == (0, None)
    for options in ({"level": "0.5um"}, {"level": 1}, {"wanted_um": (0.6, 0.6)}):
        with open_image(path, Contract(), pixel_size_um=(0.25,), **options) as source:
            assert source.level == 1
            assert source.pixel_size_um == pytest.approx((0.5, 0.5))
    with pytest.raises(urt.ContractError, match="does not fit an image of 2 axes"):
        open_image(path, Contract(), pixel_size_um=(1, 1, 1))
    with open_image(drawn()[0], Contract(), level="0.5um", pixel_size_um=(0.5, 0.5)) as source:
        assert source.shape == drawn()[0].shape


def test_other_levels_are_not_gone_through(tmp_path: Path) -> None:
    """Colours for a network of one channel are compared over the whole image: of the level that is read, not of another."""
    levels = [np.stack([drawn()[0]] * 3, -1), np.stack([drawn()[1]] * 3, -1)]
    levels[0][0, 0] = (1, 2, 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(levels[0], subifds=1, photometric="rgb", tile=(128, 128))
        tif.write(levels[1], subfiletype=1, photometric="rgb", tile=(128, 128))
    options: dict[str, Any] = {"network_channels": 1, "pixel_size_um": (0.25, 0.25)}
    with open_image(tmp_path / "a.tif", Contract(), wanted_um=(0.5, 0.5), **options) as source:
        assert source.level == 1
    with pytest.raises(urt.ContractError, match="a colour image"):
        open_image(tmp_path / "a.tif", Contract(), level=0, **options)


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(engine_folder: Path) -> Any:
    with urt.load(engine_folder) as loaded:
        loaded.spec = replace(loaded.spec, halo="exact", halo_limit=None)
        yield loaded


def trained_at(engine: urt.Engine, um: float, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = replace(engine.spec.contract, pixel_size_um=(um, um))
    monkeypatch.setattr(engine, "spec", replace(engine.spec, contract=contract))


@pytest.mark.onnxruntime
def test_resampling_starts_at_the_coarsest_level_that_is_fine_enough(
    engine: urt.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result has the pixels of the level that was read."""
    path = write_tiff(tmp_path / "a.tif")
    size = SIZE_UM * 2
    trained_at(engine, size, monkeypatch)
    reports: list[urt.RunReport] = []
    mask = urt.predict(engine, path, resample=True, tile=TILE, report=reports.append)
    np.testing.assert_array_equal(mask, urt.predict(engine, drawn()[1], tile=TILE))
    assert 0.05 < mask.mean() < 0.7
    assert "level 1 of 4" in reports[0].reading
    assert any("of level 1, 0.5034 um, were brought to 0.5034 um" in note for note in reports[0].notes)
    trained_at(engine, 0.8, monkeypatch)
    out = urt.predict(engine, path, out=tmp_path / "mask.ome.tif", resample=True, tile=TILE)
    expected = urt.predict(engine, drawn()[1], pixel_size_um=(size, size), resample=True, tile=TILE)
    np.testing.assert_array_equal(tifffile.imread(out), expected)
    with open_image(out, Contract()) as again:
        assert again.pixel_size_um == pytest.approx((size, size), rel=1e-3)
    # No level is fine enough: the finest is brought to the size of training, as any image is.
    trained_at(engine, 0.2, monkeypatch)
    mask = urt.predict(engine, path, resample=True, tile=TILE)
    expected = urt.predict(engine, drawn()[0], pixel_size_um=(SIZE_UM, SIZE_UM), resample=True, tile=TILE)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.onnxruntime
def test_a_resumed_run_reads_the_same_level(
    engine: urt.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen by pixel size or named by its number, it is the same image; another level is another one."""
    path, out = write_tiff(tmp_path / "a.tif"), tmp_path / "mask.tif"
    monkeypatch.setattr("unet_rt.prediction.blocks.TILES", 1)
    urt.predict(engine, path, out=out, tile=TILE, shard=(0, 2), level="0.5um")
    with pytest.raises(urt.OutputError, match="another image"):
        urt.predict(engine, path, out=out, tile=TILE, shard=(1, 2), level=0)
    urt.predict(engine, path, out=out, tile=TILE, shard=(1, 2), level=1)
    np.testing.assert_array_equal(tifffile.imread(out), urt.predict(engine, drawn()[1], tile=TILE))


@pytest.mark.onnxruntime
def test_the_user_s_pixel_size_goes_on_to_outputs_and_tables(engine: urt.Engine, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", size=False)
    options: dict[str, Any] = {"level": 1, "pixel_size_um": (0.25, 0.25), "tile": TILE}
    out = urt.predict(engine, path, out=tmp_path / "mask.ome.tif", **options)
    with open_image(out, Contract()) as again:
        assert again.pixel_size_um == pytest.approx((0.5, 0.5), rel=1e-3)
    tables = Tables(objects=tmp_path / "objects.csv")
    urt.predict(engine, path, output="instances", tables=tables, **options)
    assert "area_um2" in (tmp_path / "objects.csv").read_text().splitlines()[0]


@pytest.mark.onnxruntime
def test_workers_read_the_level_that_was_chosen(
    engine: urt.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own engine does not know what this one's contract was made to say: the number is what is sent."""
    path = write_tiff(tmp_path / "a.tif", size=False)
    jobs: list[cluster.Job] = []

    def compute(scheduler: str, job: cluster.Job, *_: Any) -> urt.RunReport:
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "compute", compute)
    with pytest.raises(KeyboardInterrupt):
        urt.predict(
            engine, path, out=tmp_path / "mask.tif", level="0.5um", pixel_size_um=(0.25, 0.25), scheduler="local:1"
        )
    assert jobs[0].asked.reading == Reading(None, None, 1, (0.25, 0.25))
