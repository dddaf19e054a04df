"""Results made in blocks equal those made at once, bit for bit, however often they were interrupted and by whom."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile
from flat_image import open_image
from PIL import Image
from test_cases import engine as fake_engine
from test_cases import output, predicted

import unet_rt as urt
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.drawing.microscopy import microscopy
from unet_rt.images import normalize
from unet_rt.images.normalize import affine
from unet_rt.prediction import request, stage
from unet_rt.prediction import stage as prediction_stage
from unet_rt.prediction.blocks import Picture, plan_blocks
from unet_rt.prediction.resampled import Resampled
from unet_rt.system.durable import Disk
from unet_rt.tiling.decision import decide
from unet_rt.tiling.resample import input_span, resample, resampled_shape

pytestmark = pytest.mark.onnxruntime

TILE = (192, 192)


@pytest.fixture(scope="module")
def engine(engine_folder):
    """With its exact halo: results do not depend on where tiles lie."""
    with urt.load(engine_folder) as loaded:
        loaded.spec = replace(loaded.spec, halo="exact", halo_limit=None)
        yield loaded


@pytest.fixture(scope="module")
def image():
    return microscopy((430, 530), seed=71).image


@pytest.fixture(scope="module")
def whole(engine, image):
    return urt.predict(engine, image, tile=TILE)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two tiles, so that small images have many."""
    monkeypatch.setattr("unet_rt.prediction.blocks.TILES", 2)


@pytest.fixture
def stored(image, tmp_path):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, image, tile=(256, 256), photometric="minisblack")
    return path


def read_zarr(path: Path) -> np.ndarray:
    import zarr

    return np.asarray(zarr.open_group(path, mode="r")["0"])


def test_zarr_output_is_the_whole_result(engine, stored, whole, small_blocks, tmp_path):
    reports: list[urt.RunReport] = []
    out = urt.predict(engine, stored, out=tmp_path / "mask.zarr", tile=TILE, report=reports.append)
    np.testing.assert_array_equal(read_zarr(out), whole)
    shares = [float((whole == k).mean()) for k in range(2)]
    assert list(reports[0].class_share.values()) == pytest.approx(shares)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.tif", "mask.zarr"]
    with pytest.raises(urt.OutputError, match="--overwrite"):
        urt.predict(engine, stored, out=out)
    urt.predict(engine, stored, out=out, overwrite=True, output="probability", tile=TILE)
    np.testing.assert_array_equal(read_zarr(out), urt.predict(engine, stored, output="probability", tile=TILE))


def test_blocks_lie_on_chunks_and_share_no_tile(engine, image, small_blocks):
    spec = engine.spec
    decision = decide(spec.contract, 2, "mask")
    plan = plan_blocks(spec, Picture((5000, 7000), 3, 2), decision, memory_bytes=2**30, tile=TILE)
    assert len(plan) == 3 * np.prod(plan.shape)
    written = np.zeros((3, 5000, 7000), np.uint8)
    for number in range(len(plan)):
        block = plan.block(number)
        assert block.number == number
        written[block.plane][tuple(map(slice, block.start, block.stop))] += 1
        for start, stop, chunk, n in zip(block.start, block.stop, plan.chunk, plan.image, strict=True):
            assert start % chunk == 0
            assert stop % chunk == 0 or stop == n
    assert (written == 1).all()
    assert sum(map(plan.tiles, range(len(plan)))) == 3 * plan.grid.count


