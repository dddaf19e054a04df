"""Archives of engines: equal bytes for equal engines, and nothing but an engine comes out."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import unet_rt as urt
from unet_rt.cli.main import main
from unet_rt.engine.archive import pack, unpack
from unet_rt.engine.folder import read_folder, sha256

pytestmark = pytest.mark.onnxruntime

# What a user without unet_rt does with an archive: the standard library and ONNX Runtime.
PLAIN = """
import sys, tarfile
sys.modules["unet_rt"] = None
from pathlib import Path
import numpy, onnxruntime
with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(sys.argv[2], filter="data")
folder = Path(sys.argv[2])
exam = numpy.load(next(folder.glob("exam-*.npz")))
for kind in ("model", "graph"):
    session = onnxruntime.InferenceSession(str(next(folder.glob(kind + "-*.onnx"))), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: exam["input"]})
    print(kind, numpy.abs(got - exam["output_0"]).max() / numpy.abs(exam["output_0"]).max())
"""


@pytest.fixture
def archive(engine_folder: Path, tmp_path: Path) -> Path:
    pack(engine_folder, tmp_path / "nuclei.urt.tar")
    return tmp_path / "nuclei.urt.tar"


def test_equal_engines_are_equal_files(engine_folder: Path, tmp_path: Path) -> None:
    """Whatever the folder's name, its times and modes, other files in it, and the order of its files."""
    first = pack(engine_folder, tmp_path / "a.tar")
    assert first == sha256(tmp_path / "a.tar")
    other = tmp_path / "elsewhere" / "renamed.urt"
    other.mkdir(parents=True)
    for k, path in enumerate(sorted(engine_folder.iterdir(), reverse=True)):
        shutil.copyfile(path, other / path.name)
        os.utime(other / path.name, (k, k))
        (other / path.name).chmod(0o600)
    (other / "row-of-another-machine.json").write_text("{}")
    assert pack(other, tmp_path / "b.tar") == first
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as members:
        names = members.getnames()
    assert names[0] == "spec.json"
    assert names[1:] == sorted(names[1:])
    assert set(names) == {p.name for p in engine_folder.iterdir() if not p.name.startswith("row-")}


def test_there_and_back(engine_folder: Path, archive: Path, tmp_path: Path) -> None:
    digest = sha256(archive)
    opened = unpack(archive, tmp_path / "back.urt", expected=digest.upper())
    assert opened.spec == read_folder(engine_folder).spec
    assert pack(opened.path, tmp_path / "again.tar") == digest
    image = np.random.default_rng(0).integers(0, 4000, (200, 230)).astype(np.uint16)
    with urt.load(engine_folder) as before, urt.load(opened.path) as after:
        np.testing.assert_array_equal(urt.predict(before, image, output="raw"), urt.predict(after, image, output="raw"))


@pytest.mark.skipif(os.name == "nt", reason="modes and umask are POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_modes_follow_the_umask(engine_folder: Path, tmp_path: Path, umask: int) -> None:
    """An exam holds pixels of the samples: who keeps files from others keeps these."""
    before = os.umask(umask)
    try:
        pack(engine_folder, tmp_path / "a.tar")
        folder = unpack(tmp_path / "a.tar", tmp_path / "a.urt").path
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "a.tar", folder, *folder.iterdir())}
    assert {path.name: mode for path, mode in modes.items()} == {
        path.name: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes
    }


