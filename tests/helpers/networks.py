"""Networks for the tests, built by parameters, and their ONNX graphs.

Weights are He-initialised with biases well away from zero: with zero biases a padded border looks like an inner one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class UNetSpec:
    """Parameters of :class:`UNet`."""

    dims: int = 2
    depth: int = 2
    channels: int = 4
    inputs: int = 1
    classes: int = 2
    valid: bool = False
    norm: str = "none"  # none batch instance group layer
    up: str = "transposed"  # transposed nearest bilinear align_corners transposed3 shuffle
    down: str = "max"  # max avg conv max3 (3x3, padded) ceil
    kernel: int = 3
    dilation: int = 1
    convs: int = 2
    pad_mode: str = "zeros"  # zeros reflect replicate circular
    residual: bool = False
    squeeze: bool = False  # squeeze-and-excitation: global pooling
    final: str = "none"  # none sigmoid softmax argmax


def _conv(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(*args, **kwargs)


def _norm(spec: UNetSpec, channels: int) -> nn.Module:
    if spec.norm == "batch":
        return (nn.BatchNorm2d if spec.dims == 2 else nn.BatchNorm3d)(channels)
    if spec.norm == "instance":
        return (nn.InstanceNorm2d if spec.dims == 2 else nn.InstanceNorm3d)(channels, affine=True)
    if spec.norm == "group":
        return nn.GroupNorm(2, channels)
    if spec.norm == "layer":
        return ChannelNorm(channels)
    return nn.Identity()


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel (ConvNeXt)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """Convolutions of one level."""

    def __init__(self, spec: UNetSpec, before: int, after: int) -> None:
        super().__init__()
        padding = 0 if spec.valid else spec.dilation * (spec.kernel - 1) // 2
        layers: list[nn.Module] = []
        for k in range(spec.convs):
            layers.append(
                _conv(
                    spec.dims, before if k == 0 else after, after, spec.kernel,
                    padding=padding, dilation=spec.dilation, padding_mode=spec.pad_mode,
                )
            )  # fmt: skip
            layers += [_norm(spec, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.short = _conv(spec.dims, before, after, 1) if spec.residual and not spec.valid else None
        self.gate = nn.Sequential(_conv(spec.dims, after, after, 1), nn.Sigmoid()) if spec.squeeze else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        if self.short is not None:
            y = y + self.short(x)
        if self.gate is not None:
            y = y * self.gate(y.mean(dim=tuple(range(2, y.ndim)), keepdim=True))
        return y


class Up(nn.Module):
    """Up-sampling by two."""

    def __init__(self, spec: UNetSpec, before: int, after: int) -> None:
        super().__init__()
        d = spec.dims
        self.how = spec.up
        transposed = nn.ConvTranspose2d if d == 2 else nn.ConvTranspose3d
        if spec.up == "transposed":
            self.layer: nn.Module = transposed(before, after, 2, stride=2)
        elif spec.up == "transposed3":
            self.layer = transposed(before, after, 3, stride=2, padding=1, output_padding=1)
        elif spec.up == "shuffle":
            self.layer = nn.Sequential(_conv(d, before, after * 4, 1), nn.PixelShuffle(2))
        else:
            self.layer = _conv(d, before, after, 1)
            self.mode = "nearest" if spec.up == "nearest" else ("bilinear" if d == 2 else "trilinear")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how in ("transposed", "transposed3", "shuffle"):
            return self.layer(x)
        if self.how == "nearest":
            return self.layer(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.layer(F.interpolate(x, scale_factor=2, mode=self.mode, align_corners=self.how == "align_corners"))


class Down(nn.Module):
    """Down-sampling by two."""

    def __init__(self, spec: UNetSpec, channels: int) -> None:
        super().__init__()
        d = spec.dims
        maximum, average = (nn.MaxPool2d, nn.AvgPool2d) if d == 2 else (nn.MaxPool3d, nn.AvgPool3d)
        self.layer: nn.Module
        if spec.down == "max":
            self.layer = maximum(2)
        elif spec.down == "max3":
            self.layer = maximum(3, stride=2, padding=1)
        elif spec.down == "ceil":
            self.layer = maximum(2, ceil_mode=True)
        elif spec.down == "avg":
            self.layer = average(2)
        elif spec.down == "avg3":
            self.layer = average(3, stride=2, padding=1)
        else:
            self.layer = _conv(d, channels, channels, 3, stride=2, padding=0 if spec.valid else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class UNet(nn.Module):
    """The U-Net of the paper and its usual variations."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        c = [spec.channels * 2**k for k in range(spec.depth + 1)]
        self.encoder = nn.ModuleList(
            Block(spec, spec.inputs if k == 0 else c[k - 1], c[k]) for k in range(spec.depth + 1)
        )
        self.down = nn.ModuleList(Down(spec, c[k]) for k in range(spec.depth))
        self.up = nn.ModuleList(Up(spec, c[k + 1], c[k]) for k in range(spec.depth))
        self.decoder = nn.ModuleList(Block(spec, 2 * c[k], c[k]) for k in range(spec.depth))
        self.head = _conv(spec.dims, c[0], spec.classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for k, block in enumerate(self.encoder):
            x = block(x)
            if k < self.spec.depth:
                skips.append(x)
                x = self.down[k](x)
        for k in reversed(range(self.spec.depth)):
            x = self.up[k](x)
            skip = skips[k]
            if self.spec.valid:
                for axis in range(2, skip.ndim):
                    cut = (skip.shape[axis] - x.shape[axis]) // 2
                    skip = skip.narrow(axis, cut, x.shape[axis])
            x = self.decoder[k](torch.cat([skip, x], 1))
        x = self.head(x)
        if self.spec.final == "sigmoid":
            return torch.sigmoid(x)
        if self.spec.final == "softmax":
            return torch.softmax(x, 1)
        if self.spec.final == "argmax":
            return torch.argmax(x, 1)
        return x


class ResNetUNet(nn.Module):
    """A residual encoder with a 7x7 stem and strided blocks, and a nearest-neighbour decoder."""

    def __init__(self, width: int = 4, stages: int = 2) -> None:
        super().__init__()
        c = [width * 2**k for k in range(stages + 1)]
        self.stem = nn.Sequential(nn.Conv2d(1, c[0], 7, 2, 3), nn.BatchNorm2d(c[0]), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.main = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c[k], c[k + 1], 3, 2, 1),
                nn.BatchNorm2d(c[k + 1]),
                nn.ReLU(),
                nn.Conv2d(c[k + 1], c[k + 1], 3, 1, 1),
            )
            for k in range(stages)
        )
        self.short = nn.ModuleList(nn.Conv2d(c[k], c[k + 1], 1, 2) for k in range(stages))
        self.merge = nn.ModuleList(nn.Conv2d(c[k + 1] + c[k], c[k], 3, 1, 1) for k in range(stages))
        self.head = nn.Conv2d(2 * c[0], 3, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.stem(x)
        y = self.pool(stem)
        skips = []
        for main, short in zip(self.main, self.short, strict=True):
            skips.append(y)
            y = F.relu(main(y) + short(y))
        for k in reversed(range(len(skips))):
            y = F.interpolate(y, scale_factor=2.0, mode="nearest")
            y = F.relu(self.merge[k](torch.cat([y, skips[k]], 1)))
        y = torch.cat([F.interpolate(y, scale_factor=2.0, mode="nearest"), stem], 1)
        return self.head(F.interpolate(y, scale_factor=2.0, mode="nearest"))


class TwoScales(nn.Module):
    """Two inputs on one grid, three outputs at the scales 1, 1/2 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(2, 4, 5, 1, 2)
        self.reduced, self.doubled = nn.Conv2d(4, 2, 3, 2, 1), nn.ConvTranspose2d(4, 2, 4, 2, 1)
        self.one = nn.Conv2d(4, 1, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z = F.relu(self.a(x)) + self.b(y)
        return self.one(z), self.reduced(z), self.doubled(z)


class ChannelsLast(nn.Module):
    """A network that takes and gives NHWC, as converted from other frameworks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Layers(nn.Module):
    """A function of the image between two convolutions, for operators one at a time."""

    def __init__(self, function: Any, channels: int = 4, after: int | None = None) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(1, channels, 1), nn.Conv2d(after or channels, 1, 1)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.function(self.before(x)))


