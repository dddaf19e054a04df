"""Blocks on Dask workers: the same bytes as in one process, also when a worker is lost."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import tifffile

import unet_rt as urt
from unet_rt import cluster
from unet_rt.synthetic import microscopy

pytestmark = pytest.mark.onnxruntime
pytest.importorskip("distributed")
pytest.importorskip("zarr")


@pytest.mark.filterwarnings("ignore")  # of the event loops that Dask closes when a worker is killed
def test_two_workers_of_which_one_is_killed(exact_folder, tmp_path, monkeypatch):
    """Workers are processes of their own; with blocks of two tiles the image has some for all of them."""
    monkeypatch.setattr("unet_rt.blocks.TILES", 2)  # here, where blocks are planned
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