def test_plain_onnxruntime_runs_what_is_inside(archive: Path, tmp_path: Path) -> None:
    """No lock-in: with tar and ONNX Runtime alone, both graphs give what the exam holds."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, archive, tmp_path / "plain"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert errors.keys() == {"model", "graph"}
    assert max(errors.values()) < 1e-5  # float32 sums in another order


# --- what is refused ----------------------------------------------------------------------------------------------------


def rewritten(archive: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> Path:
    """A copy of an archive whose members ``change`` has changed."""
    with tarfile.open(archive) as source:
        members = [(m, source.extractfile(m).read()) for m in source]  # type: ignore[union-attr]
    change(members)
    target = archive.with_name("changed.urt.tar")
    with tarfile.open(target, "w") as out:
        for member, content in members:
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return target


def added(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, link
        members.append((entry, b"" if link else b"x"))

    return change


def spec_names(name: str) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    """The spec and a member agree on a name that leads elsewhere."""

    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        document = json.loads(members[0][1])
        document["files"]["exam"]["name"] = name
        members[0] = (members[0][0], json.dumps(document).encode())
        for member, _ in members:
            if member.name.startswith("exam-"):
                member.name = name

    return change


def spec_is(text: str, code: str = "utf-8") -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[0] = (members[0][0], text.encode(code))

    return change


def spec_says(old: str, new: str) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        changed = re.sub(old, new, members[0][1].decode(), count=1)
        members[0] = (members[0][0], changed.encode())

    return change


def with_holes(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """A sparse file that happens to have none: one of a terabyte takes no more room in an archive."""
    member, content = members[-1]
    member.pax_headers = {"GNU.sparse.map": f"0,{len(content)}", "GNU.sparse.size": str(len(content))}


def flipped(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    member, content = members[-1]
    members[-1] = (member, content[:-1] + bytes([content[-1] ^ 1]))


def edited(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members[0] = (members[0][0], members[0][1].replace(b'"blend": "gaussian"', b'"blend": "constant"'))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (added("../escaped.txt"), "do not trust it"),
        (added("/escaped.txt"), "do not trust it"),
        (added("more.py"), "do not trust it"),
        (added("link", tarfile.SYMTYPE, "/etc/passwd"), "do not trust it"),
        (spec_names("../escaped.npz"), "outside its engine"),
        (spec_names("sub/escaped.npz"), "outside its engine"),
        (spec_names("spec.json"), "outside its engine"),
        (spec_is("[" * 200_000), "spec.json is damaged"),
        (spec_is("{}", "utf-16"), "spec.json is damaged"),
        (spec_says(r'"bytes": \d+', '"bytes": Infinity'), "spec.json is damaged"),
        (spec_says(r'"schema": \[\s*1', '"schema": [Infinity'), r"changed.urt.tar.spec.json is damaged"),
        (with_holes, "do not trust it"),
        (lambda members: members.pop(), "lacks"),
        (lambda members: members.reverse(), "does not begin with a spec.json"),
        (lambda members: members.append(members[1]), "do not trust it"),
        (lambda members: members.clear(), "does not begin with a spec.json"),
        (flipped, r"changed\.urt\.tar.parity-.*SHA-256 differs"),
        (edited, "was changed after it was written"),
    ],
)
def test_an_archive_that_is_not_an_engine(
    archive: Path, tmp_path: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None], text: str
) -> None:
    changed = rewritten(archive, change)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(urt.EngineError, match=text):
        unpack(changed, tmp_path / "sub" / "out.urt" if "sub" in text else tmp_path / "out.urt")
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path.parent / "escaped.txt").exists()


def test_files_that_are_no_archives(archive: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    text = tmp_path / "text.tar"
    text.write_text("not an archive " * 100)
    with tarfile.open(tmp_path / "compressed.tar", "w:gz") as out:
        out.add(archive, "x")
    for path in (cut, text, tmp_path / "compressed.tar", tmp_path / "missing.tar", tmp_path):
        with pytest.raises(urt.EngineError):
            unpack(path, tmp_path / "out.urt")
    with pytest.raises(urt.EngineError, match="another engine, or was changed"):
        unpack(archive, tmp_path / "out.urt", expected="0" * 64)
    assert not (tmp_path / "out.urt").exists()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(urt.EngineError, match="unet-rt unpack"):
        urt.load(archive)


def test_what_is_there_stays(engine_folder: Path, archive: Path, tmp_path: Path) -> None:
    before = archive.read_bytes()
    with pytest.raises(urt.OutputError, match="--overwrite"):
        pack(engine_folder, archive)
    pack(engine_folder, archive, overwrite=True)
    assert archive.read_bytes() == before
    copy = Path(shutil.copytree(engine_folder, tmp_path / "copy.urt"))
    with pytest.raises(urt.OutputError, match="inside the engine"):
        pack(copy, copy / "own.tar")
    (tmp_path / "link.urt").symlink_to(copy, target_is_directory=True)
    for way in (tmp_path / "link.urt" / "own.tar", tmp_path / "x" / ".." / "copy.urt" / "own.tar"):
        with pytest.raises(urt.OutputError, match="inside the engine"):
            pack(copy, way)
    with pytest.raises(urt.OutputError, match="--overwrite"):
        unpack(archive, copy)
    unpack(archive, copy, overwrite=True)
    with pytest.raises(urt.EngineError):
        pack(tmp_path, tmp_path / "other.tar")
    with pytest.raises(urt.OutputError, match="pass --out"):
        unpack(archive.rename(tmp_path / "nuclei.bin"))


def test_the_command_line(
    engine_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pack", str(engine_folder)]) == 0
    digest, name = capsys.readouterr().out.split()
    assert name == f"{engine_folder.name}.tar"
    assert sha256(tmp_path / name) == digest
    assert main(["pack", str(engine_folder), "--json", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == digest
    assert main(["unpack", name, "--sha256", digest]) == 0
    read_folder(tmp_path / engine_folder.name)
    assert main(["unpack", name, "--sha256", "0", "--overwrite"]) == 2
    assert main(["unpack", name, "--out", "b.urt", "--json"]) == 0
