"""A result under way: finished blocks in a folder beside the output, each with one durable mark.

The folder ``.NAME.stage`` (of the output NAME, on its file system) holds::

    run.json         what is computed: everything that decides the result, the plan, the numbers of the normalisation
    numbers/00000003 those of a plane, where each has its own: measured once, by whoever needs them first
    done/00000042    the mark of a finished block, with what was counted of it, and what computed it (library versions,
                     processor or device): written after the block's data are synced
    data/            the data: chunks of an OME-Zarr image, or one packed file per block

A block without a mark is computed again; exact arithmetic makes it the same bits. So a process may be killed at any moment,
any number of processes may share the blocks, and whoever finds the last mark set makes the output and removes the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError
from ..outputs.labels import hidden_base
from ..system.durable import Disk, locked
from .blocks import Block
from .store import BlockStore
from .work import Array, Tally

FORMAT = 2


def stage_folder(out: Path) -> Path:
    base = hidden_base(out)
    return base.with_name(f".{base.name}.stage")


class Stage:
    """The folder of a result under way. Make one with :func:`open_stage`.

    Attributes:
        folder: Its path.
        run: What ``run.json`` says.
    """

    def __init__(
        self, folder: Path, run: Mapping[str, Any], disk: Disk, maker: Mapping[str, Any] | None = None
    ) -> None:
        """``maker``: what blocks are computed by here, beside what decides the result; in JSON's types."""
        self.folder, self.run, self._disk, self._maker = folder, run, disk, dict(maker or {})
        self._marks = folder / "done"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def finished(self) -> set[int]:
        """Numbers of the blocks that have their mark."""
        return {int(path.name) for path in self._marks.iterdir() if path.name.isdecimal()}

    def put(self, store: BlockStore, block: Block, values: Array, tally: Tally) -> None:
        """Keeps a finished block: its data, then its mark."""
        self._check_there()
        try:
            files = store.write(block, values)
            self._disk.sync_tree(files, self.folder)
            counted = {"outside": tally.outside, "seen": tally.seen, "labels": _sparse(tally.labels)}
            mark = {**counted, "maker": self._maker}
            self._disk.write_whole(self._marks / f"{block.number:08d}", json.dumps(mark).encode())
        except OSError as error:
            self._check_there()
            raise OutputError(
                f"{error.filename or self.folder}: cannot be written ({error.strerror or error}); free some space and "
                "give the same command again: finished blocks are kept"
            ) from error

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Numbers (JSON) that every process needs and one makes: what is there under this name, else what ``make`` gives.

        Raises:
            OutputError: They are damaged, or cannot be written.
        """
        path = self.folder / "numbers" / name
        self._check_there()
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path.parent}: cannot be made ({error.strerror}); choose another --out") from error
        with locked(path.with_name(f"{name}.lock")):
            if not path.exists():
                made = make()
                try:
                    self._disk.write_whole(path, json.dumps(made).encode())
                except OSError as error:
                    raise OutputError(
                        f"{path}: cannot be written ({error.strerror}); free some space and give the same command again"
                    ) from error
            return _read(path)

    def _check_there(self) -> None:
        if not (self.folder / "run.json").exists():
            raise self.gone()

    def gone(self) -> OutputError:
        """What to raise where the folder is not there any more."""
        return OutputError(
            f"{self.folder} has gone: another process has finished or restarted this output; look at that"
        )

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file or folder of the stage another name, durably."""
        self._disk.replace(old, new)
        self._disk.sync_folder(self.folder)

    def tally(self, channels: int) -> tuple[Tally, list[dict[str, Any]]]:
        """What was counted of all finished blocks, and all that computed any of them."""
        total, makers = Tally(channels), list[dict[str, Any]]()
        for path in self._marks.iterdir():
            if not path.name.isdecimal():
                continue  # a mark that is being written, or that a kill has left
            mark = _read(path)
            total.outside += mark["outside"]
            total.seen += mark["seen"]
            for channel, counts in enumerate(mark["labels"]):
                for value, count in counts.items():
                    total.labels[channel, int(value)] += count
            if mark["maker"] not in makers:
                makers.append(mark["maker"])
        return total, makers

    def finish(self, make: Callable[[], None]) -> bool:
        """Makes the output with ``make`` and removes the folder; False where another process has done so.

        ``make`` may be run again: a kill may come between its end and that of the folder.
        """
        with locked(self.folder.with_name(f"{self.folder.name}.finish.lock")):
            if not self.folder.exists():
                return False
            make()
            self.remove()
            return True

    def remove(self) -> None:
        """Deletes the folder; the name goes first, so that what a kill leaves behind is no stage."""
        gone = self.folder.with_name(f"{self.folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        self._disk.replace(self.folder, gone)
        self._disk.sync_folder(gone.parent)
        shutil.rmtree(gone, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object. FileNotFoundError where there is none; OutputError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{path} is damaged ({error}); use --restart to begin anew") from error
    return dict(found)


def _sparse(labels: Array) -> list[dict[str, int]]:
    return [{str(v): int(counts[v]) for v in np.flatnonzero(counts)} for counts in labels]


def shard_lock(out: Path, index: int, count: int) -> AbstractContextManager[None]:
    """Holds the lock of a shard of an output: two processes would compute the same blocks."""
    folder = stage_folder(out)
    what = "this output" if count == 1 else f"shard {index}/{count} of this output"
    return locked(
        folder.with_name(f"{folder.name}.{index}-of-{count}.lock"),
        busy=f"{out}: another process is at {what}; wait for it, or choose another --out",
    )


def open_stage(
    out: Path,
    identity: Mapping[str, Any],
    prepare: Callable[[], Mapping[str, Any]],
    *,
    maker: Mapping[str, Any] | None = None,
    restart: bool = False,
    disk: Disk | None = None,
) -> Stage:
    """Opens the stage of an output, or starts one. What kills have left of earlier ones is deleted.

    Args:
        out: The output.
        identity: Everything that decides the result, in JSON's types. A stage of another identity is refused.
        prepare: Gives what else ``run.json`` is to hold (plan, numbers); called only where there is no stage yet. It may
            raise to refuse a new one.
        maker: What blocks are computed by here. A stage may have several: machines share one, libraries are updated.
        restart: Throw away what there is.
        disk: File operations.

    Raises:
        OutputError: The stage is of another identity, damaged, or cannot be made.
    """
    disk = disk or Disk()
    folder = stage_folder(out)
    path = folder / "run.json"
    stage = Stage(folder, {}, disk)
    if restart and folder.exists():
        stage.remove()
    shutil.rmtree(folder.with_name(f"{folder.name}.gone"), ignore_errors=True)
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        # One of several shards starts it, and measures what has to be known of the whole image; the others wait for that.
        with locked(folder.with_name(f"{folder.name}.start.lock")):
            if not path.exists():
                run = {"format": FORMAT, "identity": identity, **prepare()}
                try:
                    (folder / "done").mkdir(parents=True, exist_ok=True)
                    disk.write_whole(path, (json.dumps(run, indent=1) + "\n").encode())
                    disk.sync_folder(folder.parent)
                except OSError as error:
                    raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        found, form = dict(run["identity"]), run["format"]
    except FileNotFoundError as error:
        raise stage.gone() from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error}); use --restart to begin anew") from error
    if form != FORMAT:
        raise OutputError(f"{folder} was begun by another version of unet-rt; use --restart to begin anew")
    for key in sorted({*found, *identity}):
        if found.get(key) != identity.get(key):
            raise OutputError(
                f"{folder} holds an interrupted run with another {key} ({_short(found.get(key))}, now "
                f"{_short(identity.get(key))}); give the same command to go on, or --restart to throw it away"
            )
    return Stage(folder, run, disk, maker)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
