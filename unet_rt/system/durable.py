"""Files that are there whole or not at all, also after the power was cut, and locks between processes.

A file is durable once its data are synced, it has its name, and the folder that holds the name is synced: in that order.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ..errors import OutputError

_NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP)  # of file systems that sync no folders: names are theirs to keep
# What systems say of a lock that another process holds.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of file systems that have none

PART = ".part"  # suffix of files and folders that are being written

# What this process may be writing at this moment, and what holds it: a lock that ends with the process. -1: nothing does.
_unfinished: dict[Path, int] = {}


def part_path(path: Path) -> Path:
    """An empty hidden file beside ``path`` to write it under: it goes by a rename or :func:`remove_part` in the end.

    Another one for every call: processes of several machines or containers may share a number and a folder. It is locked
    until then, so that others can tell it from what a killed process has left.

    Raises:
        OSError: There can be no file.
    """
    while True:
        part = path.parent / f".{path.name}.{os.urandom(16).hex()}{PART}"
        _unfinished[part] = -1
        try:
            handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError:
            _unfinished.pop(part)
            raise
        if sys.platform == "win32":  # what is open has to stay there under its name
            os.close(handle)
            return part
        _unfinished[part] = handle
        try:
            _lock(handle, wait=True)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if _named(handle, part):  # else another process removed it before it was locked
            return part
        _let_go(part)


def remove_part(part: Path) -> None:
    """Removes what was written under a name of :func:`part_path`, if anything was."""
    part.unlink(missing_ok=True)
    _let_go(part)


def _let_go(part: Path) -> None:
    handle = _unfinished.pop(part, -1)
    if handle >= 0:
        os.close(handle)


def remove_unfinished() -> None:
    """Removes whatever this process was writing, before an interruption ends it.

    A signal's exception may come between any two steps, also between making a file and the ``try`` that would remove it.
    """
    import shutil

    for part in list(_unfinished):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
            _let_go(part)
        else:
            remove_part(part)


def parts_of(path: Path) -> Iterator[Path]:
    """What lies under a name of :func:`part_path`: somebody is writing it, or was killed while doing so."""
    import glob  # which predictions of arrays do not need

    return path.parent.glob(f".{glob.escape(path.name)}.*{PART}")


def remove_dead_parts(path: Path) -> None:
    """Removes what killed processes have left of writing ``path``. On Windows nobody can tell: it stays."""
    for part in parts_of(path):
        with _held(part) as alone:
            if alone:
                with suppress(OSError):  # another process has just done so, or the folder is another user's
                    part.unlink()


class Disk:
    """The operations that durability rests on. Tests put one in its place that forgets what was not synced."""

    def write(self, path: Path, data: bytes) -> None:
        with path.open("wb") as stream:
            stream.write(data)

    def sync_file(self, path: Path) -> None:
        with path.open("rb+") as stream:  # Windows syncs only what is open for writing
            os.fsync(stream.fileno())

    def sync_folder(self, path: Path) -> None:
        if sys.platform == "win32":  # folders cannot be opened there
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _NO_FOLDERS:
                raise
        finally:
            os.close(handle)

    def replace(self, old: Path, new: Path) -> None:
        os.replace(old, new)
        _let_go(old)

    # --- built from these ---------------------------------------------------------------------------------------------

    def write_whole(self, path: Path, data: bytes) -> None:
        """Writes a durable file in one step."""
        with self.writing(path) as part:
            self.write(part, data)

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """A name to write a file under, which becomes durable as ``path`` when the block ends well, and else is removed.

        What killed processes have left of writing ``path`` goes first.
        """
        remove_dead_parts(path)
        part = part_path(path)
        try:
            yield part
            self.sync_file(part)
            self.replace(part, path)
        except BaseException:
            remove_part(part)
            raise
        self.sync_folder(path.parent)

    def sync_tree(self, files: Iterable[Path], root: Path) -> None:
        """Makes files durable that were written under ``root``, with all folders on the way to them."""
        folders = {root}
        for file in files:
            self.sync_file(file)
            folders.update(parent for parent in file.parents if parent.is_relative_to(root))
        for folder in sorted(folders, key=lambda p: -len(p.parts)):
            self.sync_folder(folder)


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, gone afterwards; those that killed processes have left are removed first."""
    import shutil

    with only_writer(folder.parent), ExitStack() as held:
        for left in parts_of(folder):
            with _held(left) as alone:
                if alone:
                    shutil.rmtree(left, ignore_errors=True)
        staging = folder.parent / f".{folder.name}.{os.urandom(16).hex()}{PART}"
        _unfinished[staging] = -1
        staging.mkdir()  # with the mode that the umask gives to folders: it becomes the folder's
        held.enter_context(_held(staging))
        ours = held.pop_all()
    with ours:
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            _let_go(staging)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Holds a file or folder for as long as this process lives; whether nobody else does. On Windows nobody can tell."""
    if sys.platform == "win32":
        yield False
        return
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:  # it was put into place at this moment, or belongs to another user
        yield False
        return
    try:
        try:
            _lock(handle, wait=False)
            alone = _named(handle, path)
        except OSError:  # held, or a file system without locks
            alone = False
        yield alone
    finally:
        os.close(handle)


@contextmanager
def only_writer(parent: Path) -> Iterator[None]:
    """While this process moves something into ``parent``, others of this machine wait: each deletes what it replaced."""
    if sys.platform == "win32":
        import hashlib
        import tempfile

        name = hashlib.sha256(str(parent.resolve()).encode()).hexdigest()[:16]
        with locked(Path(tempfile.gettempdir()) / f"unet-rt-{name}.lock"):
            yield
    else:
        import fcntl

        handle = os.open(parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # closing gives it back, and so does the end of the process
            yield
        finally:
            os.close(handle)


@contextmanager
def open_whole(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[TextIO]:
    """A text file (UTF-8) to write, which gets its name when the block ends well; nothing is left behind otherwise.

    Raises:
        OutputError: The file exists already, or cannot be written.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: exists already; use --overwrite to replace it, or choose another name")
    try:
        with Disk().writing(target) as part, part.open("w", encoding="utf-8", newline="") as stream:
            yield stream
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written ({error.strerror or error}); nothing was left behind; free some space or "
            "choose another folder"
        ) from error


