"""Networks as public libraries write them, whose exports at one size bake that size into the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Sequential):
    """Convolution, norm, ReLU."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class SizedDecoder(nn.Module):
    """A strided encoder, and a decoder that interpolates to the size of each skip connection."""

    def __init__(self, mode: str = "nearest", depth: int = 3, width: int = 6) -> None:
        super().__init__()
        self.how: dict[str, Any] = {"mode": "nearest"}
        if mode != "nearest":
            self.how = {"mode": "bilinear", "align_corners": mode == "align_corners"}
        self.encoder = nn.ModuleList(Block(width if k else 1, width, 2 if k else 1) for k in range(depth + 1))
        self.decoder = nn.ModuleList(Block(2 * width, width) for _ in range(depth))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        for block, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            x = block(torch.cat([F.interpolate(x, size=skip.shape[2:], **self.how), skip], 1))
        return self.head(x)


class Shuffled(nn.Module):
    """Pixels to channels and back around a convolution, by the functions of PyTorch or by views of them."""

    def __init__(self, views: bool, block: int = 2, inputs: int = 1) -> None:
        super().__init__()
        self.views, self.block = views, block
        self.layers = nn.Sequential(Block(inputs * block**2, 8), nn.Conv2d(8, 2 * block**2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        r = self.block
        if not self.views:
            return F.pixel_shuffle(self.layers(F.pixel_unshuffle(x, r)), r)
        n, c, h, w = x.shape
        x = x.view(n, c, h // r, r, w // r, r).permute(0, 1, 3, 5, 2, 4).reshape(n, c * r * r, h // r, w // r)
        x = self.layers(x)
        n, c, h, w = x.shape
        return x.view(n, c // r**2, r, r, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // r**2, h * r, w * r)


class ChannelShuffle(nn.Module):
    """ShuffleNet's change of channels between groups."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Block(1, 8), nn.Conv2d(8, 2, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        n, c, h, w = x.shape
        return self.after(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Atrous(nn.Module):
    """DeepLab's kind: strided encoder, dilated convolution, image pooling, corners aligned."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.low = nn.Sequential(Block(1, width, 2), Block(width, width, 2))
        self.deep, self.wide = Block(width, width, 2), nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.pooled, self.head = nn.Conv2d(width, width, 1), nn.Conv2d(2 * width, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def resized(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return F.interpolate(y, size=like.shape[2:], mode="bilinear", align_corners=True)

        low = self.low(x)
        y = self.deep(low)
        y = self.wide(y) + resized(self.pooled(F.adaptive_avg_pool2d(y, 1)), y)
        return resized(self.head(torch.cat([resized(y, low), low], 1)), x)
