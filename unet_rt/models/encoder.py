"""What FCN-8s and SegNet have in common, for comparison on equal terms: the U-Net's contracting path, same padding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..system.json import Record
from .unet import UNetSpec, conv_block


@dataclass(frozen=True)
class EncoderSpec(Record):
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

    @property
    def dims(self) -> int:
        """Spatial axes."""
        return 2

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

    def widths(self) -> list[int]:
        """Channels of each level, from full resolution down."""
        return [self.width * 2**level for level in range(self.depth + 1)]

    def blocks(self) -> nn.ModuleList:
        """The contracting path: two convolutions per level."""
        widths = self.widths()
        channels = [self.in_channels, *widths]
        return nn.ModuleList(conv_block(self.path(), a, b) for a, b in zip(channels, widths, strict=False))

    def out_size(self, size: int) -> int:
        return self.path().out_size(size)

    def size_at_least(self, size: int) -> int:
        return self.path().size_at_least(size)