class Attention(nn.Module):
    """Self-attention over all positions."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.flatten(2) for t in self.qkv(x).chunk(3, 1))
        weights = torch.softmax(q.transpose(1, 2) @ k, -1)
        return (v @ weights.transpose(1, 2)).reshape(x.shape)


class WindowAttention(nn.Module):
    """Self-attention within windows of ``size`` x ``size`` samples (Swin without shift)."""

    def __init__(self, channels: int = 4, size: int = 4) -> None:
        super().__init__()
        self.qkv, self.size = nn.Linear(channels, 3 * channels), size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        s = self.size
        x = x.view(n, c, h // s, s, w // s, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, c)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return x.reshape(n, h // s, w // s, s, s, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def initialise(network: nn.Module, seed: int = 0) -> nn.Module:
    """He weights, biases and normalisation parameters that are not neutral; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                fan_in = module.weight.shape[0]
            with torch.no_grad():
                module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-0.5, 0.5, generator=generator)
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                module.bias.uniform_(-0.5, 0.5, generator=generator)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()


def build(spec: UNetSpec, seed: int = 0) -> nn.Module:
    """A U-Net with realistic random weights."""
    return initialise(UNet(spec), seed)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter prints and warns about its own deprecations."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("torch.onnx").setLevel(level)


