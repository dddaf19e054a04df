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

import io
import itertools
import json
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .blocks import Block
from .errors import OutputError
from .outputs.zarr import ZarrOutput
from .pipeline import Tally
from .system.durable import Disk, locked, part_path

Array = npt.NDArray[Any]
Place = tuple[tuple[int, ...], tuple[int, ...]]  # [start, stop) in samples of the result

FORMAT = 2
HELD_BYTES = 2**28  # of unpacked blocks, while an output is made of them
_LEVEL = 1  # of zlib: packed blocks live for the time of the run


def stage_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.stage")


class Store(Protocol):
    """Where the data of blocks are kept until all are there."""

    def write(self, block: Block, values: Array) -> list[Path]:
        """Writes (K, *spatial) or (*spatial,); returns the files that hold it, yet to be synced."""
        ...

    def window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        """Samples [start, stop) of finished blocks: (K, *spatial) or (*spatial,)."""
        ...


class PackedStore:
    """One packed file per block, for outputs that are written from top to bottom at the end."""

    def __init__(self, folder: Path, cuts: Sequence[Sequence[int]]) -> None:
        """``cuts``: per axis, samples of the result where blocks begin, and its end."""
        self._folder, self._cuts = folder, cuts
        self._shape = tuple(len(c) - 1 for c in cuts)
        self._held: OrderedDict[int, Array] = OrderedDict()  # the ones read last
        folder.mkdir(exist_ok=True)

    def write(self, block: Block, values: Array) -> list[Path]:
        stream = io.BytesIO()
        np.save(stream, values, allow_pickle=False)
        path = self._path(block.number)
        part = part_path(path)  # another process may have finished the same block
        try:
            part.write_bytes(zlib.compress(stream.getbuffer(), _LEVEL))
            part.replace(path)
        except BaseException:  # half of it would take the room that a full disk lacks
            part.unlink(missing_ok=True)
            raise
        return [path]

    def window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        ranges = [
            [k for k, (a, b) in enumerate(pairwise(cuts)) if a < high and b > low]
            for cuts, low, high in zip(self._cuts, start, stop, strict=True)
        ]
        result: Array | None = None
        for index in itertools.product(*ranges):
            values = self._block(plane * prod(self._shape) + int(np.ravel_multi_index(index, self._shape)))
            lead = values.shape[: values.ndim - len(index)]
            if result is None:
                result = np.empty((*lead, *(b - a for a, b in zip(start, stop, strict=True))), values.dtype)
            source, target = [], []
            for k, cuts, low, high in zip(index, self._cuts, start, stop, strict=True):
                first, last = max(cuts[k], low), min(cuts[k + 1], high)
                source.append(slice(first - cuts[k], last - cuts[k]))
                target.append(slice(first - low, last - low))
            lead_all = (slice(None),) * len(lead)
            result[lead_all + tuple(target)] = values[lead_all + tuple(source)]
        assert result is not None  # noqa: S101 - windows are not empty
        return result

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}"

    def _block(self, number: int) -> Array:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        path = self._path(number)
        try:
            values: Array = np.load(io.BytesIO(zlib.decompress(path.read_bytes())), allow_pickle=False)
        except (OSError, ValueError, EOFError, zlib.error) as error:
            raise OutputError(
                f"{path}: a finished block cannot be read back ({error}); use --restart to begin anew"
            ) from error
        self._held[number] = values
        while len(self._held) > 1 and sum(v.nbytes for v in self._held.values()) > HELD_BYTES:
            self._held.popitem(last=False)
        return values


class ZarrStore:
    """Chunks of an OME-Zarr image, which becomes the output as it is."""

    def __init__(self, output: ZarrOutput, place: Callable[[Block], Place]) -> None:
        self.output, self._place = output, place

    def write(self, block: Block, values: Array) -> list[Path]:
        return self.output.write(block.plane, self._place(block)[0], values)

    def window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        return self.output.read(plane, start, stop)


class MemoryStore:
    """An array (planes, [K,] *spatial) in memory."""

    def __init__(self, array: Array, place: Callable[[Block], Place]) -> None:
        self.array, self._place = array, place

    def write(self, block: Block, values: Array) -> list[Path]:
        start, stop = self._place(block)
        self.array[block.plane][(..., *map(slice, start, stop))] = values
        return []

    def window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        view: Array = self.array[plane][(..., *map(slice, start, stop))]
        return view


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

    def put(self, store: Store, block: Block, values: Array, tally: Tally) -> None:
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
