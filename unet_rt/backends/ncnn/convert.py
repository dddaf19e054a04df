"""ONNX graphs to ncnn's own form, by ncnn's converter pnnx, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BackendError, size_text
from ..session import Port

INSTALL = "pip install pnnx (it brings torch, and is needed to build, not to run)"
CONVERSION_S = 600.0


@dataclass(frozen=True)
class Converted:
    """A network in ncnn's form: the lines of its .param file, and the file of its weights."""

    param: tuple[str, ...]
    weights: Path


def ports_of(proto: Any) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of an ONNX graph."""
    from onnx.helper import tensor_dtype_to_np_dtype

    def port(value: Any) -> Port:
        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim)
        return Port(value.name, shape, tensor_dtype_to_np_dtype(kind.elem_type))

    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(port(value) for value in proto.graph.input if value.name not in constants)
    return inputs, tuple(port(value) for value in proto.graph.output)


def convert(model: Path, inputs: Sequence[Port], tiles: Sequence[Sequence[int]], work: Path) -> Converted:
    """The graph of ``model`` in ncnn's form, for any size that it accepts.

    It is converted at two sizes (the converter runs it, which takes memory). Where the results differ the converter has
    written a size into the network, which other tiles would be computed with.

    Args:
        model: The ONNX file.
        inputs: Of the graph.
        tiles: One or two sizes, the same number of pixels per axis or more; one where the graph accepts no other.
        work: An empty folder.

    Raises:
        BackendError: No converter; a graph that it cannot convert, with the layer's name; one that keeps a size.
    """
    graph = work / "plain.onnx"
    _write_plain(model, tiles, graph)
    first, second = (_convert_at(graph, inputs, tile, work / f"{k}") for k, tile in enumerate((tiles[0], tiles[-1])))
    unlike = [(a, b) for a, b in zip(first.param, second.param, strict=False) if a != b]
    if unlike or len(first.param) != len(second.param):
        layer = unlike[0][0].split()[1] if unlike else "?"
        raise BackendError(
            f"pnnx writes the size of the tile into layer {layer} of {model.name} (at {size_text(tiles[0])} and at "
            f"{size_text(tiles[-1])} px it gives different networks); use another --backend"
        )
    return first


def _write_plain(model: Path, tiles: Sequence[Sequence[int]], graph: Path) -> None:
    """The graph with numbers in place of the arithmetic that makes them from the size, as far as they are the same."""
    import onnx

    from ...graph.analysis import analyse_model
    from ...graph.passes.plain_sizes import plain_sizes

    proto = onnx.load(str(model))
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    analysis, proto = analyse_model(proto)
    plain_sizes(proto, *(analysis.walk(tile).tensors for tile in (tiles[0], tiles[-1])))
    onnx.save_model(proto, str(graph))


def _convert_at(model: Path, inputs: Sequence[Port], tile: Sequence[int], folder: Path) -> Converted:
    folder.mkdir()
    graph = folder / "net.onnx"
    graph.symlink_to(model.resolve())
    shapes = ",".join(f"[{','.join(map(str, shape))}]f32" for shape in shapes_at(inputs, tile))
    spec = importlib.util.find_spec("pnnx")
    if spec is None or spec.origin is None:
        raise BackendError(f"ncnn's converter is not installed; {INSTALL}")
    program = Path(spec.origin).with_name("pnnx.exe" if sys.platform == "win32" else "pnnx")
    if not program.is_file():
        raise BackendError("pnnx is installed without its program; pip install --force-reinstall pnnx")
    with tempfile.TemporaryFile() as log:
        try:
            done = subprocess.run(
                [program, graph.name, f"inputshape={shapes}", "fp16=0"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=CONVERSION_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BackendError(
                f"pnnx does not finish {model.name} in {CONVERSION_S:.0f} s; use another --backend"
            ) from error
        log.seek(0)
        said = log.read().decode(errors="replace").splitlines()
    param, weights = folder / "net.ncnn.param", folder / "net.ncnn.bin"
    if done.returncode or not param.exists() or not weights.exists():
        last = next((line.strip() for line in reversed(said) if line.strip()), f"it ends with {done.returncode}")
        raise BackendError(f"pnnx cannot convert {model.name}: {last}; use another --backend")
    return Converted(tuple(param.read_text(encoding="utf-8").splitlines()), weights)


def shapes_at(inputs: Sequence[Port], tile: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of the inputs for one tile: free sizes but the batch are the tile's, in its order."""
    shapes = []
    for port in inputs:
        sizes, shape = iter(tile), list[int]()
        free = [k for k, n in enumerate(port.shape) if n is None]
        batch = free[0] if len(free) > len(tile) else None
        for k, n in enumerate(port.shape):
            shape.append(n if n is not None else 1 if k == batch else next(sizes))
        shapes.append(tuple(shape))
    return shapes
