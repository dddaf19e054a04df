"""Every code block of README.md and docs/ runs, or says why not.

A page is one story: its blocks run in order, in a folder that holds ``model.onnx`` (the network that ships with the
package), ``images/`` (three microscopy images), ``large.tif``, ``model.urt`` (an engine built from them), ``cells/``
(six small images and their masks) and ``section.tif`` (electron microscopy). Python blocks share one namespace; in
console blocks, ``$`` starts a command and what follows is its expected output (``...`` stands for anything).

A comment right above a block directs it::

    <!-- not run: needs a network that this repository does not hold -->
    <!-- exit status: 1 -->
    <!-- file: test_engine.py -->     (the block is written to that file, and is run by a later one)
"""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

import unet_rt
from unet_rt.building import tiling as build_tiling

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
DIRECTIVE = re.compile(r"<!-- (not run|exit status|file): (.+?) -->\s*")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
DATA = {"text", "json", "toml", "yaml", "c", "cmake"}  # looked at, not run
MATCH = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
UNET_RT = [sys.executable, "-c", "import sys; from unet_rt.cli.main import main; sys.exit(main())"]
# Searches compare at a smaller tile and try one larger one; the build at the top of README.md measures as any user's.
SEARCH = {"PROBE_PX": 320**2, "TILE_AREAS": (1024**2,)}
SMALL = f"from importlib import import_module; vars(import_module('{build_tiling.__name__}')).update({SEARCH}); "
# By its entry point where the package is installed; a source tree on the path has none.
PLUGIN = ["-p", "unet_rt.pytest_plugin"]
COMMANDS = {"unet-rt": UNET_RT, "python": [sys.executable], "pytest": [sys.executable, "-m", "pytest", *PLUGIN]}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line its text starts at, its language, and what a comment above it says."""

    page: Path
    line: int
    language: str
    text: str
    directives: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    found: list[Block] = []
    above: dict[str, str] = {}
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        if match := DIRECTIVE.fullmatch(line.strip()):
            above[match[1]] = match[2]
        elif line.lstrip().startswith("```"):
            indent = len(line) - len(line.lstrip())
            inside = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                inside.append(inner[indent:])
            else:
                raise AssertionError(f"{page.name}:{number}: block without an end")
            found.append(Block(page, number + 1, line.strip("` "), "\n".join(inside) + "\n", above))
            above = {}
        elif line.strip():
            above = {}
    return found


def all_blocks(page: Path) -> list[Block]:
    return blocks(page, page.read_text(encoding="utf-8"))


def run_python(block: Block, names: dict[str, object]) -> None:
    """Run a block in-process; a traceback shows the page's own line numbers."""
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
    exec(code, names)


