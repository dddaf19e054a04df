"""Tiles beside each other give what tiles one after another give."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import unet_rt as urt
from unet_rt import backends
from unet_rt.backends.beside import run_beside
from unet_rt.backends.session import Array, FunctionSession, takes_many
from unet_rt.cli.demo import shipped_model
from unet_rt.engine.folder import read_folder
from unet_rt.engine.write import write_folder
from unet_rt.errors import BackendError


@pytest.mark.onnxruntime
def test_every_tile_is_what_it_is_alone() -> None:
    def load(threads: int) -> backends.Session:
        return backends.get("onnxruntime").load(shipped_model(), precision="fp32", threads=threads)

    tiles = [np.random.default_rng(k).random((1, 1, 64, 72), np.float32) for k in range(5)]
    with run_beside(load, 2, 2) as session:
        assert takes_many(session)
        assert session.threads == 2
        for _ in range(2):
            for tile, outputs in zip(tiles, session.run_many([[t] for t in tiles]), strict=True):
                np.testing.assert_array_equal(outputs[0], session.run([tile])[0])
    with pytest.raises(BackendError, match="closed"):
        session.run_many([[tiles[0]]])
    with run_beside(load, 4, 1) as session:  # one thread can be shared by nobody
        assert not takes_many(session)


def test_they_run_at_the_same_time_and_a_failure_is_passed_on() -> None:
    meet = threading.Barrier(2, timeout=30)

    def run(inputs: Sequence[Array]) -> list[Array]:
        meet.wait()  # which needs both
        if inputs[0][0] < 0:
            raise BackendError("no such tile")
        return [inputs[0] + 1]

    with run_beside(lambda threads: FunctionSession(run, "both", threads), 2, 2) as session:
        assert takes_many(session)
        found = session.run_many([[np.array([k])] for k in range(4)])
        assert [int(one[0][0]) for one in found] == [1, 2, 3, 4]
        with pytest.raises(BackendError, match="no such tile"):
            session.run_many([[np.array([-1])], [np.array([1])]])


@pytest.mark.onnxruntime
def test_an_engine_with_streams_predicts_the_same(
    exact_folder: Path, tmp_path: Path, sample_images: list[Array]
) -> None:
    opened = read_folder(exact_folder)
    files = {kind: opened.file(kind) for kind in opened.files}  # type: ignore[arg-type]
    write_folder(tmp_path / "many.urt", replace(opened.spec, streams=2, run_batch=2), files)  # type: ignore[arg-type]
    with urt.load(exact_folder) as alone, urt.load(tmp_path / "many.urt", threads=2) as many:
        for image in sample_images:
            wanted = urt.predict(alone, image, output="raw", tile=(192, 192))
            np.testing.assert_array_equal(urt.predict(many, image, output="raw", tile=(192, 192)), wanted)
