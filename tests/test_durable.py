"""Locks between processes: one holder at a time, and nothing is left of them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from unet_rt.durable import locked
from unet_rt.errors import OutputError


def test_who_waited_for_a_lock_holds_it(tmp_path: Path) -> None:
    """The file goes with its holder; who waited for that file must not be alone with it while others make a new one.

    Locks belong to open files, so threads exclude each other as processes do.
    """
    path = tmp_path / "a.lock"
    inside, done = threading.Event(), threading.Event()

    def wait() -> None:
        with locked(path):
            inside.set()
            done.wait(30)

    waiting = threading.Thread(target=wait)
    with locked(path):
        waiting.start()
        assert not inside.wait(0.3), "two hold the lock"
        with pytest.raises(OutputError, match="somebody is at it"), locked(path, busy="somebody is at it"):
            pass
    try:
        assert inside.wait(30)
        with pytest.raises(OutputError, match="somebody is at it"), locked(path, busy="somebody is at it"):
            pass
    finally:
        done.set()
        waiting.join()
    with locked(path, busy="nobody is"):
        pass
    assert not path.exists()


def test_what_is_raised_gives_the_lock_back(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with pytest.raises(ZeroDivisionError), locked(path):
        raise ZeroDivisionError
    with locked(path, busy="still held"):
        pass


def test_many_at_once(tmp_path: Path) -> None:
    """The count of those inside is never above one."""
    path, inside, most = tmp_path / "a.lock", [0], [0]

    def enter() -> None:
        for _ in range(50):
            with locked(path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
