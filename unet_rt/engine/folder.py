"""The files of an engine, read and checked against their hashes."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..system.durable import PART
from ..system.json import Record, Size, from_json
from ..system.names import path_of
from .spec import EngineSpec, read_spec

SCHEMA = (1, 0)  # (major, minor): a reader accepts its own major and any minor
_OF_THE_FOLDER = ("schema", "files", "key")  # what spec.json says beside the spec
FileKind = Literal["model", "graph", "parity", "exam", "engine", "calibration"]
SUFFIX = {
    "model": ".onnx",
    "graph": ".onnx",
    "parity": ".json",
    "exam": ".npz",
    "engine": ".bin",
    "calibration": ".json",
}


# --- the folder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileEntry(Record):
    """A file of an engine, as its spec lists it."""

    name: str
    sha256: str
    bytes: Size


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


def read_folder(folder: str | Path) -> EngineFolder:
    """Reads and checks an engine folder; nothing in it is executed or unpickled.

    Raises:
        EngineError: Not an engine, a newer schema, or files that are missing or not those that were written.
    """
    folder = path_of(folder, EngineError)
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
        raise EngineError(_way_to_engine(folder))
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        what = "does not exist" if not folder.exists() else "is not an engine folder (it has no spec.json)"
        raise EngineError(f"{folder} {what}; make one with: unet-rt build model.onnx --out {folder}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} cannot be read ({error}); build the engine again") from error


def _way_to_engine(file: Path) -> str:
    """What becomes an engine of a file that was taken for one, by its suffix."""
    quoted, graph = shlex.quote(str(file)), shlex.quote(str(file.with_suffix(".onnx")))
    build = f"unet-rt build {graph} --samples YOUR_IMAGES --out {shlex.quote(str(file.with_suffix('.urt')))}"
    if file.suffix.lower() == ".onnx":
        return f"{file} is an ONNX file, and what runs is the engine that is built from it: {build}"
    if file.suffix.lower() in (".pt", ".pth", ".ckpt", ".py"):
        return (
            f"{file} is of PyTorch, and what runs is an engine, a folder; export the network, then build: unet-rt export "
            f"{quoted} --out {graph}, {build}"
        )
    return f"{file} is a file, and an engine is a folder; if unet-rt pack made it: unet-rt unpack {quoted}"


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
    document, files, newer = _parse(text, called)
    for entry in files.values():
        _check_file(folder, called, entry)
    damaged = f"{path} is damaged, or was written by another version of unet-rt"
    spec = read_spec(_spec_fields(document, newer=newer), where=damaged, way_out=rebuild_line(called))
    try:
        parity = (
            json.loads((folder / files["parity"]["name"]).read_text(encoding="utf-8")) if "parity" in files else None
        )
        if not isinstance(parity, dict | None):
            raise ValueError(f"it holds a {type(parity).__name__}")
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{called / files['parity']['name']} is damaged ({error}); {rebuild_line(called)}") from error
    if document.get("key") != spec_key(document):
        raise EngineError(
            f"{path} was changed after it was written (its key differs), and parity was proven for what it said; "
            "copy it again, or build again"
        )
    return EngineFolder(folder, spec, files, parity)


def _parse(text: str, called: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], bool]:
    """(everything, files by kind, whether a later minor version wrote it) of a ``spec.json``."""
    path = called / "spec.json"
    way_out = "build the engine again"
    try:
        document = json.loads(text)
        major, minor = schema = document["schema"]
        entries = dict(document["files"].items())
        if not all(type(v) is int and v >= 0 for v in schema):
            raise ValueError(f"schema is {schema!r}, not two whole numbers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(f"{path} is damaged ({error}); {way_out}") from error
    if major != SCHEMA[0]:
        raise EngineError(
            f"{called} has schema {major}.{minor}, and this version reads {SCHEMA[0]}.x; "
            + ("upgrade unet-rt" if major > SCHEMA[0] else rebuild_line(called))
        )
    files = {
        kind: from_json(
            FileEntry, entry, where=f"{path} is damaged: files.{kind}", error=EngineError, way_out=way_out
        ).to_json()
        for kind, entry in entries.items()
    }
    for kind in ("model", "graph"):
        if kind not in files:
            raise EngineError(f"{path} names no {kind}; {way_out}")
    return document, files, minor > SCHEMA[1]


def _spec_fields(document: Mapping[str, Any], *, newer: bool) -> dict[str, Any]:
    """The part of a ``spec.json`` that is the spec; without what a newer minor version may have added."""
    known = {f.name for f in fields(EngineSpec)}
    return {key: value for key, value in document.items() if key not in _OF_THE_FOLDER and (key in known or not newer)}


def _check_file(folder: Path, called: Path, entry: Mapping[str, Any]) -> None:
    """Raises EngineError where a file of an engine is not in ``folder``, or not the one that was written."""
    name = str(entry["name"])
    if name != Path(name).name:  # nothing outside the folder is ever an engine's
        raise EngineError(f"{called / 'spec.json'} names the file {name!r}, outside its folder; build the engine again")
    file = folder / name
    if not file.is_file():
        raise EngineError(f"{called / name} is missing from the engine; copy the folder whole, or build again")
    try:
        digest = sha256(file)
    except PermissionError as error:
        raise EngineError(
            f"{called / name} cannot be read ({error.strerror}); give yourself the right to, or copy the engine"
        ) from error
    if digest != entry["sha256"]:
        raise EngineError(
            f"{called / name} is not the file that was built (its SHA-256 differs); copy it again, or build again"
        )


def spec_key(document: Mapping[str, Any]) -> str:
    """What ``key`` must be: a hash of everything else that the spec says, hashes of the other files included."""
    rest = {name: value for name, value in document.items() if name != "key"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def rebuild_line(folder: Path) -> str:
    """How an engine of another form is replaced: nothing but the folder's name is known of how it was built."""
    return f"build it again: unet-rt build model.onnx --out {folder} --overwrite"
