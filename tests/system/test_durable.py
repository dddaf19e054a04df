"""Locks between processes: one holder at a time, and nothing is left of them."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from unet_rt.errors import OutputError
from unet_rt.system.durable import Disk, locked, open_whole, part_path, parts_of, remove_dead_parts, remove_part


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


def test_a_lock_that_cannot_be_is_not_one_that_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have no locks: nobody is to wait for another process then."""

    def no_locks(handle: int, *, wait: bool) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with pytest.raises(OutputError, match="cannot be written"), locked(tmp_path / "none" / "a.lock"):
        pass
    monkeypatch.setattr("unet_rt.system.durable._lock", no_locks)
    for busy in (None, "somebody is at it"):
        with (
            pytest.raises(OutputError, match=r"cannot be locked \(No locks available\)"),
            locked(tmp_path / "a.lock", busy=busy),
        ):
            pass


def test_processes_of_the_same_number_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers on one file system: all of them may run as process 7."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    names: list[str] = []

    class Watched(Disk):
        def write(self, path: Path, data: bytes) -> None:
            names.append(path.name)
            super().write(path, data)
            if len(names) == 1:  # the other one comes in between
                self.write_whole(tmp_path / "mark", b"same")

    Watched().write_whole(tmp_path / "mark", b"same")
    assert len(set(names)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mark"]
    assert len({part_path(tmp_path / "a.tif") for _ in range(3)}) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="nobody can tell there who lives")
def test_what_a_killed_process_left_goes_with_the_next_writer(tmp_path: Path) -> None:
    """And what one that lives is writing stays, in this process and in another."""
    program = (
        "import sys; from pathlib import Path; from unet_rt.system.durable import part_path\n"
        "part = part_path(Path(sys.argv[1])); part.write_bytes(b'half'); print(part, flush=True); sys.stdin.read()"
    )
    path = tmp_path / "a"
    with ExitStack() as running:
        writers = [
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for _ in range(2)
        ]
        dead, living = (Path(writer.stdout.readline().strip()) for writer in writers if writer.stdout)
        writers[0].kill()
        writers[0].wait()
        ours = part_path(path)
        assert set(parts_of(path)) == {dead, living, ours}
        Disk().write_whole(path, b"whole")
        assert set(parts_of(path)) == {living, ours}
        remove_part(ours)
        writers[1].kill()
        writers[1].wait()
        remove_dead_parts(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_is_synced_before_it_has_its_name_and_its_name_after(tmp_path: Path) -> None:
    done: list[str] = []

    class Watched(Disk):
        def sync_file(self, path: Path) -> None:
            done.append(f"file {path.read_text()}")
            super().sync_file(path)

        def replace(self, old: Path, new: Path) -> None:
            done.append(f"name {new.name}")
            super().replace(old, new)

        def sync_folder(self, path: Path) -> None:
            done.append(f"folder {path.name}")
            super().sync_folder(path)

    with Watched().writing(tmp_path / "a") as part:
        part.write_text("new")
        assert list(parts_of(tmp_path / "a")) == [part]
        assert not list(parts_of(tmp_path / "b"))
    assert done == ["file new", "name a", f"folder {tmp_path.name}"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_is_not_finished_leaves_the_one_before(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail() -> None:
        with Disk().writing(path) as part:
            part.write_text("half of the new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_tables_of_the_same_name_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written at the same time, also by processes of the same number: the last one stays, whole."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    path = tmp_path / "objects.csv"
    with open_whole(path) as first, open_whole(path) as second:
        first.write("first")
        second.write("second")
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["objects.csv"]


def test_file_systems_that_sync_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they answer is no reason to stop; a full or failing disk is."""
    sync, answers = os.fsync, [errno.EINVAL, errno.EIO]

    def refused(handle: int) -> None:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            return sync(handle)
        raise OSError(answers[0], os.strerror(answers[0]))

    monkeypatch.setattr(os, "fsync", refused)
    Disk().write_whole(tmp_path / "mark", b"1")
    assert (tmp_path / "mark").read_bytes() == b"1"
    answers.pop(0)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        Disk().write_whole(tmp_path / "other", b"1")
