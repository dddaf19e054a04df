"""Several images into one folder: a run that was cut off goes on with the same command.

The folder ``.NAME.HASH.run`` beside the output folder NAME (HASH of the command) holds::

    run.json        the command
    a.tif/begun   this command makes the output a.tif: what lies there unfinished is its own
    a.tif/done    the mark of an image that is done, with the states of image and output by which both are known again
    a.tif/*.csv   its lines of the tables of all images

An image that changed, or whose output did, has no mark. The folder goes when all images are done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..images.pixels import ZARR_METADATA
from ..outputs.tables import Summary, unite_tables, write_summary
from ..system.durable import Disk, locked

SUMMARY = "summary.csv"  # in the output folder


class FolderRun:
    """The images of one command that are done. Make one with :func:`open_run`.

    Attributes:
        resumed: Whether the command was begun before.
    """

    def __init__(self, folder: Path, *, resumed: bool) -> None:
        self._folder, self.resumed, self._disk = folder, resumed, Disk()

    def _place(self, target: Path) -> Path:
        return self._folder / target.name

    def begun(self, target: Path) -> bool:
        """Whether what lies at an output is this command's own."""
        return (self._place(target) / "begun").exists()

    def done(self, image: Path | str, target: Path) -> bool:
        """Whether an image is done, and neither it nor its output has changed since."""
        try:
            mark = json.loads((self._place(target) / "done").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        except ValueError:  # written when the power was cut
            return False
        return bool(mark == [_state(image), _state(target)])

    def begin(self, target: Path) -> None:
        """Says that this command makes an output now; its earlier mark and tables go."""
        place = self._place(target)
        shutil.rmtree(place, ignore_errors=True)
        self._write(place / "begun", b"")

    def table(self, target: Path, name: str) -> Path:
        """Where the lines of one image lie until they go into the table of all."""
        return self._place(target) / f"{name}.csv"

    def end(self, image: Path | str, target: Path, name: str, found: Summary | None) -> None:
        """Marks an image, called ``name`` in tables, as done."""
        if found is not None:
            write_summary(self.table(target, "summary"), {name: found}, overwrite=True)
        self._write(self._place(target) / "done", json.dumps([_state(image), _state(target)]).encode())

    def unite(self, table: Path, kind: str, targets: Iterable[Path], kept: Iterable[str]) -> None:
        """Makes the table of all images from the lines of each; ``kept``: images whose lines in the old one stay."""
        parts = [part for target in targets if (part := self.table(target, kind)).exists()]
        unite_tables(table, parts, kept=kept, overwrite=True)

    def close(self) -> None:
        """Removes the marks: every image is done, or none was."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def count(self) -> int:
        """How many images have a mark."""
        return sum(1 for _ in self._folder.glob("*/done"))

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._disk.write_whole(path, data)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be written ({error.strerror or error}); free some space and give the same command again: "
                "finished images are kept"
            ) from error


@contextmanager
def open_run(out: Path, command: Mapping[str, Any], *, restart: bool = False) -> Iterator[FolderRun]:
    """The run of a command into the folder ``out``, begun here or before; one process at a time.

    Args:
        out: The output folder.
        command: What decides all outputs, in JSON's types.
        restart: Begin anew; outputs of the earlier run are replaced.

    Raises:
        OutputError: Another process is at it, or it cannot be written.
    """
    text = json.dumps(command, sort_keys=True, indent=1)
    folder = out.with_name(f".{out.name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}.run")
    run = FolderRun(folder, resumed=folder.exists())
    busy = f"{out}: another process is at the same images; wait for it, or choose another --out"
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be created ({error.strerror}); choose another --out") from error
    try:
        with locked(folder.with_name(f"{folder.name}.lock"), busy=busy):
            if restart:
                for mark in folder.glob("*/done"):
                    mark.unlink()
            run._write(folder / "run.json", (text + "\n").encode())
            try:
                yield run
            finally:
                if not run.count:
                    run.close()
    finally:
        for parent in made:
            with suppress(OSError):  # outputs are there
                parent.rmdir()


def _state(path: Path | str) -> Any:
    """What tells a file or a Zarr from what it may become; of a URL, the URL."""
    if isinstance(path, str):
        return path
    files = [path / name for name in ZARR_METADATA] if path.is_dir() else [path]
    return [[found.stat().st_size, found.stat().st_mtime_ns] for found in files if found.exists()]