def test_less_memory_means_smaller_tiles_and_then_an_error(engine):
    spec = replace(engine.spec, bytes_per_px=20_000.0)  # of a large network
    decision = decide(spec.contract, 2, "mask")

    def tile_px(memory: int) -> int:
        plan = plan_blocks(spec, Picture((60_000, 50_000), 1, 2), decision, memory_bytes=memory)
        return int(np.prod(plan.grid.tile))

    sizes = [tile_px(m * 10**6) for m in (1000, 1500, 9000)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    with pytest.raises(urt.ContractError, match="--memory"):
        tile_px(10**5)


def test_less_memory_means_a_plan_s_smaller_tile(engine):
    large, small = (512, 512), (256, 272)
    spec = replace(engine.spec, halo="exact", halo_limit=None, tile=large, tiles=(large, small), batches=(1,))
    spec = replace(spec, sizes=tuple(replace(s, fixed=t) for s, t in zip(spec.sizes, large, strict=True)))
    decision = decide(spec.contract, 2, "mask")

    def chosen(memory: int, tile: tuple[int, ...] | None = None) -> tuple[int, ...]:
        plan = plan_blocks(spec, Picture((6000, 5000), 1, 2), decision, memory_bytes=memory, tile=tile)
        return plan.grid.tile

    assert (chosen(2**32), chosen(2**32, small)) == (large, small)
    with pytest.raises(urt.ContractError, match="tiles of 512x512 px, 1 at a time, take about") as raised:
        chosen(2**20, large)
    needed_mb = int(str(raised.value).partition("take about ")[2].partition(" MB")[0])
    assert chosen(needed_mb * 10**6) == large
    assert chosen(needed_mb * 7 * 10**5) == small
    with pytest.raises(urt.ContractError, match="tiles of 256x272 px, 1 at a time, take about"):
        chosen(2**20)


def test_shards_make_the_output_together(engine, stored, whole, small_blocks, tmp_path):
    out = tmp_path / "mask.tif"
    notes: list[str] = []
    for k in (2, 0, 1):
        assert not out.exists()
        urt.predict(engine, stored, out=out, tile=TILE, shard=(k, 3), report=lambda r: notes.extend(r.notes))
    np.testing.assert_array_equal(tifffile.imread(out), whole)
    assert len([n for n in notes if "left to other shards" in n]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.tif", "mask.tif"]


def interrupted(engine, stored, out, after=2, **options):
    """Runs until ``after`` blocks are kept."""
    put, kept = stage.Stage.put, []

    def failing(self, *args):
        if len(kept) == after:
            raise KeyboardInterrupt
        put(self, *args)
        kept.append(args[1].number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.Stage, "put", failing)
        with pytest.raises(KeyboardInterrupt):
            urt.predict(engine, stored, out=out, tile=TILE, **options)
    return kept


@pytest.mark.parametrize("name", ["mask.zarr", "mask.tif", "mask.npy"])
def test_an_interrupted_run_goes_on(engine, stored, whole, small_blocks, tmp_path, monkeypatch, name):
    monkeypatch.setattr("unet_rt.prediction.blocks.LARGE_PX", 1)
    out = tmp_path / name
    kept = interrupted(engine, stored, out)
    assert not out.exists()
    told: list[tuple[int, int]] = []
    reports: list[urt.RunReport] = []
    urt.predict(engine, stored, out=out, tile=TILE, report=reports.append, progress=lambda *n: told.append(n))
    found = read_zarr(out) if name.endswith("zarr") else tifffile.imread(out) if name.endswith("tif") else np.load(out)
    np.testing.assert_array_equal(found, whole)
    assert f"{len(kept)} of " in " ".join(reports[0].notes)
    assert told[0][0] > 0, "what was done before counts"
    assert told[-1][0] == told[-1][1]
    assert list(reports[0].class_share.values()) == pytest.approx([float((whole == k).mean()) for k in range(2)])


def test_blocks_of_another_version_are_said(engine, stored, whole, small_blocks, tmp_path, monkeypatch):
    """The library was updated in between, or a shard runs on another machine: such blocks may round differently."""
    out = tmp_path / "mask.zarr"
    interrupted(engine, stored, out)
    now, kind = engine.session_version, type(engine._session)
    for version in (now, "onnxruntime 0.1"):
        monkeypatch.setattr(kind, "version", property(lambda self, version=version: version))
        interrupted(engine, stored, out, after=1)
    reports: list[urt.RunReport] = []
    for k in (0, 1):
        urt.predict(engine, stored, out=out, tile=TILE, shard=(k, 2), report=reports.append)
    said = f"blocks were computed with more than one version ({', '.join(sorted(['onnxruntime 0.1', now]))})"
    assert [[n for n in report.notes if "more than one" in n] for report in reports] == [
        [f"{said}: they may differ by rounding"]
    ] * 2
    np.testing.assert_array_equal(read_zarr(out), whole)
    urt.predict(engine, stored, out=out, tile=TILE, overwrite=True, report=reports.append)
    assert not any("more than one" in note for note in reports[-1].notes)


def test_another_engine_image_or_option_is_refused(engine, stored, small_blocks, tmp_path, image):
    out = tmp_path / "mask.zarr"
    interrupted(engine, stored, out)
    with pytest.raises(urt.OutputError, match="another output"):
        urt.predict(engine, stored, out=out, tile=TILE, output="probability")
    with pytest.raises(urt.OutputError, match="another tile"):
        urt.predict(engine, stored, out=out)
    with pytest.raises(urt.OutputError, match="another engine"):
        urt.predict(engine, stored, out=out, tile=TILE, tta="flip", output="mask")
    with pytest.raises(urt.ContractError, match="without --shard"):
        urt.predict(engine, stored, out=out, tile=TILE, shard=(0, 2), restart=True)
    tifffile.imwrite(stored, image[::-1], photometric="minisblack")
    with pytest.raises(urt.OutputError, match="another image"):
        urt.predict(engine, stored, out=out, tile=TILE)
    with pytest.raises(urt.OutputError, match="--restart"):
        urt.predict(engine, stored, out=out, tile=TILE)
    urt.predict(engine, stored, out=out, tile=TILE, restart=True)
    np.testing.assert_array_equal(read_zarr(out), urt.predict(engine, image[::-1], tile=TILE))


def test_a_full_disk_keeps_what_is_finished(engine, stored, whole, small_blocks, tmp_path, monkeypatch):
    out = tmp_path / "mask.zarr"
    sync, left = Disk.sync_tree, [3]

    def full(self, files, root):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(root))
        sync(self, files, root)

    monkeypatch.setattr(Disk, "sync_tree", full)
    with pytest.raises(urt.OutputError, match=r"No space left.*same command again"):
        urt.predict(engine, stored, out=out, tile=TILE)
    assert not out.exists()
    monkeypatch.setattr(Disk, "sync_tree", sync)
    reports: list[urt.RunReport] = []
    urt.predict(engine, stored, out=out, tile=TILE, report=reports.append)
    assert any("blocks were there from an earlier run" in note for note in reports[0].notes)
    np.testing.assert_array_equal(read_zarr(out), whole)


class LossyDisk(Disk):
    """Remembers what was synced; :meth:`power_loss` throws everything else away."""

    def __init__(self) -> None:
        self.files: dict[Path, bytes] = {}  # content at the last sync, under the name it has now
        self.names: dict[Path, set[str]] = {}  # what a folder held at its last sync

    def sync_file(self, path: Path) -> None:
        super().sync_file(path)
        self.files[path] = path.read_bytes()

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self.names[path] = {p.name for p in path.iterdir()}

    def replace(self, old: Path, new: Path) -> None:
        super().replace(old, new)
        for known in (self.files, self.names):
            for path in [p for p in known if p == old or old in p.parents]:
                known[new / path.relative_to(old)] = known.pop(path)

    def power_loss(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*"), key=lambda p: -len(p.parts)):
            named = path.name in self.names.get(path.parent, set())
            if path.is_file():
                if not named:
                    path.unlink()
                elif path not in self.files:
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # half of it was on the disk
                else:
                    path.write_bytes(self.files[path])
            elif not named and not any(path.iterdir()):
                path.rmdir()


@pytest.mark.parametrize(("name", "after"), [("mask.zarr", 0), ("mask.zarr", 3), ("mask.npy", 3)])
def test_a_power_cut_loses_no_finished_block(engine, stored, whole, small_blocks, tmp_path, monkeypatch, name, after):
    """Unsynced data are gone or half there, unsynced names are gone; marks that are left stand for whole blocks."""
    out, disk = tmp_path / name, LossyDisk()
    monkeypatch.setattr("unet_rt.prediction.blocks.LARGE_PX", 1)
    monkeypatch.setattr("unet_rt.prediction.stage.Disk", lambda: disk)
    monkeypatch.setattr("unet_rt.outputs.zarr.Disk", lambda: disk)
    kept = interrupted(engine, stored, out, after)
    folder = stage.stage_folder(out)
    marks = {int(p.name) for p in (folder / "done").iterdir() if p.name.isdecimal()}
    disk.names.setdefault(tmp_path, {folder.name})
    disk.power_loss(folder)
    assert {int(p.name) for p in (folder / "done").iterdir() if p.name.isdecimal()} == marks == set(kept)
    urt.predict(engine, stored, out=out, tile=TILE)
    np.testing.assert_array_equal(read_zarr(out) if name.endswith("zarr") else np.load(out), whole)


def test_a_lossy_disk_is_noticed_where_nothing_is_synced(engine, stored, small_blocks, tmp_path, monkeypatch):
    """The double can fail: without syncing, finished blocks do not outlive a power cut."""
    out, disk = tmp_path / "mask.npy", LossyDisk()
    monkeypatch.setattr("unet_rt.prediction.blocks.LARGE_PX", 1)
    monkeypatch.setattr("unet_rt.prediction.stage.Disk", lambda: disk)
    monkeypatch.setattr(LossyDisk, "sync_tree", lambda *_: None)
    interrupted(engine, stored, out)
    folder = stage.stage_folder(out)
    before = [p.stat().st_size for p in sorted((folder / "data").iterdir())]
    disk.power_loss(folder)
    assert before
    assert before != [p.stat().st_size for p in sorted((folder / "data").glob("*"))]


def test_two_processes_are_not_at_one_output(engine, stored, small_blocks, tmp_path):
    out = tmp_path / "mask.zarr"
    interrupted(engine, stored, out)
    with stage.shard_lock(out, 0, 1), pytest.raises(urt.OutputError, match="another process"):
        urt.predict(engine, stored, out=out, tile=TILE)
    urt.predict(engine, stored, out=out, tile=TILE)


KILLED = """
import dataclasses, sys, unet_rt as urt
from unet_rt.prediction import blocks
blocks.TILES, blocks.LARGE_PX = 1, 1
with urt.load(sys.argv[1]) as engine:
    engine.spec = dataclasses.replace(engine.spec, halo="exact", halo_limit=None)
    print("ready", flush=True)
    urt.predict(engine, sys.argv[2], out=sys.argv[3], tile=(192, 192), threads=1)
"""


def test_kill_9_at_random_moments(engine_folder, stored, whole, tmp_path):
    """More of the same is in ``benchmarks/large.py``."""
    out = tmp_path / "mask.zarr"
    rng, kills, seen = np.random.default_rng(5), 0, []
    command = [sys.executable, "-c", KILLED, str(engine_folder), str(stored), str(out)]
    while kills < 2:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert process.stdout is not None
        process.stdout.readline()
        marks = stage.stage_folder(out) / "done"
        while kills == 1 and not (marks.exists() and any(marks.iterdir())) and process.poll() is None:
            time.sleep(0.002)  # the second one hits a run that has finished a block
        time.sleep(float(rng.uniform(0.0, 0.05)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        if out.exists():
            break
        marks = stage.stage_folder(out) / "done"
        seen.append(len(list(marks.iterdir())) if marks.exists() else 0)
    assert any(seen), "no kill hit a run that had finished a block"
    assert not out.exists()
    subprocess.run(command, check=True, capture_output=True)
    np.testing.assert_array_equal(read_zarr(out), whole)


@pytest.mark.parametrize("name", ["mask.zarr", "mask.npy"])
def test_a_kill_between_the_output_and_the_end_of_its_stage(engine, stored, whole, small_blocks, tmp_path, name):
    """The output is whole, the stage is still there: the same command must not touch the one, and ends the other."""
    out = tmp_path / name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unet_rt.prediction.blocks.LARGE_PX", 1)
        patch.setattr(stage.Stage, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            urt.predict(engine, stored, out=out, tile=TILE)
    for overwrite in (False, True):
        assert out.exists()
        if stage.stage_folder(out).exists():
            urt.predict(engine, stored, out=out, tile=TILE, overwrite=overwrite)
        found = read_zarr(out) if name.endswith("zarr") else np.load(out)
        np.testing.assert_array_equal(found, whole)
        assert not stage.stage_folder(out).exists()


def test_the_last_block_fails_with_its_own_error(engine, stored, small_blocks, tmp_path):
    out = tmp_path / "mask.zarr"
    put, blocks = stage.Stage.put, []

    def failing(self, store, block, values, tally):
        blocks.append(block.number)
        if block.number == self.run["last"]:
            raise urt.OutputError("the disk is full")
        put(self, store, block, values, tally)

    opened = prediction_stage.open_stage

    def open_stage(*args, **options):
        found = opened(*args, **options)
        cuts = found.run["plan"]["cuts"]
        found.run = {**found.run, "last": (len(cuts[0]) - 1) * (len(cuts[1]) - 1) - 1}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.Stage, "put", failing)
        patch.setattr("unet_rt.prediction.staged.open_stage", open_stage)
        with pytest.raises(urt.OutputError, match="the disk is full"):
            urt.predict(engine, stored, out=out, tile=TILE)
    assert len(blocks) > 1


def test_what_a_kill_leaves_of_a_mark_is_no_mark(engine, stored, whole, small_blocks, tmp_path):
    out = tmp_path / "mask.zarr"
    interrupted(engine, stored, out)
    (stage.stage_folder(out) / "done" / ".00000003.77.part").write_bytes(b"")
    urt.predict(engine, stored, out=out, tile=TILE)
    np.testing.assert_array_equal(read_zarr(out), whole)


def test_arrays_and_regions_are_told_by_what_they_hold(engine, image, small_blocks, tmp_path):
    out, region = tmp_path / "mask.npy", tmp_path / "region.png"
    Image.fromarray(np.full(image.shape, 255, np.uint8)).save(region)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unet_rt.prediction.blocks.LARGE_PX", 1)
        interrupted(engine, image, out, region=region)
        with pytest.raises(urt.OutputError, match="another image"):
            urt.predict(engine, image[:, ::-1], out=out, tile=TILE, region=region)
        Image.fromarray(np.eye(*image.shape, dtype=np.uint8)).save(region)
        with pytest.raises(urt.OutputError, match="another region"):
            urt.predict(engine, image, out=out, tile=TILE, region=region)


# --- regions and gaps ------------------------------------------------------------------------------------------------


def test_a_region_is_all_that_is_run(engine, stored, whole, small_blocks, tmp_path):
    region = np.zeros(whole.shape, np.uint8)
    region[10:60, 30:70] = 1
    region[300:320, 400:530] = 255
    path = tmp_path / "region.png"
    Image.fromarray(region).save(path)
    reports: list[urt.RunReport] = []
    mask = urt.predict(engine, stored, tile=TILE, region=path, report=reports.append)
    np.testing.assert_array_equal(mask, np.where(region, whole, 0))
    assert reports[0].tiles < 6
    assert sum(reports[0].class_share.values()) == pytest.approx(1)
    inside = urt.predict(engine, stored, tile=TILE, region=path, output="probability")
    assert np.isnan(inside[:, region == 0]).all()
    everywhere = urt.predict(engine, stored, tile=TILE, output="probability")
    np.testing.assert_array_equal(inside[:, region > 0], everywhere[:, region > 0])
    Image.fromarray(region[:-1]).save(path)
    with pytest.raises(urt.ContractError, match="429x530"):
        urt.predict(engine, stored, tile=TILE, region=path)


def test_pixels_without_data_count_for_nothing(engine, image, small_blocks, tmp_path):
    """Not in statistics, not in results; what lies beside them sees a grey that is normalised to 0."""
    gaps = np.zeros(image.shape, bool)
    gaps[:, 350:] = True
    gaps[100:140, 60:90] = True
    path = tmp_path / "map.tif"
    pixels = np.where(gaps, 0, np.maximum(image, 1))
    tifffile.imwrite(path, pixels, photometric="minisblack", extratags=[(42113, "s", 0, "0", True)])
    reports: list[urt.RunReport] = []
    mask = urt.predict(engine, path, tile=TILE, report=reports.append)
    np.testing.assert_array_equal(mask == 255, gaps)
    valid = pixels[~gaps]
    assert engine.spec.contract.normalization.method == "percentile"
    low, high = np.percentile(valid, engine.spec.contract.normalization.percentiles)
    filled = np.where(gaps, np.uint16(np.rint(low)), pixels)
    declared = replace(
        engine.spec.contract.normalization, method="fixed", mean=(low,), std=(high - low + 1e-6,), scale=1.0
    )
    spec = engine.spec
    try:
        engine.spec = replace(spec, contract=replace(spec.contract, normalization=declared))
        expected = urt.predict(engine, filled, tile=TILE)
    finally:
        engine.spec = spec
    np.testing.assert_array_equal(mask[~gaps], expected[~gaps])
    assert 0 < expected[~gaps].mean() < 0.6
    assert reports[0].class_share["nucleus"] == pytest.approx((mask == 1).sum() / (mask != 255).sum())
    out = urt.predict(engine, path, out=tmp_path / "mask.tif", tile=TILE)
    np.testing.assert_array_equal(tifffile.imread(out), mask)
    ids = urt.predict(engine, path, tile=TILE, output="instances")
    np.testing.assert_array_equal(ids > 0, mask == 1)


# --- resampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(100, 100), (100, 61), (57, 190), (300, 20), (5, 1)])
def test_windows_are_resampled_as_the_whole(n, m):
    line = np.random.default_rng(2).normal(size=(2, n, 40)).astype(np.float32)
    whole = resample(line, (0, 0), (0, 0), (m, 40), (n, 40), (m, 40))
    for start in range(0, m, 7):
        stop = min(start + 7, m)
        low, high = input_span(start, stop, n, m)
        part = resample(line[:, low:high], (low, 0), (start, 0), (stop, 40), (n, 40), (m, 40))
        np.testing.assert_array_equal(part, whole[:, start:stop])


def test_a_window_of_nothing_is_resampled_to_nothing():
    """Tiles beyond the image need no pixel of it where the border is constant."""
    with open_image(np.ones((30, 40), np.uint8), Contract()) as source:
        seen = Resampled(source, (60, 50), affine(Normalization("none"), source))
        assert seen.read(0, (0, 0), (0, 50)).shape == (1, 0, 50)
        assert seen.read_valid(0, (7, 3), (7, 3))[0].shape == (1, 0, 0)
        assert seen.read(0, (0, 0), (60, 50)).mean() == 1


def test_resampling_is_pillow_s_bilinear_filter():
    picture = microscopy((211, 190), seed=3).image.astype(np.float32)
    for shape in [(105, 300), (211, 77), (500, 190)]:
        ours = resample(picture[None], (0, 0), (0, 0), shape, picture.shape, shape)[0]
        theirs = np.asarray(Image.fromarray(picture).resize(shape[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # both sum float32; theirs along x first


def test_an_image_of_other_pixels_is_resampled_block_by_block(
    engine, image, whole, small_blocks, tmp_path, monkeypatch
):
    """Twice the pixels of half the size: nearly the mask of the image itself, the same in blocks and at once."""
    contract = replace(engine.spec.contract, pixel_size_um=(0.5, 0.5))
    monkeypatch.setattr(engine, "spec", replace(engine.spec, contract=contract))
    shape = tuple(2 * n for n in image.shape)
    fine = np.rint(resample(image[None], (0, 0), (0, 0), shape, image.shape, shape)[0]).astype(np.uint16)
    options = {"pixel_size_um": (0.25, 0.25), "resample": True, "tile": TILE}
    at_once = urt.predict(engine, fine, **options)
    expected = whole.repeat(2, axis=0).repeat(2, axis=1)
    assert (at_once != expected).mean() < 0.01
    monkeypatch.setattr("unet_rt.prediction.blocks.CHUNK", 128)
    path = tmp_path / "fine.npy"
    np.save(path, fine)
    out = urt.predict(engine, path, out=tmp_path / "mask.zarr", **options)
    np.testing.assert_array_equal(read_zarr(out), at_once)
    with pytest.raises(urt.ContractError, match="--pixel-size"):
        urt.predict(engine, fine, resample=True)
    notes: list[str] = []
    urt.predict(engine, image, pixel_size_um=(0.4, 0.5), report=lambda r: notes.extend(r.notes))
    assert any("--resample" in note for note in notes)
    assert resampled_shape((100, 3), (0.2, 0.2), (0.5, 20.0)) == (40, 1)


@pytest.mark.parametrize("resample", [False, True])
def test_a_print_resolution_is_no_pixel_size(engine, image, tmp_path, monkeypatch, resample):
    contract = replace(engine.spec.contract, pixel_size_um=(0.5, 0.5))
    monkeypatch.setattr(engine, "spec", replace(engine.spec, contract=contract))
    path = tmp_path / "print.tif"
    tifffile.imwrite(path, image, resolution=(72 / 2.54, 72 / 2.54), resolutionunit="CENTIMETER")
    with pytest.raises(urt.ContractError, match=r"352\.8 um, .*trained on 0\.5 um.*factor of 706;.*--pixel-size"):
        urt.predict(engine, path, resample=resample)
    expected = urt.predict(engine, image, pixel_size_um=(0.5, 0.5), resample=resample)
    np.testing.assert_array_equal(urt.predict(engine, path, pixel_size_um=(0.5,), resample=resample), expected)
    for size, far in ((5, False), (0.05, False), (5.1, True), (0.049, True)):
        source = open_image(image, Contract(), pixel_size_um=(size,))
        with pytest.raises(urt.ContractError) if far else nullcontext():
            request.check_pixel_size(contract, source)


# --- objects ---------------------------------------------------------------------------------------------------------


def test_instances_are_numbered_across_blocks(engine, stored, whole, small_blocks, tmp_path):
    from skimage.measure import label, regionprops

    expected = label(whole, connectivity=2)
    out = tmp_path / "ids.zarr"
    tables = request.Tables(
        objects=tmp_path / "objects.csv", areas=tmp_path / "areas.csv", geojson=tmp_path / "objects.geojson"
    )
    urt.predict(engine, stored, out=out, tile=TILE, output="instances", tables=tables)
    np.testing.assert_array_equal(read_zarr(out), expected)
    lines = (tmp_path / "objects.csv").read_text().splitlines()
    assert len(lines) == 1 + expected.max()
    sizes = [r.area for r in regionprops(expected)]
    features = json.loads((tmp_path / "objects.geojson").read_text())["features"]
    assert [f["properties"]["measurements"]["area px"] for f in features] == sizes
    assert [int(row["area_px"]) for row in csv.DictReader(lines)] == sizes
    few = urt.predict(engine, stored, output="instances", tile=TILE, tables=request.Tables(min_size=60))
    assert few.max() == sum(s >= 60 for s in sizes)
    urt.predict(engine, stored, out=tmp_path / "ids.tif", tile=TILE, output="instances")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "ids.tif"), expected)
    with pytest.raises(urt.ContractError, match="--mask-values"):
        urt.predict(engine, stored, output="instances", mask_values=(0, 255))


def test_a_stack_is_predicted_plane_by_plane(engine, small_blocks, tmp_path):
    stack = np.stack([microscopy((300, 410), seed=s).image for s in range(3)])
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, stack, metadata={"axes": "ZYX"}, imagej=True)
    out = urt.predict(engine, path, out=tmp_path / "mask.zarr", tile=TILE, axes="ZYX")
    expected = urt.predict(engine, stack, tile=TILE, axes="ZYX")
    np.testing.assert_array_equal(read_zarr(out), expected)
    with open_image(out, Contract(), spatial=2) as again:
        assert again.shape == (300, 410)


def test_run_json_says_what_is_computed(engine, stored, small_blocks, tmp_path):
    out = tmp_path / "mask.zarr"
    interrupted(engine, stored, out)
    run = json.loads((stage.stage_folder(out) / "run.json").read_text())
    assert {"identity", "plan", "numbers"} <= set(run)
    (stage.stage_folder(out) / "run.json").write_text("{}")
    with pytest.raises(urt.OutputError, match="--restart"):
        urt.predict(engine, stored, out=out, tile=TILE)
    shutil.rmtree(stage.stage_folder(out))


# --- what processes share -------------------------------------------------------------------------------------------


def test_statistics_of_planes_are_measured_once(engine, small_blocks, tmp_path, monkeypatch):
    """By whichever shard needs them first; the others find them in the stage, the same bits."""
    stack = np.stack([microscopy((100, 410), seed=s).image * np.uint16(s + 1) for s in range(3)])
    path, out = tmp_path / "stack.npy", tmp_path / "mask.npy"
    np.save(path, stack)
    normalization = replace(engine.spec.contract.normalization, scope="slice")
    contract = replace(engine.spec.contract, normalization=normalization)
    monkeypatch.setattr(engine, "spec", replace(engine.spec, contract=contract))
    expected = urt.predict(engine, stack, tile=TILE, axes="ZYX", output="probability")
    measured, planes = normalize._measured_numbers, []
    monkeypatch.setattr(normalize, "_measured_numbers", lambda *a: planes.append(a[-1]) or measured(*a))
    for k in range(2):
        urt.predict(engine, path, out=out, tile=TILE, axes="ZYX", output="probability", shard=(k, 2))
        kept = stage.stage_folder(out) / "numbers"
        assert k or sorted(p.name for p in kept.iterdir()) == [f"{n:08d}" for n in range(3)]
    assert sorted(planes) == [0, 1, 2]
    np.testing.assert_array_equal(np.load(out), expected)


def test_of_shards_that_start_together_one_measures(tmp_path):
    calls = []

    def prepare():
        calls.append(1)
        time.sleep(0.2)  # the others are there by now
        return {"numbers": len(calls)}

    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: stage.open_stage(tmp_path / "mask.zarr", {"a": 1}, prepare), range(3)))
    assert [one.run["numbers"] for one in opened] == [1, 1, 1]
    shutil.rmtree(opened[0].folder)

    def refuse():
        raise urt.OutputError("not here")

    with pytest.raises(urt.OutputError, match="not here"):
        stage.open_stage(tmp_path / "mask.zarr", {"a": 1}, refuse)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["numbers", "done"])
def test_a_damaged_stage_is_said(engine, stored, small_blocks, tmp_path, name):
    out = tmp_path / "mask.zarr"
    kept = interrupted(engine, stored, out)
    folder = stage.stage_folder(out)
    opened = stage.Stage(folder, json.loads((folder / "run.json").read_text()), Disk())
    if name == "done":
        (folder / "done" / f"{kept[0]:08d}").write_bytes(b"")
        with pytest.raises(urt.OutputError, match=r"damaged.*--restart"):
            urt.predict(engine, stored, out=out, tile=TILE)
        return
    assert opened.kept("00000000", lambda: {"offset": 0.1}) == opened.kept("00000000", dict) == {"offset": 0.1}
    (folder / "numbers" / "00000000").write_bytes(b'{"off')
    with pytest.raises(urt.OutputError, match=r"damaged.*--restart"):
        opened.kept("00000000", dict)


def test_a_stage_that_goes_away_is_said(engine, stored, small_blocks, tmp_path, monkeypatch):
    """Another process restarts or finishes the same output."""
    put = stage.Stage.put

    def removed(self, *args):
        shutil.rmtree(self.folder)
        put(self, *args)

    monkeypatch.setattr(stage.Stage, "put", removed)
    for name in ("mask.zarr", "mask.npy"):
        with pytest.raises(urt.OutputError, match="has gone: another process"):
            urt.predict(engine, stored, out=tmp_path / name, tile=TILE, shard=(0, 2))
        assert not stage.stage_folder(tmp_path / name).exists()


def test_a_kill_between_tables_and_the_end_of_the_stage(engine, stored, whole, small_blocks, tmp_path):
    """What the killed run has written is not in the way of the same command; what was there before is."""
    out, csv = tmp_path / "ids.zarr", tmp_path / "objects.csv"
    options = {"tile": TILE, "output": "instances", "tables": request.Tables(objects=csv)}
    csv.write_text("mine")
    with pytest.raises(urt.OutputError, match="--overwrite"):
        urt.predict(engine, stored, out=out, **options)
    csv.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.Stage, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            urt.predict(engine, stored, out=out, **options)
    before = csv.read_text()
    csv.write_text(before[:20])
    urt.predict(engine, stored, out=out, **options)
    assert csv.read_text() == before
    np.testing.assert_array_equal(read_zarr(out) > 0, whole > 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.zarr", "image.tif", "objects.csv"]


def test_nothing_is_left_of_a_kill_while_the_output_was_made(engine, stored, whole, small_blocks, tmp_path):
    out = tmp_path / "mask.npy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unet_rt.prediction.blocks.LARGE_PX", 1)
        interrupted(engine, stored, out)
    (tmp_path / ".mask.npy.0123abcd.part").write_bytes(b"half of it")
    (tmp_path / ".mask.npy2.0123abcd.part").write_bytes(b"of another output")
    urt.predict(engine, stored, out=out, tile=TILE)
    np.testing.assert_array_equal(np.load(out), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mask.npy2.0123abcd.part", "image.tif", "mask.npy"]


def test_the_end_of_another_shard_is_no_error(engine, stored, whole, small_blocks, tmp_path, monkeypatch):
    """It has moved the image to its name, and is about to remove the stage."""
    out = tmp_path / "mask.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.Stage, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            urt.predict(engine, stored, out=out, tile=TILE)
    finish = stage.Stage.finish

    def slower(self, make):
        shutil.rmtree(self.folder)
        return finish(self, make)

    monkeypatch.setattr(stage.Stage, "finish", slower)
    urt.predict(engine, stored, out=out, tile=TILE, shard=(1, 2))
    np.testing.assert_array_equal(read_zarr(out), whole)


def test_a_full_disk_is_not_filled_further(engine, stored, small_blocks, tmp_path, monkeypatch):
    out = tmp_path / "mask.npy"
    write = Path.write_bytes

    def full(self, data):
        write(self, bytes(data[: len(data) // 2]))
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr("unet_rt.prediction.blocks.LARGE_PX", 1)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(urt.OutputError, match="No space left"):
        urt.predict(engine, stored, out=out, tile=TILE)
    assert list((stage.stage_folder(out) / "data").iterdir()) == []


def test_an_output_never_takes_the_place_of_a_folder_around_the_image(engine, image, tmp_path):
    (tmp_path / "study.zarr").mkdir()
    path = tmp_path / "study.zarr" / "image.npy"
    np.save(path, image)
    with pytest.raises(urt.OutputError, match="holds it"):
        urt.predict(engine, path, out=tmp_path / "study.zarr", overwrite=True)
    assert path.exists()


def test_an_ome_zarr_says_what_its_values_mean(engine, image, small_blocks, tmp_path):
    import zarr

    path = tmp_path / "map.tif"
    pixels = np.maximum(image, 1)[:120, :200]
    pixels[:, 150:] = 0
    tifffile.imwrite(path, pixels, photometric="minisblack", extratags=[(42113, "s", 0, "0", True)])
    out = urt.predict(engine, path, out=tmp_path / "mask.zarr", tile=TILE, mask_values=(0, 100))
    said = zarr.open_group(out, mode="r").attrs["ome"]["image-label"]["properties"]
    assert said == [
        {"label-value": 0, "class": "background"},
        {"label-value": 100, "class": "nucleus"},
        {"label-value": 255, "class": "no data"},
    ]
    assert set(np.unique(read_zarr(out))) == {0, 100, 255}
    out = urt.predict(engine, path, out=tmp_path / "p.zarr", tile=TILE, output="probability")
    channels = zarr.open_group(out, mode="r").attrs["ome"]["omero"]["channels"]
    assert [c["label"] for c in channels] == ["background", "nucleus"]
    out = urt.predict(engine, path, out=tmp_path / "raw.zarr", tile=TILE, output="raw")
    assert "omero" not in zarr.open_group(out, mode="r").attrs["ome"]


# --- any geometry ----------------------------------------------------------------------------------------------------


def halved(x: np.ndarray) -> np.ndarray:
    return x[..., ::2, ::2] + 1


def doubled(x: np.ndarray) -> np.ndarray:
    return x.repeat(2, axis=-1).repeat(2, axis=-2)


@pytest.mark.parametrize(
    ("network", "shape", "options"),
    [
        (lambda x: x + 1, (1, 9, 40, 37), {"tile": (8, 12, 12), "halo": 2, "stride": 2}),
        (lambda x: x + 1, (1, 41, 37), {"tile": (12, 12), "overlap": (6, 6), "stride": 2, "blend": "gaussian"}),
        (halved, (1, 41, 37), {"tile": (12, 16), "scale": Fraction(1, 2), "halo": 1, "stride": 4}),
        (doubled, (1, 41, 37), {"tile": (12, 16), "scale": Fraction(2), "halo": 3, "stride": 4}),
        (lambda x: x, (3, 41, 37), {"tile": (12, 16), "channels": 3, "task": "multilabel", "output_is": "logits"}),
        (lambda x: x, (1, 41, 37), {"tile": (12, 16), "task": "binary", "output_is": "probabilities", "halo": 2}),
    ],
    ids=["volume", "blended", "half", "double", "multilabel", "binary"],
)
def test_blocks_are_parts_of_the_whole_result(network, shape, options, small_blocks):
    """Cheap networks, whatever they compute: placed and blended tiles, volumes, other scales, every decision."""
    options = dict(options)
    scale, channels = options.pop("scale", Fraction(1)), options.get("channels", 1)
    field = output(len(shape) - 1, channels, stride=options.get("stride", 1), halo=options.get("halo", 0), scale=scale)
    made = fake_engine(network, outputs=[field], **options)
    pixels = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    whole = predicted(made, pixels)
    in_blocks = predicted(made, pixels, memory_bytes=2**40)
    assert whole.shape == in_blocks.shape
    if made.spec.exact:
        np.testing.assert_array_equal(in_blocks, whole)
    else:  # the same tiles, whose float32 sums begin elsewhere: each of at most nine terms is rounded once
        np.testing.assert_allclose(in_blocks, whole, rtol=9 * np.finfo(np.float32).eps, atol=1e-6)


@pytest.mark.parametrize("scale", [Fraction(1), Fraction(1, 2), Fraction(2)])
@pytest.mark.parametrize("seed", range(4))
def test_regions_of_any_form(scale, seed, small_blocks, tmp_path):
    """Single pixels among them, which at half the scale may hold no sample."""
    rng = np.random.default_rng(seed)
    region = (rng.random((41, 37)) < 0.004).astype(np.uint8)
    region[rng.integers(41), rng.integers(37)] = 1
    np.save(tmp_path / "region.npy", region)
    network = {1: lambda x: x + 1, 2: doubled}.get(scale, halved)
    made = fake_engine(network, outputs=[output(2, 1, stride=4, scale=scale)], tile=(12, 16), stride=4)
    pixels = rng.normal(size=(1, 41, 37)).astype(np.float32)
    whole = predicted(made, pixels)
    got = predicted(made, pixels, region=tmp_path / "region.npy")
    wanted = region
    for axis, n in enumerate(whole.shape[1:]):
        wanted = wanted.take((np.arange(n) / scale).astype(int), axis=axis)
    np.testing.assert_array_equal(got, np.where(wanted > 0, whole, np.float32(np.nan)))


def test_a_region_of_a_result_at_another_scale_is_counted_alone(small_blocks, tmp_path):
    """And the last progress told is all of it, though tiles at the end are spared."""
    region = np.zeros((40, 36), np.uint8)
    region[4:12, 8:20] = 1
    np.save(tmp_path / "region.npy", region)
    made = fake_engine(
        halved, outputs=[output(2, 1, stride=4, scale=Fraction(1, 2))], tile=(12, 16), stride=4,
        task="binary", output_is="probabilities",
    )  # fmt: skip
    pixels = np.zeros((1, 40, 36), np.float32)
    pixels[0, 4:8] = 5.0  # 1 + 5 is above the threshold, and so is 1: all of the region is "on"
    reports: list[urt.RunReport] = []
    told: list[tuple[int, int]] = []
    mask = predicted(
        made, pixels, region=tmp_path / "region.npy", report=reports.append, progress=lambda *n: told.append(n)
    )
    np.testing.assert_array_equal(mask, region[::2, ::2])
    assert reports[0].class_share == {"off": 0.0, "on": 1.0}
    assert told[-1][0] == told[-1][1] > 0
    assert [n for n, _ in told] == sorted(n for n, _ in told)
