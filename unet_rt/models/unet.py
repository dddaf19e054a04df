"""The U-Net of Ronneberger, Fischer and Brox (2015) and its usual relatives, 2-D and 3-D.

``UNet()`` is the paper's network to the number: a tile of 572 x 572 px gives 388 x 388 samples, 64 to 1024 channels,
23 convolutional layers (the up-convolutions counted), 31,030,658 parameters for one channel and two classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..system.json import Record
from .skip import crop_concat

Padding = Literal["valid", "same"]
Norm = Literal["none", "batch"]
Up = Literal["transposed", "bilinear", "nearest"]


@dataclass(frozen=True)
class UNetSpec(Record):
    """The architecture in values: what a checkpoint needs to rebuild its network.

    Attributes:
        in_channels: Channels of the input.
        classes: Channels of the output (logits).
        width: Channels of the first level; each level below has twice as many.
        depth: Number of poolings.
        dims: 2 or 3 spatial axes.
        padding: ``valid`` (the paper's unpadded convolutions) or ``same`` (zero padding).
        norm: ``none`` (the paper's) or ``batch``: BatchNorm between convolution and ReLU.
        dropout: Probability at the end of the contracting path (its two lowest levels).
        up: ``transposed`` 2 x 2 convolution, or a 1 x 1 convolution and ``bilinear`` or ``nearest`` up-sampling.
    """

    in_channels: int = 1
    classes: int = 2
    width: int = 64
    depth: int = 4
    dims: int = 2
    padding: Padding = "valid"
    norm: Norm = "none"
    dropout: float = 0.5
    up: Up = "transposed"

    def __post_init__(self) -> None:
        for name, least in (("in_channels", 1), ("classes", 1), ("width", 1), ("depth", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"UNet {name} is {value!r}; use a whole number from {least}")
        choices: tuple[tuple[str, tuple[object, ...]], ...] = (
            ("dims", (2, 3)),
            ("padding", ("valid", "same")),
            ("norm", ("none", "batch")),
            ("up", ("transposed", "bilinear", "nearest")),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"UNet {name} is {getattr(self, name)!r}; use one of {', '.join(map(str, allowed))}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"UNet dropout is {self.dropout}; use a probability in [0, 1)")

    def out_size(self, size: int) -> int:
        """Output samples along one axis of an input of ``size`` pixels.

        Raises ValueError where a pooling would meet an odd size or a convolution runs out of pixels.
        """
        lost = 4 if self.padding == "valid" else 0  # two 3 x 3 convolutions per level
        n = size
        for _ in range(self.depth):
            n -= lost
            if n < 2 or n % 2:
                raise ValueError(f"size {size} px does not fit a {self.padding} U-Net of depth {self.depth}; "
                                 f"use {self.size_at_least(size)}")  # fmt: skip
            n //= 2
        n -= lost
        if n >= 1:
            for _ in range(self.depth):
                n = 2 * n - lost
        if n < 1:
            raise ValueError(f"size {size} px leaves no sample in a {self.padding} U-Net of depth {self.depth}; "
                             f"use {self.size_at_least(size)}")  # fmt: skip
        return n

    def size_at_least(self, size: int) -> int:
        """Smallest input size, not below ``size``, that the network accepts."""
        bottom = 1
        while (n := self._size_from_bottom(bottom)) < size or self._kept(bottom) < 1:
            bottom += 1
        return n

    def _size_from_bottom(self, bottom: int) -> int:
        """Input size whose lowest level ends with ``bottom`` samples."""
        lost = 4 if self.padding == "valid" else 0
        n = bottom + lost
        for _ in range(self.depth):
            n = 2 * n + lost
        return n

    def _kept(self, bottom: int) -> int:
        lost = 4 if self.padding == "valid" else 0
        n = bottom
        for _ in range(self.depth):
            n = 2 * n - lost
        return n

    def crop(self, level: int) -> int:
        """Samples cut from each side of the skip of ``level`` (0 = full resolution).

        It does not depend on the tile: 88, 40, 16 and 4 for the paper's network.
        """
        if self.padding == "same":
            return 0
        below = 4  # what the lower level loses, in its own samples
        for _ in range(self.depth - 1 - level):
            below = 2 * below + 8
        return below


class UNet(nn.Module):
    """``(N, in_channels, *tile)`` float32 -> logits ``(N, classes, *tile_out)``.

    The default is the paper's network.
    """

    def __init__(self, spec: UNetSpec | None = None) -> None:
        super().__init__()
        spec = spec or UNetSpec()
        self.spec = spec
        widths = [spec.width * 2**level for level in range(spec.depth + 1)]
        self.down = nn.ModuleList(
            conv_block(spec, a, b) for a, b in zip([spec.in_channels, *widths], widths, strict=False)
        )
        self.pool = (nn.MaxPool2d if spec.dims == 2 else nn.MaxPool3d)(2)
        self.dropout = nn.Dropout(spec.dropout)
        self.up = nn.ModuleList(_up(spec, 2 * b, b) for b in reversed(widths[:-1]))
        self.merge = nn.ModuleList(conv_block(spec, 2 * b, b) for b in reversed(widths[:-1]))
        self.head = _conv(spec)(spec.width, spec.classes, 1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        if not being_exported():
            self._check(x.shape)
        skips: list[Tensor] = []
        depth = self.spec.depth
        for level, block in enumerate(self.down):
            x = block(x)
            if level >= depth - 1:
                x = self.dropout(x)
            if level < depth:
                skips.append(x)
                x = self.pool(x)
        for k, (up, merge) in enumerate(zip(self.up, self.merge, strict=True)):
            level = depth - 1 - k
            x = merge(crop_concat(skips[level], up(x), self.spec.crop(level)))
        logits: Tensor = self.head(x)
        return logits

    def _check(self, shape: Sequence[int]) -> None:
        spec = self.spec
        if len(shape) != 2 + spec.dims or shape[1] != spec.in_channels:
            want = "x".join(["N", str(spec.in_channels), *"ZYX"[-spec.dims :]])
            raise ValueError(f"input is {'x'.join(map(str, shape))}; this U-Net takes {want}")
        for size in shape[2:]:
            spec.out_size(size)


def being_exported() -> bool:
    """Under a tracer sizes are not numbers yet."""
    return bool(torch._C._get_tracing_state()) or torch.compiler.is_compiling()


def initialize(module: nn.Module) -> None:
    """He initialisation of every convolution: deviation sqrt(2 / fan-in), zero bias. Uses torch's global generator."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
        elif isinstance(m, nn.ConvTranspose2d | nn.ConvTranspose3d):
            # A 2 x 2 kernel of stride 2 reaches each sample once: the fan-in is the input channels alone, and no
            # ReLU follows, so that deviation sqrt(1 / fan-in) keeps the variance.
            nn.init.normal_(m.weight, std=m.in_channels**-0.5)
        else:
            continue
        if m.bias is not None:
            nn.init.zeros_(m.bias)


def _conv(spec: UNetSpec) -> type[nn.Conv2d] | type[nn.Conv3d]:
    return nn.Conv2d if spec.dims == 2 else nn.Conv3d


def conv_block(spec: UNetSpec, channels_in: int, channels_out: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each followed by (BatchNorm and) ReLU."""
    layers: list[nn.Module] = []
    for a in (channels_in, channels_out):
        layers.append(_conv(spec)(a, channels_out, 3, padding=int(spec.padding == "same"), bias=spec.norm == "none"))
        if spec.norm == "batch":
            layers.append((nn.BatchNorm2d if spec.dims == 2 else nn.BatchNorm3d)(channels_out))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _up(spec: UNetSpec, channels_in: int, channels_out: int) -> nn.Module:
    if spec.up == "transposed":
        return (nn.ConvTranspose2d if spec.dims == 2 else nn.ConvTranspose3d)(channels_in, channels_out, 2, stride=2)
    # Interpolation weights sum to one, so the 1 x 1 convolution commutes with it; before it, it costs a quarter.
    mode = {"nearest": "nearest", "bilinear": "bilinear" if spec.dims == 2 else "trilinear"}[spec.up]
    align = None if mode == "nearest" else False
    return nn.Sequential(
        _conv(spec)(channels_in, channels_out, 1), nn.Upsample(scale_factor=2, mode=mode, align_corners=align)
    )
