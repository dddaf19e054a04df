"""Engine folders written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..system.durable import Disk, only_writer, staging_folder
from .folder import SCHEMA, SUFFIX, EngineFolder, FileKind, read_folder, sha256, spec_key
from .spec import EngineSpec


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
            name = f"{kind}-{digest[:12]}{SUFFIX[kind]}"
            entries[kind] = {"name": name, "sha256": digest, "bytes": path.stat().st_size}
            shutil.copyfile(path, staging / name)
        document = {"schema": list(SCHEMA), "files": entries, **spec.to_json()}
        document["key"] = spec_key(document)
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
        with staging_folder(folder) as staging:
            fill(staging)
            disk = Disk()
            disk.sync_tree(staging.iterdir(), staging)
            with only_writer(folder.parent):
                check_target(folder, overwrite=overwrite)  # again: another build may have ended meanwhile
                if folder.exists() and any(folder.iterdir()):
                    replaced, names = _file_names(folder), _file_names(staging)
                    for name in names:
                        disk.replace(staging / name, folder / name)
                    disk.sync_folder(folder)
                    disk.replace(staging / "spec.json", folder / "spec.json")
                    disk.sync_folder(folder)
                    for name in replaced - names:
                        (folder / name).unlink(missing_ok=True)
                    for row in folder.glob("row-*.json"):  # exams of the graph that was replaced
                        row.unlink(missing_ok=True)
                else:
                    disk.replace(staging, folder)
                    disk.sync_folder(folder.parent)
    except OSError as error:
        raise OutputError(f"{folder}: the engine cannot be written ({error.strerror}); choose another --out") from error
    return read_folder(folder)


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
