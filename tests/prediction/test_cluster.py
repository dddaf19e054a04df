"""Blocks on Dask workers: the same bytes as in one process, also when a worker is lost."""

from __future__ import annotations

import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from test_engine import edit

import unet_rt as urt
from unet_rt.drawing.microscopy import microscopy
from unet_rt.prediction import cluster

pytestmark = pytest.mark.onnxruntime
pytest.importorskip("distributed")
pytest.importorskip("zarr")


@pytest.mark.filterwarnings("ignore")  # of the event loops that Dask closes when a worker is killed
def test_two_workers_of_which_one_is_killed(exact_folder, tmp_path, monkeypatch):
    """Workers are processes of their own; with blocks of two tiles the image has some for all of them."""
    monkeypatch.setattr("unet_rt.prediction.blocks.TILES", 2)  # here, where blocks are planned
    image = microscopy((400, 800), seed=8).image
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, image, tile=(256, 256), photometric="minisblack")
    from distributed import Client, LocalCluster

    killed: list[int] = []
    with urt.load(exact_folder) as engine:
        expected = urt.predict(engine, image)
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0) as dask:
            with Client(dask) as client:
                workers = client.run(os.getpid)

            def kill(done: int, total: int) -> None:
                if not killed and 0 < done < total:
                    killed.append(next(iter(workers.values())))
                    os.kill(killed[0], signal.SIGKILL)

            out = tmp_path / "mask.tif"
            urt.predict(
                engine, path, out=out, tile=(192, 192), scheduler=dask.scheduler_address, progress=kill, threads=1
            )
    assert killed
    np.testing.assert_array_equal(tifffile.imread(out), expected)


def test_schedulers_that_make_no_sense(engine_folder, tmp_path, sample_images):
    with urt.load(engine_folder) as engine:
        for name, text in [("local:0", "local:2"), ("four", "tcp://"), ("local:x", "local:2")]:
            with pytest.raises(urt.ContractError, match=text):
                urt.predict(engine, sample_images[0], out=tmp_path / "a.tif", scheduler=name)
        with pytest.raises(urt.ContractError, match="by their paths"):
            urt.predict(engine, sample_images[0], out=tmp_path / "a.tif", scheduler="local:2")
        with pytest.raises(urt.ContractError, match="--out"):
            urt.predict(engine, sample_images[0], scheduler="local:2")
    assert cluster.processes("local:3") == 3
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def in_this_process(monkeypatch):
    """Shares are computed here, by what workers run."""

    def compute(scheduler, job, made, numbers, progress):
        cluster._opened.cache_clear()
        return cluster.work(job, numbers)[1]

    monkeypatch.setattr(cluster, "compute", compute)
    yield
    cluster._opened.cache_clear()


def test_workers_load_the_engine_as_it_was_loaded_here(
    exact_folder, tmp_path, sample_images, in_this_process, monkeypatch
):
    """An engine whose parity is not proven, accepted as it is, and a device named by the user."""
    unproven = tmp_path / "unproven.urt"
    shutil.copytree(exact_folder, unproven)
    edit(unproven, lambda spec: spec["files"].pop("parity"))
    image = tmp_path / "image.npy"
    np.save(image, sample_images[0])
    with pytest.raises(urt.UnetRtError):
        urt.load(unproven)
    loaded = []
    monkeypatch.setattr(cluster, "load", lambda path, **options: loaded.append(options) or urt.load(path, **options))
    with urt.load(unproven, device="cpu", accept_unverified=True) as engine:
        expected = urt.predict(engine, sample_images[0])
        for options in ({}, {"tta": "flip"}):
            out = tmp_path / f"mask{len(options)}.npy"
            urt.predict(engine, image, out=out, scheduler="local:1", **options)
            expected = urt.predict(engine, sample_images[0], **options)
            np.testing.assert_array_equal(np.load(out), expected)
    assert [(o["device"], o["accept_unverified"]) for o in loaded] == [("cpu", True)] * 2


def test_what_is_computed_no_more_is_said_on_workers(
    exact_folder, tmp_path, sample_images, in_this_process, monkeypatch
):
    image, jobs, work = tmp_path / "image.npy", [], cluster.work
    np.save(image, sample_images[0])
    monkeypatch.setattr(cluster, "work", lambda job, numbers: jobs.append(job) or work(job, numbers))
    with urt.load(exact_folder) as engine:
        urt.predict(engine, image, out=tmp_path / "mask.npy", scheduler="local:1")
    with pytest.raises(urt.BackendError, match="its run has ended"):
        work(jobs[0], [0])
    cluster._opened.cache_clear()
    with pytest.raises(urt.BackendError, match="its run has ended"):
        work(jobs[0], [0])


def test_a_scheduler_that_goes_away_is_said(exact_folder, tmp_path, sample_images, monkeypatch):
    """Dask hands on futures that it has cancelled as though they had finished."""
    import distributed
    from distributed.client import FutureCancelledError

    class Client:
        def map(self, function, shares, pure):
            return [SimpleNamespace(status="cancelled") for _ in shares]

    def as_completed(futures, **options):
        for future in futures:
            yield future, FutureCancelledError("share", "scheduler-connection-lost")

    monkeypatch.setattr(cluster, "_client", lambda *_: (Client(), 1))
    monkeypatch.setattr(distributed, "as_completed", as_completed)
    image, out = tmp_path / "image.npy", tmp_path / "mask.npy"
    np.save(image, sample_images[0])
    with (
        urt.load(exact_folder) as engine,
        pytest.raises(urt.BackendError, match=r"tcp://a:1 has gone.*same command again"),
    ):
        urt.predict(engine, image, out=out, scheduler="tcp://a:1")