def export(
    network: nn.Module,
    shapes: Sequence[Sequence[int]],
    path: Path | None = None,
    *,
    dynamo: bool = False,
    free: bool = True,
    free_batch: bool = False,
    spatial: Sequence[int] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    """The network's ONNX graph.

    Args:
        network: The module.
        shapes: Shape of each input at export.
        path: Where to write it; None: in memory.
        dynamo: Which of PyTorch's two exporters.
        free: Whether spatial sizes are free (dynamic) or fixed.
        free_batch: Whether the batch size is free.
        spatial: Numbers of the spatial axes; default: all from 2 on.
        opset: ONNX operator set.
    """
    inputs = tuple(torch.zeros(*shape) for shape in shapes)
    names = [f"x{k}" for k in range(len(inputs))]
    axes = {}
    for name, shape in zip(names, shapes, strict=True):
        chosen = spatial if spatial is not None else range(2, len(shape))
        axes[name] = {k: f"s{k}" for k in chosen} if free else {}
        if free_batch:
            axes[name][0] = "n"
    buffer = io.BytesIO()
    with quiet(), torch.no_grad():
        if dynamo:
            dynamic: Any = None
            if free or free_batch:
                auto = torch.export.Dim.DYNAMIC
                dynamic = tuple({k: auto for k in axes[name]} for name in names)
            program = torch.onnx.export(
                network,
                inputs,
                dynamo=True,
                dynamic_shapes=dynamic,
                opset_version=opset,
                input_names=names,
                verbose=False,
            )
            model = program.model_proto
        else:
            torch.onnx.export(
                network, inputs, buffer, dynamo=False, dynamic_axes={k: v for k, v in axes.items() if v},
                opset_version=opset, input_names=names,
            )  # fmt: skip
            model = onnx.load_from_string(buffer.getvalue())
    if path is not None:
        onnx.save(model, path)
    return model


def texture(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Blobs, gradient and noise that look like microscopy: float32, about zero mean and unit deviation."""
    rng = np.random.default_rng(seed)
    out = rng.normal(0, 0.3, shape).astype(np.float32)
    spatial = shape[2:]
    grid = np.meshgrid(*(np.arange(n) for n in spatial), indexing="ij")
    for _ in range(12):
        centre = [rng.uniform(0, n) for n in spatial]
        radius = rng.uniform(2, 10)
        distance = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True))
        out += rng.uniform(0.5, 2) * np.exp(-distance / (2 * radius**2)).astype(np.float32)
    out += np.linspace(-0.3, 0.3, spatial[-1], dtype=np.float32)
    return (out - out.mean()) / out.std()
