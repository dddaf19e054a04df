"""The networks that same_results.py records: shipped ones, drawn ones and files of others, with images for each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import unet_rt as urt


@dataclass(frozen=True)
class Subject:
    """A network: its file, what it is built with, images like those it knows, and how every prediction reads them."""

    name: str
    model: Path
    tile: tuple[int, ...]
    samples: list[Any]
    contract: urt.Contract | None = None
    axes: str | None = None
    full: bool = True  # whether every kind of image and output is tried

    @property
    def spatial(self) -> int:
        return len(self.tile)


def drawings() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What draws nuclei and membranes, wherever this version keeps it."""
    try:
        from unet_rt.drawing.membranes import membranes
        from unet_rt.drawing.microscopy import microscopy
    except ImportError:
        from unet_rt.synthetic import microscopy
        from unet_rt.synthetic_membranes import membranes
    return microscopy, membranes


def nuclei(side: int, seed: int) -> Any:
    return drawings()[0]((side, side), seed=seed).image


def cells(side: int, seed: int) -> Any:
    return drawings()[1]((side, side), seed=seed).image


def noise(shape: tuple[int, ...], seed: int) -> Any:
    """Smooth grey levels, uint8, drawn without the package."""
    field = np.random.default_rng(seed).standard_normal(shape)
    for axis in range(len(shape)):
        for _ in range(3):
            field = field + np.roll(field, 1, axis) + np.roll(field, -1, axis)
    low, high = field.min(), field.max()
    return np.rint(255 * (field - low) / (high - low)).astype(np.uint8)


def drawn_network(path: Path, dims: int, channels: int) -> Path:
    """A U-Net of one level with weights drawn from a fixed seed: ``classes`` (3, sigmoid to come) and ``distance`` (1)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    rng, weights, nodes = np.random.default_rng(7), list[Any](), list[Any]()

    def conv(name: str, given: str, inputs: int, outputs: int, side: int = 3, *, relu: bool = True) -> str:
        scale = np.sqrt(2 / inputs / side**dims)
        kernel = rng.standard_normal((outputs, inputs, *[side] * dims)) * scale
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"{name}.w"))
        weights.append(numpy_helper.from_array(rng.standard_normal(outputs).astype(np.float32) / 4, f"{name}.b"))
        result = f"{name}.conv" if relu else name
        pads = [side // 2] * 2 * dims
        nodes.append(helper.make_node("Conv", [given, f"{name}.w", f"{name}.b"], [result], f"{name}.conv", pads=pads))
        if relu:
            nodes.append(helper.make_node("Relu", [result], [name], f"{name}.relu"))
        return name

    skip = conv("down", conv("first", "image", channels, 8), 8, 8)
    nodes.append(helper.make_node("MaxPool", [skip], ["pooled"], "pool", kernel_shape=[2] * dims, strides=[2] * dims))
    deep = conv("deep", "pooled", 8, 16)
    weights.append(numpy_helper.from_array(np.array([1, 1, *[2] * dims], np.float32), "scales"))
    mode = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes.append(helper.make_node("Resize", [deep, "", "scales"], ["up"], "resize", **mode))
    nodes.append(helper.make_node("Concat", ["up", skip], ["joined"], "concat", axis=1))
    last = conv("last", "joined", 24, 8)
    conv("classes", last, 8, 3, 1, relu=False)
    conv("distance", last, 8, 1, 1, relu=False)
    axes = ["n", "d", "h", "w"] if dims == 3 else ["n", "h", "w"]

    def value(name: str, size: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [axes[0], size, *axes[1:]])

    graph = helper.make_graph(
        nodes, "drawn", [value("image", channels)], [value("classes", 3), value("distance", 1)], weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    grey = noise((1, channels, *[24] * dims), 5).astype(np.float32) / np.float32(255)
    found = ReferenceEvaluator(model).run(["classes"], {"image": grey})[0]
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "classes.b")
    means = found.mean(axis=(0, *range(2, dims + 2)))  # taken away, so that each class is present and absent
    bias.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(bias) - means).astype(np.float32), bias.name))
    onnx.save_model(model, str(path))
    return path


def subjects(data: Path | None, work: Path) -> Iterator[Subject]:
    """All networks, smallest first."""
    heads = {"heads": [{"name": "distance", "task": "regression"}], "classes": ["one", "two", "three"]}
    said = {"output_is": "logits", "normalization": {"method": "scale", "scale": 255.0}, **heads}
    read = urt.Contract.from_json if hasattr(urt.Contract, "from_json") else contract_from_json
    rgb = [np.stack([noise((160, 176), 10 * k + c) for c in range(3)], axis=-1) for k in range(3)]
    yield Subject(
        "drawn-rgb", drawn_network(work / "rgb.onnx", 2, 3), (96, 96), rgb,
        read({"axes": "NCYX", "pixel_size_um": [0.5, 0.5], "task": "multilabel", **said}), "YXC",
    )  # fmt: skip
    yield Subject(
        "drawn-volume", drawn_network(work / "volume.onnx", 3, 1), (16, 32, 32),
        [noise((20, 56, 64), k) for k in range(3)], read({"axes": "NCZYX", "task": "multiclass", **said}), "ZYX",
    )  # fmt: skip
    shipped = Path(urt.__file__).parent / "data"
    for path in sorted(shipped.glob("*.onnx")):
        if path.stem == "membranes":
            yield Subject(path.stem, path, (252, 252), [cells(320, k) for k in range(3)])
        else:
            yield Subject(path.stem, path, (256, 256), [nuclei(320, k) for k in range(3)])
    for path in sorted(data.rglob("*.onnx")) if data is not None else []:
        name = path.relative_to(data).with_suffix("").as_posix() if data else path.stem
        grey = urt.Contract(normalization=urt.Normalization("scale", scale=255.0), task="regression")
        bright = urt.Contract(normalization=urt.Normalization("zscore"), task="binary", output_is="logits")
        own = grey if "strain" in name else bright
        yield Subject(name, path, (224, 224), [nuclei(256, k) for k in range(3)], own, full=False)


def contract_from_json(data: dict[str, Any]) -> urt.Contract:
    """The contract of a JSON, where this version has a function for it."""
    read: Callable[[dict[str, Any]], urt.Contract] = importlib.import_module("unet_rt.contract.json").contract_from_json
    return read(data)
