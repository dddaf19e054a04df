"""The threads of a prediction end when it ends, however it ends."""

from __future__ import annotations

import threading

import pytest

import unet_rt as urt

pytestmark = pytest.mark.onnxruntime


@pytest.mark.parametrize("at", [0, 1])
def test_no_thread_is_left_when_progress_raises(engine_folder, sample_images, at):
    """Interrupts arrive there: a bar is drawn. A thread left waiting would keep the process from ending."""
    before = set(threading.enumerate())

    def progress(done: int, total: int) -> None:
        if done >= at:
            raise KeyboardInterrupt

    with urt.load(engine_folder) as engine, pytest.raises(KeyboardInterrupt):
        urt.predict(engine, sample_images[0], progress=progress)
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in left:
        thread.join(1.0)
    assert not any(thread.is_alive() for thread in left)


def test_class_shares_of_several_labels_are_those_of_each(engine_folder, sample_images):
    from dataclasses import replace

    with urt.load(engine_folder) as engine:
        contract = replace(engine.spec.contract, task="multilabel", threshold=(0.3, 0.6))
        engine.spec = replace(engine.spec, contract=contract)
        reports = []
        mask = urt.predict(engine, sample_images[0], mask_values=(0, 255), report=reports.append)
    assert mask.shape == (2, *sample_images[0].shape)
    background, nucleus = (mask == 255).mean(axis=(1, 2))
    assert background != pytest.approx(nucleus)
    assert reports[0].class_share == pytest.approx({"background": background, "nucleus": nucleus})
