"""Whether an image's grey levels are those of training, or the same divided by the largest value of their type."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..contract.contract import Normalization
from ..errors import ContractError
from .normalize import MEASURED
from .pixels import Array
from .source import Source

LEAST_HIGH = 50  # floats of a network whose brightest pixel is darker may be lengths or ratios as well as grey levels
FIRST_SAMPLES = 2**16  # looked at first: most images show there that they are right
_FACTORS = (255, 65535)


def check_value_range(source: Source, seen: tuple[float, float] | None, normalization: Normalization) -> None:
    """Refuses pixels from 0 to 1 for a network of grey levels, and grey levels for one of pixels from 0 to 1.

    Reads up to the first pixel that shows that it is not so. Statistics of the image make up for any factor; nothing is
    read for these.

    Args:
        source: The image.
        seen: (lowest, highest) raw pixel that the contract declares or that build saw; None: nothing is known.
        normalization: Of the image.

    Raises:
        ContractError: A factor of 255 or 65535 explains the difference.
    """
    relative = normalization.method == "dtype" or (normalization.method in MEASURED and normalization.clip is None)
    if seen is None or relative or seen[0] < 0:
        return
    if source.dtype.kind == "f" and seen[1] >= LEAST_HIGH:
        high = _high_of_fractions(source)
        if high is None:
            return
        factor = next((n for n in _FACTORS if seen[1] <= n), _FACTORS[-1])
        raise ContractError(
            f"{source.name}: {source.dtype} pixels from 0 to {high:.3g}, and the network takes grey levels from "
            f"{seen[0]:g} to {seen[1]:g}: they were divided by {factor}, as ToTensor does; multiply them by {factor} (or, "
            "where they are grey levels as they are, round them to integers)"
        )
    if source.dtype.name in ("uint8", "uint16") and seen[1] <= 1:
        factor = int(np.iinfo(source.dtype).max)
        high = float(max(band.max() for band in _bands(source, up_to=1)))
        if high > 1:
            raise ContractError(
                f"{source.name}: {source.dtype} pixels up to {high:g}, and the network takes pixels from {seen[0]:g} to "
                f"{seen[1]:g}; divide them by {factor}, or build the engine with --normalize scale={factor}"
            )


def _high_of_fractions(source: Source) -> float | None:
    """The brightest pixel where all lie between 0 and 1 and some inside; else None."""
    high = 0.0
    for band in _bands(source):
        low, top = float(band.min()), float(band.max())
        if not (low >= 0 and top <= 1):  # nor NaN, which is for others to refuse
            return None
        high = max(high, top)
    return high if high > 0 else None


def _bands(source: Source, up_to: float = math.inf) -> Iterator[Array]:
    """Bands of pixels that hold data: some rows of the middle first, the whole image after that.

    ``up_to``: ends with the first band that holds a brighter pixel.
    """
    rest = source.shape[1:]
    rows = max(1, FIRST_SAMPLES // max(1, math.prod(rest) * source.channels))
    start = max(0, (source.shape[0] - rows) // 2)
    middle = (source.planes // 2, start, min(start + rows, source.shape[0]))
    for plane, first, last in (middle, *source.bands()):
        band, valid = source.read_valid(plane, (first, *(0 for _ in rest)), (last, *rest))
        pixels = band if valid is None else band[:, valid]
        if pixels.size:
            yield pixels
            if pixels.max() > up_to:
                return
