"""SegNet of Badrinarayanan, Kendall and Cipolla (2015), small: up-sampling by the places that max-pooling remembered.

For comparison on equal terms it has the U-Net's contracting path and a mirrored expanding path of as many
convolutions. Nothing but the poolings' indices crosses from one to the other: where the U-Net concatenates features,
max-unpooling puts each value back to where its maximum was, and zeros elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .encoder import EncoderSpec
from .unet import being_exported, conv_block, initialize


@dataclass(frozen=True)
class SegNetSpec(EncoderSpec):
    """The architecture in values."""


class SegNet(nn.Module):
    """``(N, in_channels, Y, X)`` float32 -> logits ``(N, classes, Y, X)``; sizes are multiples of ``2 ** depth``."""

    def __init__(self, spec: SegNetSpec | None = None) -> None:
        super().__init__()
        self.spec = spec = spec or SegNetSpec()
        path = spec.path()
        widths = spec.widths()
        self.down = spec.blocks()
        self.dropout = nn.Dropout(spec.dropout)
        # Unpooling needs as many channels as were pooled, so that a 1 x 1 convolution narrows before it.
        self.narrow = nn.ModuleList(nn.Conv2d(2 * w, w, 1) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(conv_block(path, w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(spec.width, spec.classes, 1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        pool, unpool = (_pool_masks, _unpool_masks) if being_exported() else (_pool, _unpool)
        places: list[Tensor] = []
        for level, part in enumerate(self.down):
            if level:
                x, place = pool(x)
                places.append(place)
            x = part(x)
        x = self.dropout(x)
        for narrow, part in zip(self.narrow, self.up, strict=True):
            x = part(unpool(narrow(x), places.pop()))
        logits: Tensor = self.head(x)
        return logits


def _pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled values, and their places as indices into each plane."""
    values, places = functional.max_pool2d(x, 2, return_indices=True)
    return values, places


def _unpool(x: Tensor, places: Tensor) -> Tensor:
    # Values are only moved; not every device moves half precision.
    return functional.max_unpool2d(x.float(), places, [2, 2]).to(x.dtype)


# For ONNX the same in operators that every backend has. Its MaxUnpool is known to few, and its indices count over the
# whole tensor. Here the place of a maximum is one of four masks, those of the corners of each 2 x 2 window; of equal
# values the first one counts, as in torch (all zero after a ReLU is common).


def _pool_masks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled values (N, C, Y, X), and their places as masks (N, 4 C, Y, X), corner by corner, 1 or 0."""
    values = functional.max_pool2d(x, 2)
    rows = x[:, :, ::2], x[:, :, 1::2]
    corners = [row[..., k::2] for row in rows for k in (0, 1)]
    masks = [(corners[0] >= values).to(x.dtype)]
    free = 1 - masks[0]
    for corner in corners[1:]:
        masks.append((corner >= values).to(x.dtype) * free)
        free = free - masks[-1]
    return values, torch.cat(masks, dim=1)


def _unpool_masks(x: Tensor, places: Tensor) -> Tensor:
    return _Interleaved.apply(torch.cat((x, x, x, x), dim=1) * places)  # type: ignore[no-any-return, no-untyped-call]


class _Interleaved(torch.autograd.Function):
    """(N, 4 C, Y, X), corner by corner -> (N, C, 2 Y, 2 X): ONNX's DepthToSpace, which torch has in another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        corners = x.reshape(n, 2, 2, c // 4, height, width)
        return corners.permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * height, 2 * width)

    @staticmethod
    def symbolic(g: Any, x: Any) -> Any:
        result = g.op("DepthToSpace", x, blocksize_i=2, mode_s="DCR")
        sizes = x.type().sizes()
        if sizes is not None and sizes[1] is not None:  # later operators ask for the number of channels
            result.setType(x.type().with_sizes([None, sizes[1] // 4, None, None]))
        return result
