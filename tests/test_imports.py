"""What may import what, what importing costs, and what an installed package holds."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import unet_rt

PACKAGE = Path(unet_rt.__file__).parent

# The files (relative to the package) that may import a library at all, at module level or in a function.
MAY_IMPORT = {
    "onnx": ("backends/**", "baseline/*.py", "building/*.py", "graph/**", "training/*.py"),
    "onnxruntime": ("backends/onnxruntime/library.py",),
    "openvino": ("backends/openvino.py",),
    "ncnn": ("backends/ncnn/library.py",),
    "tensorrt": ("backends/tensorrt/*.py",),
    "tensorrt_rtx": ("backends/tensorrt/*.py",),
    "torch": ("backends/eager.py", "models/*.py", "training/*.py"),
}
# The ones among them that may do so at module level: nothing imports these before they are asked for.
AT_MODULE_LEVEL = {
    "onnx": ("baseline/folds.py", "graph/**", "training/*.py"),
    "torch": ("models/*.py", "training/*.py"),
}
# Never at module level elsewhere: `import unet_rt` pays for NumPy alone.
LAZY = {"PIL", "imagecodecs", "scipy", "skimage", "tifffile", "tqdm", "yaml", *MAY_IMPORT}
LAZY |= {"bioio", "fsspec", "h5py", "mrcfile", "nibabel", "openslide", "pydicom", "rasterio", "tiffslide", "zarr"}

SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
# Every other module must load without them, and so without anything that loads them.
LIGHT = [
    source
    for source in SOURCES
    if not any(fnmatch(source, p) for patterns in AT_MODULE_LEVEL.values() for p in patterns)
]
# What `unet-rt predict` runs is among these.
IMAGE_LINE = (
    "cli/main.py",
    "cli/parser.py",
    "cli/predict.py",
    "engine/engine.py",
    "images/open.py",
    "images/normalize.py",
    "kernels/calls.py",
    "outputs/output.py",
    "prediction/predict.py",
    "tiling/stitch.py",
)


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(top-level package, whether at run time at module level, line) of each import in a file."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), True)]
    while pending:
        node, top = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], top, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], top, node.lineno
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue  # not at run time
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        pending.extend((child, top and not inside) for child in ast.iter_child_nodes(node))


def allowed(name: str, source: str, table: dict[str, tuple[str, ...]]) -> bool:
    return any(fnmatch(source, pattern) for pattern in table.get(name, ()))


@pytest.mark.parametrize("source", SOURCES)
def test_each_library_is_imported_in_its_place(source: str) -> None:
    wrong = []
    for name, top, line in imports(PACKAGE / source):
        if name in MAY_IMPORT and not allowed(name, source, MAY_IMPORT):
            wrong.append(f"{source}:{line}: imports {name}, which belongs to {', '.join(MAY_IMPORT[name])}")
        if top and name in LAZY and source in LIGHT:
            wrong.append(f"{source}:{line}: imports {name} at module level; import it in the function that needs it")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def loads() -> dict[str, list[str]]:
    """Per module, in the order of LIGHT and first of all ``unet_rt``: the libraries that importing it loads.

    One new interpreter imports them one after the other, so a library is charged to the module that loads it first.
    """
    code = (
        "import importlib, json, sys\n"
        "modules, libraries = json.loads(sys.argv[1]), json.loads(sys.argv[2])\n"
        "loads, before = {}, {name for name in libraries if name in sys.modules}\n"  # by a .pth file: not our doing
        "for module in modules:\n"
        "    importlib.import_module(module)\n"
        "    now = {name for name in libraries if name in sys.modules}\n"
        "    loads[module], before = sorted(now - before), now\n"
        "print(json.dumps(loads))\n"
    )
    arguments = [json.dumps(["unet_rt", *map(module_of, LIGHT)]), json.dumps(sorted(LAZY))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def module_of(source: str) -> str:
    return ".".join(["unet_rt", *Path(source).with_suffix("").parts]).removesuffix(".__init__")


def test_importing_the_package_loads_numpy_alone(loads: dict[str, list[str]]) -> None:
    assert loads["unet_rt"] == []


def test_the_image_line_and_the_command_line_are_light() -> None:
    assert set(IMAGE_LINE) <= set(LIGHT)


@pytest.mark.parametrize("source", LIGHT)
def test_light_modules_load_no_library(source: str, loads: dict[str, list[str]]) -> None:
    assert loads[module_of(source)] == []


def test_the_police_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "import torch.nn\n"
        "from onnx import helper\n"
        "if TYPE_CHECKING:\n    import openvino\n"
        "try:\n    import tifffile\nexcept ImportError:\n    pass\n"
        "def f():\n    from yaml import safe_load\n"
        "class C:\n    import tqdm\n"
        "from . import onnxruntime\n",
        encoding="utf-8",
    )
    found = {(name, top) for name, top, _ in imports(path)}
    assert found == {("torch", True), ("onnx", True), ("tifffile", True), ("yaml", False), ("tqdm", True)}


def test_all_public_names_exist() -> None:
    assert unet_rt.__all__
    assert len(set(unet_rt.__all__)) == len(unet_rt.__all__)
    for name in unet_rt.__all__:
        assert getattr(unet_rt, name) is not None
        assert name in dir(unet_rt)


@pytest.fixture
def installed() -> importlib.metadata.Distribution:
    """The distribution that the tested package came with; a source tree on the path has none."""
    try:
        distribution = importlib.metadata.distribution("unet-rt")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("unet-rt is not installed")
    if Path(str(distribution.locate_file("unet_rt"))).resolve() != PACKAGE.resolve():
        pytest.skip(f"unet_rt is imported from {PACKAGE}, not from the installed package")
    return distribution


def test_the_version_is_the_distribution_s(installed: importlib.metadata.Distribution) -> None:
    assert unet_rt.__version__ == installed.version


def test_the_wheel_holds_what_it_should(installed: importlib.metadata.Distribution) -> None:
    names = {file.as_posix() for file in installed.files or () if "__pycache__" not in file.parts}
    inside = {name for name in names if name.startswith("unet_rt/")}
    assert {"unet_rt/py.typed", "unet_rt/_cpu.pyi"} <= inside
    assert any(fnmatch(name, "unet_rt/data/*.onnx") for name in inside)
    assert sum(fnmatch(name, "unet_rt/_cpu.*.so") or fnmatch(name, "unet_rt/_cpu.*.pyd") for name in inside) == 1
    # Apart from the package, its metadata and the console script, nothing is installed.
    info = f"unet_rt-{installed.version}.dist-info/"
    others = {name for name in names - inside if not name.startswith(info)}
    assert {Path(name).stem for name in others} == {"unet-rt"}
    assert {name for name in inside if name.endswith((".cpp", ".h", ".cu"))} == {"unet_rt/include/unet_rt.h"}
    libraries = {"unet_rt/libunet_rt.so", "unet_rt/libunet_rt.dylib", "unet_rt/unet_rt.dll"}
    assert len(inside & libraries) == 1
    assert {name for name in inside if name.startswith("unet_rt/cmake/")} == {
        f"unet_rt/cmake/unet_rt-config{part}.cmake" for part in ("", "-version")
    }
    assert not {name for name in inside if "test" in Path(name).parts}
