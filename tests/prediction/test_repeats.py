"""Tiles that were there before are not run again, and results are those of running them all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unet_rt as urt
from unet_rt.prediction.repeats import KEPT, Repeats, Results


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), max_size=8))
def test_results_are_those_of_running_every_tile(batches):
    drawn = np.random.default_rng(7).normal(size=(5, 2, 90, 91)).astype(np.float32)
    repeats, results, run = Repeats(), Results(), 0
    for batch in batches:
        wanted = drawn[batch]
        new, known = repeats.compact(wanted.copy())
        run += len(new)
        got = results.complete(2 * new if len(new) else None, known)
        np.testing.assert_array_equal(got, 2 * wanted)
    flat = [n for batch in batches for n in batch]
    assert run >= len(set(flat))
    assert run <= sum(n not in flat[max(0, k - 1) : k] for k, n in enumerate(flat)), (
        "the tile just before is remembered"
    )


def test_a_bit_makes_another_tile():
    tile = np.random.default_rng(3).normal(size=(1, 1, 200, 200)).astype(np.float32)
    other = tile.copy()
    other[0, 0, 77, 133] = np.nextafter(other[0, 0, 77, 133], np.float32(9))
    negative = np.where(tile == tile.min(), np.float32(-0.0), np.float32(0.0)).astype(np.float32)
    zero = np.zeros_like(tile)
    repeats = Repeats()
    new, known = repeats.compact(np.concatenate([tile, other, negative, zero, zero]))
    assert len(new) == 4
    assert [old for _, old in known] == [False, False, False, False, True]
    assert KEPT == 2


@pytest.mark.onnxruntime
@pytest.mark.parametrize("batch", [1, 3])
def test_background_of_a_slide_is_run_once(engine_folder, sample_images, monkeypatch, batch):
    """An image with wide empty margins: fewer tiles are run, and not a bit differs from running all."""
    image = np.full((700, 900), 180, np.uint16)
    image[:200, :210] = sample_images[0][:200, :210]
    image[480:690, 300:500] = sample_images[1][:210, :200]
    ran: list[int] = []
    with urt.load(engine_folder, threads=1) as engine:  # whose runs are those of one session
        session_run = engine._session.run

        def counted(inputs):
            ran.append(len(inputs[0]))
            return session_run(inputs)

        monkeypatch.setattr(engine._session, "run", counted)
        reports: list[urt.RunReport] = []
        mask = urt.predict(engine, image, tile=(192, 192), batch=batch, report=reports.append)
        few = sum(ran)
        monkeypatch.setattr(Repeats, "_find", lambda *_: None)
        ran.clear()
        every = urt.predict(engine, image, tile=(192, 192), batch=batch)
    assert reports[0].tiles == sum(ran)
    assert few < sum(ran) / 2
    np.testing.assert_array_equal(mask, every)
    assert 0 < mask.mean() < 0.5