@contextmanager
def locked(path: Path, *, busy: str | None = None) -> Iterator[None]:
    """Holds the lock of a file, which is made for that time; the end of the process gives it back.

    Args:
        path: The file.
        busy: What to say where another process holds the lock; None: wait for it.

    Raises:
        OutputError: Another process holds it, and ``busy`` is given; there can be no lock there.
    """
    while True:
        try:
            opened = path.open("a+b")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror}); use a folder that can be") from error
        with opened as file:
            try:
                _lock(file.fileno(), wait=busy is None)
            except OSError as error:
                if busy is not None and error.errno in _HELD:
                    raise OutputError(busy) from error
                raise OutputError(
                    f"{path}: cannot be locked ({error.strerror}); use a folder on a file system that has locks"
                ) from error
            if not _named(file.fileno(), path):  # who held it before has removed it: the next one would make another
                continue
            try:
                yield
            finally:
                if sys.platform != "win32":  # while it is held, so that whoever waits for this file can tell
                    path.unlink(missing_ok=True)
                _unlock(file.fileno())
        break
    if sys.platform == "win32":
        with suppress(OSError):  # another process has it open, and then it stays
            path.unlink(missing_ok=True)


def _named(handle: int, path: Path) -> bool:
    """Whether an open file is the one that has its name."""
    if sys.platform == "win32":  # an open file keeps its name there
        return True
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int, *, wait: bool) -> None:
        msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

    def _unlock(handle: int) -> None:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(handle: int, *, wait: bool) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)
