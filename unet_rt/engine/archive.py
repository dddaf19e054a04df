"""One file per engine: a tar archive whose bytes depend on nothing but the engine, and the way back.

``spec.json`` comes first, then the files that it names, by name; no folder, no compression (weights have none to gain, and
what compresses differs between versions), and header fields that say nothing of who packed, when and where. So equal
engines are equal files, and the archive's SHA-256 names an engine: in a registry, a lock file, a Dockerfile.

Any tar reads it. :func:`unpack` reads it with suspicion: plain files that ``spec.json`` names and nothing else, each held
against its hash before the engine appears.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import EngineError, OutputError
from ..system.durable import Disk
from ..system.names import path_of
from .folder import EngineFolder, check_folder, read_folder, sha256
from .write import place_folder

SPEC = "spec.json"
LARGEST_SPEC = 64 << 20  # bytes; a spec is a few thousand


def pack(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> str:
    """Writes an engine folder as one archive, whole or not at all.

    Args:
        folder: The engine folder; it is checked as ``load`` does.
        out: The archive, by custom ``NAME.urt.tar``.
        overwrite: Replace an existing file.

    Returns:
        SHA-256 of the archive.

    Raises:
        EngineError: Not an engine, or a damaged one.
        OutputError: ``out`` exists or cannot be written.
    """
    opened, target = read_folder(folder), path_of(out, OutputError)
    if target.is_dir():
        raise OutputError(f"{target} is a folder, and an archive is a file; choose another --out")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; pass --overwrite to replace it, or choose another --out")
    if target.resolve().is_relative_to(opened.path.resolve()):
        raise OutputError(f"{target} lies inside the engine that is to be packed; choose another --out")
    names = [SPEC, *sorted({str(entry["name"]) for entry in opened.files.values()})]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with Disk().writing(target) as part:
            with (
                part.open("wb") as stream,  # whose mode follows the umask: an exam may be confidential
                tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
            ):
                for name in names:
                    entry = tarfile.TarInfo(name)  # mode 644, owner 0, no names, time 0
                    entry.size = (opened.path / name).stat().st_size
                    with (opened.path / name).open("rb") as content:
                        archive.addfile(entry, content)
            digest = sha256(part)
    except OSError as error:
        raise OutputError(
            f"{target}: the archive cannot be written ({error.strerror}); choose another --out"
        ) from error
    return digest


def unpack(
    archive: str | Path, out: str | Path | None = None, *, expected: str | None = None, overwrite: bool = False
) -> EngineFolder:
    """Makes an archive an engine folder again, whole or not at all; nothing in it is executed or unpickled.

    Args:
        archive: From :func:`pack`.
        out: The folder; default: the archive's name without ``.tar``, in the current folder.
        expected: SHA-256 that the archive must have.
        overwrite: Replace an existing engine.

    Raises:
        EngineError: Not an archive of an engine, another one than expected, or one that was changed.
        OutputError: ``out`` exists or cannot be written.
    """
    path = path_of(archive, EngineError)
    folder = path_of(out, OutputError) if out is not None else Path(path.stem)
    if out is None and path.suffix != ".tar":
        raise OutputError(f"{path.name} does not end in .tar, so its folder has no name; pass --out DIR")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}); pass a file that unet-rt pack wrote") from error
    with stream:
        if expected is not None:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != expected.strip().lower():
                raise EngineError(f"{path} has SHA-256 {found}, not {expected}; it is another engine, or was changed")
            stream.seek(0)
        with _no_archive(path):
            members = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - closed below
        with members:
            return place_folder(folder, lambda staging: _extract(path, members, staging), overwrite=overwrite)


@contextmanager
def _no_archive(path: Path) -> Iterator[None]:
    """EngineError for what tarfile raises: its own errors, and any other of numbers that are none."""
    try:
        yield
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise EngineError(f"{path} is not an archive of an engine ({error}); make one with unet-rt pack") from error


def _next(path: Path, members: tarfile.TarFile) -> tarfile.TarInfo | None:
    with _no_archive(path):
        return members.next()


def _extract(path: Path, members: tarfile.TarFile, staging: Path) -> None:
    """Writes the files of an engine into ``staging``; anything else among the members is an EngineError."""
    first = _next(path, members)
    if first is None or first.name != SPEC or not _plain(first) or first.size > LARGEST_SPEC:
        raise EngineError(f"{path} does not begin with a {SPEC}; make an archive with unet-rt pack")
    _write(path, members, first, staging)
    try:
        text = (staging / SPEC).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EngineError(f"{path}: its {SPEC} is damaged ({error}); pack the engine again") from error
    wanted = _sizes(path, text)
    while (member := _next(path, members)) is not None:
        size = wanted.pop(member.name, None)
        if size is None or not _plain(member):
            raise EngineError(f"{path} holds {member.name!r}, which is none of its engine's files; do not trust it")
        if member.size != size:
            raise EngineError(f"{path}: {member.name} has {member.size} bytes, its spec says {size}; pack it again")
        _write(path, members, member, staging)
    if wanted:
        raise EngineError(f"{path} lacks {min(wanted)}; copy the archive again, or pack the engine again")
    check_folder(staging, text, called=path)


def _plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file whose bytes are all there: one with holes is as large as it says, and a few bytes long."""
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _write(path: Path, members: tarfile.TarFile, member: tarfile.TarInfo, staging: Path) -> None:
    with _no_archive(path):
        content = members.extractfile(member)
        if content is None:
            raise EngineError(f"{member.name} is no file; make the archive with unet-rt pack")
        with content, (staging / member.name).open("xb") as file:
            shutil.copyfileobj(content, file)


def _sizes(path: Path, text: str) -> dict[str, int]:
    """Bytes of the files that a spec names: names without folders, which are not ``spec.json``."""
    try:
        entries: list[dict[str, Any]] = list(json.loads(text)["files"].values())
        sizes = {str(entry["name"]): int(entry["bytes"]) for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise EngineError(f"{path}: its {SPEC} is damaged ({error}); pack the engine again") from error
    strange = next((n for n in sizes if n in ("", ".", "..", SPEC) or n != Path(n).name or set(n) & set("\\:\0")), None)
    if strange is not None:
        raise EngineError(f"{path} names the file {strange!r}, outside its engine; do not trust it")
    return sizes