def run_console(block: Block, folder: Path) -> None:
    """Run the commands of a block, compare what they print where the page shows it."""
    expected_status = int(block.directives.get("exit status", "0"))
    text = block.text.replace("\\\n", " ")
    assert text.startswith("$ "), f"{block.place}: a console block starts with '$ '"
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _, expected = part.partition("\n")
        words = shlex.split(line, comments=True)
        command = COMMANDS.get(words[0])
        if command is UNET_RT and block.page.name != "README.md":
            command = [*UNET_RT[:2], SMALL + UNET_RT[2]]
        assert command, f"{block.place}: {words[0]!r} is not run by this test; say 'not run: why' above the block"
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        if "PYTHONPATH" in environment:  # a source tree may be on the path by a relative name
            paths = environment["PYTHONPATH"].split(os.pathsep)
            environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths))
        done = subprocess.run(
            [*command, *words[1:]],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == expected_status, f"{block.place}: {line}\nexit {done.returncode}\n{done.stdout}"
        if expected.strip() and not doctest.OutputChecker().check_output(expected, done.stdout, MATCH):
            pytest.fail(f"{block.place}: {line}\nexpected:\n{expected}\ngot:\n{done.stdout}")


def check_data(block: Block) -> None:
    """Data shown on a page is at least well formed."""
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "yaml":
        import yaml

        yaml.safe_load(block.text)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every page starts from."""
    import tifffile

    from unet_rt.drawing.membranes import membranes
    from unet_rt.drawing.microscopy import microscopy
    from unet_rt.drawing.tissue import random_tissue

    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(Path(unet_rt.__file__).parent / "data" / "nuclei.onnx", folder / "model.onnx")
    (folder / "images").mkdir()
    for seed in range(3):
        tifffile.imwrite(folder / "images" / f"{seed}.tif", microscopy((256, 256), seed=seed).image)
    tifffile.imwrite(folder / "large.tif", microscopy((1000, 700), seed=3).image)
    _draw_training(folder / "cells")
    section = membranes((400, 600), seed=1, tissue=random_tissue(1))
    tifffile.imwrite(folder / "section.tif", section.image)
    # One candidate, so that it takes a second; docs/reference/engines.md runs the search.
    choice = ["--backend", "onnxruntime", "--precision", "fp32", "--tile", "512x512", "--halo", "exact"]
    command = ["build", "model.onnx", "--samples", "images", "--out", "model.urt", *choice]
    done = subprocess.run([*UNET_RT, *command], cwd=folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def _draw_training(folder: Path) -> None:
    """Six images of nuclei, and their masks."""
    import tifffile

    from unet_rt.drawing.microscopy import Scene, microscopy

    whole = microscopy((384, 256), seed=1, scene=Scene(radius_px=9, cover=0.3))
    for name, pixels in (("images", whole.image), ("masks", whole.truth.astype("uint16"))):
        (folder / name).mkdir(parents=True)
        for k in range(6):
            tifffile.imwrite(folder / name / f"{k}.tif", pixels[64 * k : 64 * k + 64])


@pytest.mark.onnxruntime
@pytest.mark.openvino
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_blocks_of_a_page_run(page: Path, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "page"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    for name, value in SEARCH.items():
        monkeypatch.setattr(build_tiling, name, value)
    names: dict[str, object] = {"__name__": "page"}
    for block in all_blocks(page):
        if "not run" in block.directives:
            continue
        if name := block.directives.get("file"):
            (folder / name).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            run_python(block, names)
        elif block.language == "console":
            run_console(block, folder)


@pytest.mark.onnxruntime
def test_the_page_on_ci_notices_another_network(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it promises first: an engine built from a network of other masks fails the test that the page shows."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    folder = tmp_path / "page"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    file, python, console = all_blocks(ROOT / "docs" / "how-to" / "ci.md")[:3]
    (folder / file.directives["file"]).write_text(file.text, encoding="utf-8")
    run_python(python, {})
    model = onnx.load("model.onnx")
    last = next(node for node in reversed(model.graph.node) if node.op_type == "Conv")
    bias = next(t for t in model.graph.initializer if t.name == last.input[2])
    moved = numpy_helper.to_array(bias) + np.array([0.5, -0.5], np.float32)  # fewer pixels are nuclei
    bias.CopyFrom(numpy_helper.from_array(moved, bias.name))
    onnx.save(model, "anew.onnx")
    options = {"backend": "onnxruntime", "precision": "fp32", "tile": (256, 256), "halo": "exact", "overwrite": True}
    unet_rt.build("anew.onnx", samples="images", out="model.urt", **options).close()
    with pytest.raises(AssertionError, match="exit 1"):
        run_console(console, folder)
    assert unet_rt.verify("model.urt", "images").accepted  # against its own model nothing is wrong


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_have_a_language_and_compile(page: Path) -> None:
    for block in all_blocks(page):
        assert block.language in {"python", "console", *DATA}, f"{block.place}: language {block.language!r}"
        assert set(block.directives) <= {"not run", "exit status", "file"}
        if block.language == "python":
            compile(block.text, block.page, "exec")
        check_data(block)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [name.removeprefix("docs/") for name in NAMES[1:] if name != "docs/index.md"]
    assert not [name for name in pages if f"({name})" not in index]


def test_the_front_door_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200
    notes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")
    assert [part.splitlines()[0] for part in notes[1:] if len(part.splitlines()) > 40] == []


def test_pages_import_public_names_alone() -> None:
    public = {
        "unet_rt",
        *(
            f"unet_rt.{name}"
            for name in ("models", "testing", "training", "training.metrics", "remote", "serve.app", "serve.settings")
        ),
    }
    for page in PAGES:
        for block in all_blocks(page):
            found = re.findall(r"^\s*(?:from|import) (unet_rt[\w.]*)", block.text, re.MULTILINE)
            assert set(found) <= public, f"{block.place}: {sorted(set(found) - public)}"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What draws the reference when the site is built."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_holds_every_verb_and_public_name(hooks: ModuleType) -> None:
    text = hooks.verbs()
    assert {"## inspect", "## build", "## predict", "## verify", "## train"} <= set(text.splitlines())
    assert "| <code>--search-minutes N</code> | time for the search" in text
    listed = {line.rpartition(".")[2] for line in hooks.names("unet_rt").split()[1::2]}
    assert listed == {name for name in unet_rt.__all__ if not name.startswith("_")}


def test_blocks_are_found_with_their_directives() -> None:
    text = (
        "# Page\n\n```python\na = 1\n```\n<!-- not run: reason -->\n\n```console\n$ x\n```\n"
        "<!-- file: t.py -->\nwords\n```json\n{}\n```\n"
    )
    found = [(b.line, b.language, b.text, b.directives) for b in blocks(ROOT / "page.md", text)]
    assert found == [
        (4, "python", "a = 1\n", {}),
        (9, "console", "$ x\n", {"not run": "reason"}),
        (14, "json", "{}\n", {}),
    ]


def test_a_block_that_fails_fails_here(tmp_path: Path) -> None:
    page = ROOT / "page.md"
    with pytest.raises(ZeroDivisionError):
        run_python(Block(page, 1, "python", "1 / 0\n"), {})
    run_console(Block(page, 1, "console", "$ python -c 'print(1, 22, 3)'\n1 ... 3\n"), tmp_path)
    with pytest.raises(pytest.fail.Exception, match="expected"):
        run_console(Block(page, 1, "console", "$ python -c 'print(1)'\n2\n"), tmp_path)
    with pytest.raises(AssertionError, match="exit 3"):
        run_console(Block(page, 1, "console", "$ python -c 'exit(3)'\n"), tmp_path)
    run_console(Block(page, 1, "console", "$ python -c 'exit(3)'\n", {"exit status": "3"}), tmp_path)
    with pytest.raises(AssertionError, match="'rm' is not run"):
        run_console(Block(page, 1, "console", "$ rm x\n"), tmp_path)
