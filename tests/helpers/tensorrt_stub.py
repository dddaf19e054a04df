"""Imports the real bindings of TensorRT over libraries that hold nothing, and registers our plugin there.

Run as a script with a folder for the libraries; prints JSON. The bindings need nine C functions to load.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARIES = {
    "nvinfer": """
        void* createInferBuilder_INTERNAL(void* l, int v) { return 0; }
        void* createInferRefitter_INTERNAL(void* e, void* l, int v) { return 0; }
        void* createInferRuntime_INTERNAL(void* l, int v) { return 0; }
        void* getBuilderPluginRegistry(int c) { return 0; }
        void* getPluginRegistry(void) { return 0; }""",
    "nvinfer_plugin": "int initLibNvInferPlugins(void* l, const char* n) { return 1; }",
    "nvonnxparser": """
        void* createNvOnnxParser_INTERNAL(void* n, void* l, int v) { return 0; }
        void* createNvOnnxParserRefitter_INTERNAL(void* r, void* l, int v) { return 0; }
        int getNvOnnxParserVersion(void) { return 0; }""",
}


class Dimension:
    """A size in TensorRT's shape arithmetic, with a value."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class Arithmetic:
    """TensorRT's IExprBuilder."""

    def constant(self, value: int) -> Dimension:
        return Dimension(value)

    def operation(self, operation: Any, a: Dimension, b: Dimension) -> Dimension:
        name = operation.name
        x, y = a.value, b.value
        results = {"SUM": x + y, "SUB": x - y, "PROD": x * y, "CEIL_DIV": -(-x // y), "FLOOR_DIV": x // y}
        return Dimension(results[name])


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


def bindings(folder: Path) -> Any:
    """The module ``tensorrt_bindings``, as ``tensorrt``."""
    major = importlib.metadata.version("tensorrt-cu13-bindings").split(".")[0]
    for name, source in LIBRARIES.items():
        path = folder / f"lib{name}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-x", "c", "-", "-o", str(path)]
        subprocess.run(command, input=source.encode(), check=True)
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    trt = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = trt
    trt.__name__ = "tensorrt"
    return trt


def resolves(root: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True


def number(expression: Any) -> int:
    return int(expression._expr.value)


def main() -> None:
    trt = bindings(Path(sys.argv[1]))
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.IDimensionExpr = Dimension
    from unet_rt.backends.tensorrt import plugin as crop_concat_plugin

    crop_concat_plugin._register(trt, "".join(f".entry {name}(" for name, _ in crop_concat_plugin._KERNELS.values()))
    plugin = importlib.import_module("tensorrt.plugin")
    internal = importlib.import_module("tensorrt.plugin._lib")
    expression = importlib.import_module("tensorrt.plugin._tensor").SymIntExpr
    expression._exprBuilder = Arithmetic()
    known = internal.QDP_REGISTRY[crop_concat_plugin.NAME]

    def tensor(shape: list[int]) -> Any:
        exprs = plugin.ShapeExprs.from_tuple(tuple(plugin.ShapeExpr(Dimension(n)) for n in shape))
        return plugin.TensorDesc(exprs, getattr(trt, sys.argv[2]))

    skip, up = tensor([2, 3, 100, 91]), tensor([2, 5, 61, 52])
    described = known.register_func(skip, up)
    kernel, _, launch, sizes = known.aot_impl_func(skip, up, (described,), 1)
    (combination,) = known.autotune_func(skip, up, (described,))
    print(  # on a line of its own: the bindings print, too
        json.dumps(
            {
                "version": trt.__version__,
                "unknown": [name for name in json.loads(sys.argv[3]) if not resolves(trt, name)],
                "creators": [list(key) for key in registry.creators],
                "shape": [number(size) for size in described.shape_expr],
                "dtype": described.dtype.name,
                "kernel": kernel,
                "grid": [number(launch.grid_x), number(launch.grid_y), number(launch.block_x)],
                "sizes": [number(size) for size in sizes],
                "sizes_are": sorted({type(size).__name__ for size in sizes}),
                "outputs": known.num_outputs,
                "types": [[t.name for t in found.types] for found in combination._get_combinations()],
            }
        )
    )


if __name__ == "__main__":
    main()
