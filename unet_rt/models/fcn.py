"""FCN-8s of Long, Shelhamer and Darrell (2015), small: the U-Net's predecessor whose skips are sums of class scores.

For comparison on equal terms it has the U-Net's contracting path (two 3 x 3 convolutions per level, ``width`` channels
at full resolution, doubled by each of four poolings) in place of VGG-16, whose pixels it never saw anyway. What makes
it an FCN-8s is kept: 1 x 1 convolutions give class scores at strides 16, 8 and, fused by sums, up-sampling by transposed
convolutions, twice by two and then at once by the rest. In the paper the strides are 32, 16 and 8; with four poolings
instead of five they are 16, 8 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .encoder import EncoderSpec
from .unet import initialize


@dataclass(frozen=True)
class FCN8sSpec(EncoderSpec):
    """The architecture in values; ``depth`` from 3, as three scales are fused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 3:
            raise ValueError(f"FCN8s depth is {self.depth!r}; use a whole number from 3: it fuses three scales")


class FCN8s(nn.Module):
    """``(N, in_channels, Y, X)`` float32 -> logits ``(N, classes, Y, X)``; sizes are multiples of ``2 ** depth``."""

    def __init__(self, spec: FCN8sSpec | None = None) -> None:
        super().__init__()
        self.spec = spec = spec or FCN8sSpec()
        widths, classes = spec.widths(), spec.classes
        self.down = spec.blocks()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(spec.dropout)
        # Scores of the lowest level, of the one above it and of the one above that.
        self.score = nn.ModuleList(nn.Conv2d(w, classes, 1) for w in reversed(widths[-3:]))
        rest = 2 ** (spec.depth - 2)
        factors = (2, 2, rest)
        ups = [nn.ConvTranspose2d(classes, classes, 2 * f, stride=f, padding=f // 2, bias=False) for f in factors]
        self.up = nn.ModuleList(ups)
        initialize(self)
        with torch.no_grad():
            for up, factor in zip(ups, factors, strict=True):
                up.weight.copy_(_bilinear(classes, 2 * factor))

    def forward(self, x: Tensor) -> Tensor:
        features: list[Tensor] = []
        for level, part in enumerate(self.down):
            x = part(self.pool(x) if level else x)
            features.append(x)
        scores = self.score[0](self.dropout(features[-1]))
        for k in (1, 2):
            scores = self.up[k - 1](scores) + self.score[k](features[-1 - k])
        logits: Tensor = self.up[2](scores)
        return logits


def _bilinear(classes: int, size: int) -> Tensor:
    """Kernel (classes, classes, size, size) of bilinear interpolation, each class from itself: where the paper starts."""
    factor = size // 2
    ramp = 1 - (torch.arange(size) - (size - 1) / 2).abs() / factor
    return torch.eye(classes)[:, :, None, None] * ramp[:, None] * ramp
