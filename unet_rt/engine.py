"""The engine: a graph built for one backend and precision, with all that tiling, decisions and proof need.

The two lines of data meet here: ``build.py`` writes engine folders, ``predict.py`` runs engines. Reading one needs neither
torch nor onnx.

An engine folder holds ``spec.json`` and files named by content, which ``spec.json`` lists with their SHA-256::

    spec.json              what this module's EngineSpec holds; written last, so that a reader sees a whole engine or none
    model-<hash>.onnx      the FP32 graph as given: baseline of ``verify``, source of every rebuild
    graph-<hash>.onnx      the graph as built
    parity-<hash>.json     what was measured, on what, against what, with which versions
    engine-<hash>.bin      the backend's own plan, where it compiles one ahead of time
    calibration-<hash>.json  activation ranges, where the graph was quantised
    exam-<hash>.npz        a few real tiles and the baseline's outputs (absent with ``--no-exam``)

Beside them, ``row-<graph>-<machine>.json`` is what the exam gave on another machine: written there, no part of the engine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .contract.contract import Contract
from .contract.json import contract_from_json
from .errors import BackendError, ContractError, EngineError, OutputError, TileError, size_text
from .system.durable import PART, Disk, locked, part_path, parts_of
from .tiling.axis import canvas
from .tiling.field import OutputField, TileSizes
from .tiling.grid import TileGrid, choose_tile, tile_grid, with_halo
from .tiling.stitch import Blend

if TYPE_CHECKING:
    from .backends.session import DeviceSession, Session


log = logging.getLogger("unet_rt")

Precision = Literal["fp32", "fp16", "bf16", "int8"]
SCHEMA = (1, 0)  # (major, minor): a reader accepts its own major and any minor
FileKind = Literal["model", "graph", "parity", "exam", "engine", "calibration"]
_SUFFIX = {
    "model": ".onnx",
    "graph": ".onnx",
    "parity": ".json",
    "exam": ".npz",
    "engine": ".bin",
    "calibration": ".json",
}


@dataclass(frozen=True)
class InputSpec:
    """One graph input: its name, axes (``"NCYX"``), number of channels and dtype (a NumPy name)."""

    name: str
    axes: str
    channels: int
    dtype: str = "float32"


@dataclass(frozen=True)
class EngineSpec:
    """What travels with an engine.

    Attributes:
        contract: The input contract, complete.
        inputs: Graph inputs; a sample's channels are dealt to them in order.
        outputs: What the outputs depend on, with the halos computed from the graph.
        sizes: Accepted tile sizes per spatial axis.
        batch: The batch size the graph is fixed to, or None.
        halo: ``exact``, ``measured`` or ``given``.
        halo_limit: Samples that the halo is cut to where it is not exact, else None.
        tile: The tile chosen by build, in pixels. For exact networks of free size a bound on the tile's area.
        overlap: Pixels shared by neighbouring tiles where tiles are blended (not exact networks), else None.
        blend: Weights of blended tiles.
        precision, backend, device: As built.
        run_batch: Tiles per run at which build measured it fastest; what ``predict`` uses unless told otherwise.
        batches: The batch sizes that its plan takes, ascending; empty: any.
        tiles: The tiles that its plan takes: ``tile``, and a smaller one for memory that does not hold it, on the same
            canvas; empty: any that the graph accepts.
        bytes_per_px: Memory that running takes per tile pixel, as measured by build (0: unknown); the device's memory
            for an engine on a GPU.
        made_on: Machine and library versions at build.
        options: Everything else that decided the result.
    """

    contract: Contract
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputField, ...]
    sizes: tuple[TileSizes, ...]
    batch: int | None
    halo: Literal["exact", "measured", "given"]
    halo_limit: int | None
    tile: tuple[int, ...]
    overlap: tuple[int, ...] | None
    blend: Blend
    precision: Precision
    backend: str
    device: str
    run_batch: int = 1
    batches: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    bytes_per_px: float = 0.0
    made_on: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether tiles placed side by side equal whole-image inference (with the halo in use: by proof or measurement)."""
        return self.overlap is None

    @property
    def channels(self) -> int:
        """Channels of the image: those of all inputs together."""
        return sum(i.channels for i in self.inputs)

    @property
    def spatial(self) -> int:
        return len(self.sizes)

    @property
    def free_size(self) -> bool:
        return all(s.fixed is None for s in self.sizes)

    @property
    def runs_whole(self) -> bool:
        """Whether the network runs on whole images and tiles have to equal that."""
        return self.exact and self.free_size

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Tiles per run that the engine takes, ascending; empty: any number."""
        if any("N" not in i.axes for i in self.inputs):
            return (1,)  # no batch axis: one tile at a time
        return self.batches or (() if self.batch is None else (self.batch,))

    @property
    def input_range(self) -> tuple[tuple[float, float], ...] | None:
        """(lowest, highest) normalised value that build saw, per channel or one pair for all; None where it saw none."""
        return _ranges(self.options.get("input_range"))

    def contract_of(self, output: int) -> Contract:
        """The contract as that of one output."""
        return self.contract.of_head(self.outputs[output].name)

    def head(self, name: str | None) -> int:
        """Number of the output called ``name``; None: the first.

        Raises:
            ContractError: The engine has no such output.
        """
        names = [output.name for output in self.outputs]
        if name is not None and name not in names:
            raise ContractError(f"the engine has no output {name!r}; its outputs are {', '.join(names)}")
        return 0 if name is None else names.index(name)

    def used_outputs(self) -> tuple[OutputField, ...]:
        """The outputs with the halo in use."""
        if self.halo_limit is None:
            return self.outputs
        return tuple(with_halo(o, self.halo_limit) for o in self.outputs)

    def grid(
        self,
        image: Sequence[int],
        tile: Sequence[int] | None = None,
        max_px: int | None = None,
        *,
        aligned: bool = False,
    ) -> TileGrid:
        """The tiles for an image of spatial shape ``image``.

        Args:
            image: Pixels per axis.
            tile: Tile size per axis. None: for exact networks the rectangle of at most ``max_px`` pixels (default: the
                area of the built tile) that computes least for this image; the built tile where the halo is not exact,
                unless ``max_px`` forbids it, and where the network cannot be tiled exactly.
            max_px: Bound on the tile's pixels.
            aligned: Tiles that are placed own equal stretches, for results that are written in blocks.

        Raises:
            TileError: A tile that the graph or the engine's plan does not accept, that keeps nothing, or that would
                change the answer (networks that cannot be tiled exactly have one tile: it is part of the model).
        """
        outputs = self.used_outputs()
        if tile is not None and len(tile) != self.spatial:
            raise TileError(
                f"tile {size_text(tile)} has {len(tile)} number(s), the network {self.spatial} spatial axes; "
                f"use e.g. {size_text((tile[0],) * self.spatial)}"
            )
        if self.overlap is not None:
            if tile is not None and tuple(tile) != self.tile:
                raise TileError(
                    f"tile {size_text(tile)} px differs from the engine's {size_text(self.tile)}: this network cannot be "
                    "tiled exactly, so its tile is part of the model; build again with --tile"
                )
            return tile_grid(image, self.tile, self.sizes, outputs, overlap=self.overlap)
        bound = prod(self.tile) if max_px is None else max_px
        if tile is None and self.halo_limit is not None and bound >= prod(self.tile):
            tile = self.tile  # narrower ones would have more seams than the halo was judged on
        elif tile is None:
            tile = choose_tile(image, self.sizes, outputs, bound, aligned=aligned)
        if not self.tiles:
            return tile_grid(image, tile, self.sizes, outputs, aligned=aligned)
        if tuple(tile) not in self.tiles:
            raise TileError(
                f"tile {size_text(tile)} px is not in the engine's plan, which takes "
                f"{' or '.join(map(size_text, self.tiles))} px; use one of these, or build it: unet-rt build MODEL.onnx "
                f"--samples IMAGES --backend {self.backend} --device {self.device} --tile {size_text(tile)}"
            )
        sizes = [replace(s, fixed=t) for s, t in zip(self.sizes, tile, strict=True)]
        return tile_grid(image, tile, sizes, outputs, aligned=aligned, least=self.tile)

    def smaller_grid(self, grid: TileGrid, *, aligned: bool = False) -> TileGrid | None:
        """The tiles for the same image that come next where memory does not hold those of ``grid``.

        Results are the same, as the halo is exact: the plan's smaller tile, or one of at most half the pixels. None:
        there are none, or results would change.
        """
        if self.overlap is not None or self.halo != "exact":
            return None
        size = prod(grid.tile)
        tile = next((t for t in self.tiles if prod(t) < size), None)
        if self.tiles and tile is None:
            return None
        try:
            smaller = self.grid(grid.image, tile, size // 2, aligned=aligned)
        except TileError:  # test-time augmentation has larger halos, beside which it may keep nothing
            return None
        return smaller if prod(smaller.tile) < size else None

    def canvas_shape(self, image: Sequence[int]) -> tuple[int, ...]:
        """Size in pixels of the canvas that whole-image inference runs on."""
        axes = enumerate(zip(image, self.sizes, strict=True))
        return tuple(canvas(n, s, [o.field[k] for o in self.outputs]).size for k, (n, s) in axes)

    def to_json(self) -> dict[str, Any]:
        return {
            "contract": self.contract.to_json(),
            "inputs": [vars(i) for i in self.inputs],
            "outputs": [o.to_json() for o in self.outputs],
            "sizes": [vars(s) for s in self.sizes],
            "batch": self.batch,
            "halo": self.halo,
            "halo_limit": self.halo_limit,
            "tile": list(self.tile),
            "overlap": None if self.overlap is None else list(self.overlap),
            "blend": self.blend,
            "precision": self.precision,
            "backend": self.backend,
            "device": self.device,
            "run_batch": self.run_batch,
            "batches": list(self.batches),
            "tiles": [list(tile) for tile in self.tiles],
            "bytes_per_px": self.bytes_per_px,
            "made_on": dict(self.made_on),
            "options": dict(self.options),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineSpec:
        inputs = tuple(InputSpec(**i) for i in data["inputs"])
        seen = _ranges(data["options"].get("input_range"))
        if seen is not None and len(seen) not in (1, sum(i.channels for i in inputs)):
            raise ValueError(f"input_range {seen!r}")
        return cls(
            contract=contract_from_json(data["contract"]),
            inputs=inputs,
            outputs=tuple(OutputField.from_json(o) for o in data["outputs"]),
            sizes=tuple(TileSizes(**s) for s in data["sizes"]),
            batch=data["batch"],
            halo=data["halo"],
            halo_limit=data["halo_limit"],
            tile=_pixels(data, "tile", data["tile"], 1),
            overlap=None if data["overlap"] is None else _pixels(data, "overlap", data["overlap"], 0),
            blend=data["blend"],
            precision=data["precision"],
            backend=data["backend"],
            device=data["device"],
            run_batch=_count(data["run_batch"]),
            batches=tuple(_count(n) for n in data["batches"]),
            tiles=tuple(_pixels(data, "tiles", tile, 1) for tile in data["tiles"]),
            bytes_per_px=data["bytes_per_px"],
            made_on=data["made_on"],
            options=data["options"],
        )


def _pixels(data: Mapping[str, Any], key: str, value: Any, least: int) -> tuple[int, ...]:
    """``value``, of ``key``: one whole number per spatial axis."""
    if len(value) != len(data["sizes"]) or any(not isinstance(n, int) or n < least for n in value):
        raise ValueError(f"{key} {value!r}")
    return tuple(value)


def _ranges(value: Any) -> tuple[tuple[float, float], ...] | None:
    return None if value is None else tuple((float(low), float(high)) for low, high in value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"batch {value!r}")
    return value


@dataclass(frozen=True)
class LoadOptions:
    """What :func:`load` was asked for, so that other processes can load the same; ``threads`` are theirs to choose."""

    device: str | None = None
    accept_unverified: bool = False


class Engine:
    """A loaded engine: ``spec``, ``run``, ``close``. Use it in a ``with`` block; one thread runs it at a time."""

    def __init__(
        self,
        spec: EngineSpec,
        session: Session,
        folder: EngineFolder | None = None,
        options: LoadOptions = LoadOptions(),
    ):
        self.spec = spec
        self.folder = folder
        self.options = options
        self._session = session

    @property
    def session_version(self) -> str:
        """Version of the backend's library."""
        return self._session.version

    @property
    def device_session(self) -> DeviceSession | None:
        """The session where it takes arrays on a GPU, else None."""
        return self.gpu_session

    @property
    def gpu_session(self) -> DeviceSession | None:
        """The session where it runs on a GPU, wherever this form of the engine takes its tiles from; else None."""
        from .backends.session import on_device

        return self._session if on_device(self._session) else None

    def batch_for(self, tiles: int) -> int:
        """The batch size to run ``tiles`` tiles with: theirs, or the smallest that the engine takes and that holds them."""
        sizes = self.spec.batch_sizes
        return next((n for n in sizes if n >= tiles), sizes[-1]) if sizes else tiles

    def fewer(self, batch: int) -> int:
        """The batch size to try next where memory does not hold ``batch`` tiles; ``batch`` itself where none is less."""
        sizes = self.spec.batch_sizes
        return max((n for n in sizes if n < batch), default=batch) if sizes else max(1, batch // 2)

    def run(self, batch: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
        """Runs tiles through the network.

        Args:
            batch: (N, C, *tile), normalised pixels; any N (graphs of a fixed batch are padded and trimmed).

        Returns:
            One float32 array (N, K, *tile_out) per output, whatever axes the graph itself uses.
        """
        n = len(batch)
        if self.batch_for(n) == n:
            return self._run(batch)
        parts, k = [], 0
        while k < n:
            size = self.batch_for(n - k)
            part = batch[k : k + size]
            short = size - len(part)
            if short:
                part = np.concatenate([part, np.repeat(part[-1:], short, axis=0)])
            parts.append([out[: size - short] for out in self._run(part)])
            k += size
        return [np.concatenate(outs) for outs in zip(*parts, strict=True)]

    def graph_inputs(self, batch: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """(N, C, *tile) as the graph's own inputs: channels dealt out, axes in its order, C-contiguous."""
        inputs, first = [], 0
        for spec in self.spec.inputs:
            x = batch[:, first : first + spec.channels]
            first += spec.channels
            inputs.append(np.ascontiguousarray(_to_axes(x, spec.axes)))
        return inputs

    def _run(self, batch: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
        outputs = self._session.run(self.graph_inputs(batch))  # the session casts, and refuses to cut values
        if len(outputs) != len(self.spec.outputs):
            raise BackendError(
                f"the engine returned {len(outputs)} outputs, and its spec names {len(self.spec.outputs)}; build it again"
            )
        return [_from_axes(y, o.axes) for y, o in zip(outputs, self.spec.outputs, strict=True)]

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EngineView(Engine):
    """An engine in another form, over the session of ``engine``, which stays as it is: who opened that one closes it.

    Subclasses say in :meth:`run` what they make of its results. Engines on a GPU take tiles from the host here.
    """

    def __init__(self, engine: Engine, spec: EngineSpec):
        super().__init__(spec, engine._session, engine.folder, engine.options)
        self._engine = engine

    @property
    def device_session(self) -> None:
        return None

    def close(self) -> None:
        """Leaves the engine as it is: who opened it closes it."""


def _to_axes(x: npt.NDArray[Any], axes: str) -> npt.NDArray[Any]:
    """(N, C, *spatial) to the order of ``axes``; a graph without N or C gets its single sample or channel."""
    spatial = [a for a in axes if a not in "NC"]
    order = ["N", "C", *spatial]
    for axis in "CN":
        if axis not in axes:
            x = x.take(0, axis=order.index(axis))
            order.remove(axis)
    return x.transpose([order.index(a) for a in axes])


def _from_axes(y: npt.NDArray[Any], axes: str) -> npt.NDArray[np.float32]:
    spatial = [a for a in axes if a not in "NC"]
    order = [a for a in ("N", "C", *spatial) if a in axes]
    y = y.transpose([axes.index(a) for a in order])
    for position, axis in enumerate("NC"):
        if axis not in axes:
            y = np.expand_dims(y, position)
    return y.astype(np.float32, copy=False)


# --- the folder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineFolder:
    """An engine folder that was read and whose files were checked against their hashes."""

    path: Path
    spec: EngineSpec
    files: Mapping[str, Mapping[str, Any]]
    parity: Mapping[str, Any] | None

    def file(self, kind: FileKind) -> Path:
        return self.path / str(self.files[kind]["name"])

    def exam(self) -> dict[str, npt.NDArray[Any]] | None:
        """Arrays of the exam: ``input`` and ``output_0``, ``output_1``, ...; None where the engine has none."""
        if "exam" not in self.files:
            return None
        with np.load(self.file("exam"), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}


def write_folder(
    folder: Path, spec: EngineSpec, files: Mapping[FileKind, Path], *, overwrite: bool = False
) -> EngineFolder:
    """Writes an engine folder; a reader sees the old one, or the new one, never a mixture.

    Args:
        folder: Where. A new folder appears by one rename; an existing engine is replaced by its ``spec.json``.
        spec: The spec.
        files: Files to copy in, by kind.
        overwrite: Replace an existing engine.

    Raises:
        OutputError: The folder exists and holds something else, or cannot be written.
    """
    import shutil

    def fill(staging: Path) -> None:
        entries: dict[str, dict[str, Any]] = {}
        for kind, path in files.items():
            digest = sha256(path)
            name = f"{kind}-{digest[:12]}{_SUFFIX[kind]}"
            entries[kind] = {"name": name, "sha256": digest, "bytes": path.stat().st_size}
            shutil.copyfile(path, staging / name)
        document = {"schema": list(SCHEMA), "files": entries, **spec.to_json()}
        document["key"] = _key(document)
        (staging / "spec.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    return place_folder(folder, fill, overwrite=overwrite)


def place_folder(folder: Path, fill: Callable[[Path], None], *, overwrite: bool = False) -> EngineFolder:
    """Puts an engine that ``fill`` writes, ``spec.json`` and all, into place: seen whole or not at all.

    A process that is killed meanwhile leaves a hidden ``.part`` folder, which is no engine, and which the next one that
    writes an engine of this name removes.

    Args:
        folder: Where.
        fill: Writes the files of the engine into the empty folder that it is given. What it raises is passed on, and
            nothing is placed.
        overwrite: Replace an existing engine.

    Raises:
        OutputError: The folder exists and holds something else, or cannot be written.
    """
    check_target(folder, overwrite=overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _staging(folder) as staging:
            fill(staging)
            for path in staging.iterdir():
                Disk().sync_file(path)
            with _only_writer(folder.parent):
                check_target(folder, overwrite=overwrite)  # again: another build may have ended meanwhile
                if folder.exists() and any(folder.iterdir()):
                    replaced, names = _file_names(folder), _file_names(staging)
                    for name in names:
                        os.replace(staging / name, folder / name)
                    os.replace(staging / "spec.json", folder / "spec.json")
                    for name in replaced - names:
                        (folder / name).unlink(missing_ok=True)
                    for row in folder.glob("row-*.json"):  # exams of the graph that was replaced
                        row.unlink(missing_ok=True)
                else:
                    os.replace(staging, folder)
    except OSError as error:
        raise OutputError(f"{folder}: the engine cannot be written ({error.strerror}); choose another --out") from error
    return read_folder(folder)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, gone afterwards; those that killed processes have left are removed first."""
    import shutil

    with _only_writer(folder.parent), ExitStack() as held:
        for left in parts_of(folder):
            with _held(left) as alone:
                if alone:
                    shutil.rmtree(left, ignore_errors=True)
        staging = part_path(folder)
        staging.mkdir()  # with the mode that the umask gives to folders: it becomes the engine's
        held.enter_context(_held(staging))
        ours = held.pop_all()
    with ours:
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Holds a folder for as long as this process lives; whether nobody else does. On Windows nobody can tell."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # it was put into place at this moment, or belongs to another user
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(handle)


@contextmanager
def _only_writer(parent: Path) -> Iterator[None]:
    """While this process moves an engine into ``parent``, others of this machine wait: each deletes what it replaced."""
    if sys.platform == "win32":
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


def _file_names(folder: Path) -> set[str]:
    """Names of the files that an engine's spec lists; none where it cannot be read. Nothing else is ever deleted."""
    try:
        files = json.loads((folder / "spec.json").read_text(encoding="utf-8"))["files"].values()
        return {Path(str(entry["name"])).name for entry in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raises OutputError where an engine must not be written: asked before any work is done."""
    if not folder.exists():
        parent = next(p for p in folder.absolute().parents if p.exists())
        if not os.access(parent, os.W_OK):
            raise OutputError(f"{folder}: {parent} is not writable; choose another --out")
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file, and an engine is a folder; choose another --out")
    names = {p.name for p in folder.iterdir()}
    if names and "spec.json" not in names:
        raise OutputError(f"{folder} exists and is not an engine; choose another --out")
    if names and not overwrite:
        raise OutputError(f"{folder} exists; pass --overwrite to replace it, or choose another --out")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} is not writable; choose another --out")


def read_folder(folder: str | Path) -> EngineFolder:
    """Reads and checks an engine folder; nothing in it is executed or unpickled.

    Raises:
        EngineError: Not an engine, a newer schema, or files that are missing or not those that were written.
    """
    folder = Path(folder)
    while True:
        text = _spec_text(folder)
        try:
            return check_folder(folder, text)
        except (EngineError, FileNotFoundError):
            if _spec_text(folder) == text:
                raise
            # replaced while it was read: what the old spec names is gone, and the new one is whole


def _spec_text(folder: Path) -> str:
    path = folder / "spec.json"
    if folder.name.startswith(".") and folder.name.endswith(PART):
        raise EngineError(f"{folder} was being written when its process ended; build the engine again")
    if folder.is_file():
        raise EngineError(
            f"{folder} is a file, and an engine is a folder; if unet-rt pack made it: unet-rt unpack {folder}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        what = "does not exist" if not folder.exists() else "is not an engine folder (it has no spec.json)"
        raise EngineError(f"{folder} {what}; make one with: unet-rt build model.onnx --out {folder}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} cannot be read ({error}); build the engine again") from error


def check_folder(folder: Path, text: str, *, called: Path | None = None) -> EngineFolder:
    """The engine in ``folder`` by the ``text`` of its ``spec.json``, files and hashes checked.

    Args:
        folder: Where the files are.
        text: Of ``spec.json``.
        called: What errors call the folder, where it is a temporary copy of something.

    Raises:
        EngineError: Not an engine, a newer schema, or files that are missing or not those that were written.
    """
    called = called or folder
    path = called / "spec.json"
    try:
        document = json.loads(text)
        major, minor = (int(v) for v in document["schema"])
        files = {str(kind): dict(entry) for kind, entry in document["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise EngineError(f"{path} is damaged ({error}); build the engine again") from error
    if major != SCHEMA[0]:
        raise EngineError(
            f"{called} has schema {major}.{minor}, and this version reads {SCHEMA[0]}.x; "
            + ("upgrade unet-rt" if major > SCHEMA[0] else _anew(called))
        )
    for kind in ("model", "graph"):
        if kind not in files:
            raise EngineError(f"{path} names no {kind}; build the engine again")
    for entry in files.values():
        name = str(entry.get("name", ""))
        if name != Path(name).name:  # nothing outside the folder is ever an engine's
            raise EngineError(f"{path} names the file {name!r}, outside its folder; build the engine again")
        file = folder / name
        if not file.is_file():
            raise EngineError(f"{called / name} is missing from the engine; copy the folder whole, or build again")
        try:
            digest = sha256(file)
        except PermissionError as error:
            raise EngineError(
                f"{called / name} cannot be read ({error.strerror}); give yourself the right to, or copy the engine"
            ) from error
        if digest != entry.get("sha256"):
            raise EngineError(
                f"{called / name} is not the file that was built (its SHA-256 differs); copy it again, or build again"
            )
    try:
        spec = EngineSpec.from_json(document)
        parity = (
            json.loads((folder / files["parity"]["name"]).read_text(encoding="utf-8")) if "parity" in files else None
        )
        key = _key(document)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, ContractError) as error:
        raise EngineError(
            f"{path} is damaged, or was written by another version of unet-rt ({type(error).__name__}: {error}); "
            f"{_anew(called)}"
        ) from error
    if document.get("key") != key:
        raise EngineError(
            f"{path} was changed after it was written (its key differs), and parity was proven for what it said; "
            "copy it again, or build again"
        )
    return EngineFolder(folder, spec, files, parity)


def _anew(folder: Path) -> str:
    """How an engine of another form is replaced: nothing but the folder's name is known of how it was built."""
    return f"build it again: unet-rt build model.onnx --out {folder} --overwrite"


def _key(document: Mapping[str, Any]) -> str:
    """What ``key`` must be: a hash of everything else that the spec says, hashes of the other files included."""
    rest = {name: value for name, value in document.items() if name != "key"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load(
    folder: str | Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    accept_unverified: bool = False,
) -> Engine:
    """Loads an engine folder.

    A plan that another GPU, driver or library version cannot run is made again from ``graph.onnx``, which takes as long
    as building it did, and one line says so.

    The record of parity must be there, belong to these bytes, and be inside the budget it names. On another processor or
    library version than recorded the engine sits its exam again first; it is never assumed that parity has travelled.

    Args:
        folder: The engine folder; may be read-only.
        device: ``"cpu"`` or ``"cuda:N"``; None: the one it was built for.
        threads: Threads of the backend; None: as many as affinity and quota allow.
        accept_unverified: Load although the record is missing or cannot be renewed here.

    Raises:
        EngineError: Damaged, foreign or unproven engines, and precisions that the backend did not keep.
        BackendError: The backend or device is missing.
        ParityError: The exam was failed on this machine.
    """
    from . import backends, exam

    opened = read_folder(folder)
    spec = opened.spec
    if device is not None and device != spec.device:
        if "cpu" in (device, spec.device):
            raise EngineError(f"{folder} was built for {spec.device}, not {device}; build again with --device {device}")
        spec = replace(
            spec, device=backends.device(device)
        )  # another GPU of this machine: its fingerprint tells whether it is alike
    if not accept_unverified:
        exam.check_record(opened)
    session, made_again = _session(opened, spec, threads or 0)
    engine = Engine(spec, session, opened, LoadOptions(device, accept_unverified))
    try:
        if session.precision != spec.precision:
            raise EngineError(
                f"{folder} is {spec.precision}, but {spec.backend} runs it in {session.precision} on this machine; "
                "build again here"
            )
        if not accept_unverified:
            exam.sit_if_elsewhere(engine, made_again=made_again)
    except BaseException:
        engine.close()
        raise
    return engine


def _session(opened: EngineFolder, spec: EngineSpec, threads: int) -> tuple[Session, bool]:
    """The session of a folder; and whether its plan was of no use here and is made again: another one, and unproven."""
    from . import backends

    backend = backends.get(spec.backend)
    graph = opened.file("graph")
    blob = opened.file("engine") if "engine" in opened.files else None
    stale = None if blob is None else backend.stale(blob, spec.device)
    if stale is None:
        return backend.load(graph, precision=spec.precision, device=spec.device, threads=threads, blob=blob), False
    log.warning("%s: its plan is of no use here (%s); it is made again from its graph", opened.path, stale)
    with tempfile.TemporaryDirectory(prefix="unet-rt-rebuild-") as work:
        anew = Path(work) / "engine.bin"
        backend.build(
            graph,  # which holds the precision, quantised ranges and FP32 islands included; the model does not
            Path(work) / "built.onnx",
            precision=spec.precision,
            device=spec.device,
            blob=anew,
            tiles=spec.tiles or (spec.tile,),
            batches=spec.batches or (spec.run_batch,),
        )
        session = backend.load(
            Path(work) / "built.onnx", precision=spec.precision, device=spec.device, threads=threads, blob=anew
        )
        return session, True
