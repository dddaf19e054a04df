"""SegNet of Badrinarayanan, Kendall and Cipolla (2015), small: up-sampling by the places that max-pooling remembered.

For comparison on equal terms it has the U-Net's contracting path and a mirrored expanding path of as many
convolutions. Nothing but the poolings' indices crosses from one to the other: where the U-Net concatenates features,
max-unpooling puts each value back to where its maximum was, and zeros elsewhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from .unet import UNetSpec, conv_block, initialize


@dataclass(frozen=True)
class SegNetSpec:
    """The architecture in values.

    Attributes:
        in_channels: Channels of the input.
        classes: Channels of the output (logits).
        width: Channels of the first level; each level below has twice as many.
        depth: Number of poolings.
        norm: ``none`` or ``batch``.
        dropout: Probability at the lowest level.
    """

    in_channels: int = 1
    classes: int = 2
    width: int = 64
    depth: int = 4
    norm: str = "none"
    dropout: float = 0.5

    def __post_init__(self) -> None:
        self.path()

    def path(self) -> UNetSpec:
        """The contracting path's terms."""
        return UNetSpec(
            self.in_channels,
            self.classes,
            self.width,
            self.depth,
            padding="same",
            norm=self.norm,  # type: ignore[arg-type] # checked by the spec
            dropout=self.dropout,
        )

    def out_size(self, size: int) -> int:
        return self.path().out_size(size)

    def size_at_least(self, size: int) -> int:
        return self.path().size_at_least(size)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class SegNet(nn.Module):
    """``(N, in_channels, Y, X)`` float32 -> logits ``(N, classes, Y, X)``; sizes are multiples of ``2 ** depth``."""

    def __init__(self, in_channels: int = 1, classes: int = 2, **values: Any) -> None:
        super().__init__()
        self.spec = spec = SegNetSpec(in_channels, classes, **values)
        path = spec.path()
        widths = [spec.width * 2**level for level in range(spec.depth + 1)]
        self.down = nn.ModuleList(conv_block(path, a, b) for a, b in zip([in_channels, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)
        self.dropout = nn.Dropout(spec.dropout)
        # Unpooling needs as many channels as were pooled, so that a 1 x 1 convolution narrows before it.
        self.narrow = nn.ModuleList(nn.Conv2d(2 * w, w, 1) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(conv_block(path, w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(spec.width, classes, 1)
        initialize(self)

    @classmethod
    def from_spec(cls, spec: SegNetSpec) -> SegNet:
        return cls(**spec.to_json())

    def forward(self, x: Tensor) -> Tensor:
        places: list[Tensor] = []
        for level, part in enumerate(self.down):
            if level:
                x, index = self.pool(x)
                places.append(index)
            x = part(x)
        x = self.dropout(x)
        for narrow, part in zip(self.narrow, self.up, strict=True):
            x = part(self.unpool(narrow(x), places.pop()))
        logits: Tensor = self.head(x)
        return logits
