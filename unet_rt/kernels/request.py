"""What is asked of the kernels beside the arrays, in frozen values: where a window lies, what is done to its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Border = Literal["mirror", "edge", "constant", "zero"]
Op = Literal["copy", "softmax", "sigmoid", "argmax", "threshold"]
Size = Sequence[int]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Frame:
    """Where a window of pixels lies in its image, and what a tile holds beyond the image.

    Attributes:
        image_shape: Pixels of the whole image; the border rule applies at its edges. None: the window's.
        window_start: Image pixel of the window's first pixel. None: 0.
        border: ``mirror`` (NumPy's ``reflect``, repeated as needed), ``edge``, ``constant`` or ``zero``: 0 in the tile,
            whatever the normalisation.
        constant: Raw pixel value of the constant border; it is normalised like every pixel.
    """

    image_shape: Size | None = None
    window_start: Size | None = None
    border: Border = "mirror"
    constant: float = 0.0


@dataclass(frozen=True)
class Affine:
    """The numbers that normalise pixels: ``(min(max(x, clip[0]), clip[1]) - offset[c]) / divisor[c]``.

    Attributes:
        offset, divisor: (C,) float32, in grey levels; no divisor is 0.
        clip: (low, high) in grey levels, None for no clipping.
    """

    offset: NDArray[np.float32]
    divisor: NDArray[np.float32]
    clip: tuple[float, float] | None


@dataclass(frozen=True)
class Placement:
    """Which samples of some tiles are used, and where they go in an output: int64 (tiles, axes), or tables on a GPU.

    Attributes:
        source: First sample of each tile that is used.
        target: Its place in the output.
        size: Samples used.
    """

    source: Ints
    target: Ints
    size: Ints

    def from_row(self, row: int) -> Placement:
        """The same places in an output that begins at row ``row`` of this one, along the first axis."""
        target = self.target.copy()
        target[:, 0] -= row
        return replace(self, target=target)


@dataclass(frozen=True)
class Operation:
    """What is done to the K values of a sample, in float32.

    Attributes:
        op: ``argmax`` takes the first maximum, or the first NaN; ``softmax`` is taken over K.
        threshold: Number or (K,); met by raw values above it (0 for logits means probability 0.5), never by NaN.
        values: uint8 value of each class, (K,), default 0, 1, ...; for ``threshold`` (below, above), default (0, 1).
    """

    op: Op = "copy"
    threshold: ArrayLike | None = None
    values: ArrayLike | None = None


COPY = Operation()
