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
