"""Stacks whose planes are read with their neighbours as channels, for networks that see a few slices at once (2.5-D)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..contract.contract import Border
from ..errors import ContractError, size_text
from .axes import ChannelChoice, Layout, read_axes
from .pixels import Array
from .source import Source

SLICES = "slices"  # in place of channel numbers
_BY_RULE = {3: "ZYX", 4: "TZYX"}


def read_stack(
    shape: Sequence[int],
    *,
    name: str,
    spatial: int,
    found: str | None,
    given: str | None,
    wanted: int | None,
) -> Layout:
    """The layout of a grey stack of ``shape``, for a network of ``wanted`` slices; arguments as of :func:`read_axes`.

    Raises:
        ContractError: It is no grey stack, or the network has no middle slice.
    """
    if spatial != 2 or wanted is None or wanted < 3 or wanted % 2 == 0:
        what = "volumes" if spatial == 3 else f"{'any number of' if wanted is None else wanted} channel(s)"
        raise ContractError(
            f"{name}: --channels {SLICES} gives a 2-D network a slice with as many neighbours before it as behind, and this "
            f"network takes {what}; choose by number, e.g. --channels 0"
        )
    if given is None and (found is None or "Q" in found):
        given = _BY_RULE.get(len(shape))
        if given is None:
            raise ContractError(
                f"{name}: pixels of {len(shape)} axes ({size_text(shape)}) do not say which are the slices; declare them, "
                "e.g. --axes ZYX"
            )
    layout = read_axes(shape, name=name, spatial=2, found=found, given=given, wanted=1)
    if layout.channels > 1:
        raise ContractError(
            f"{name}: axes {layout.axes} ({size_text(layout.shape)}) hold {layout.channels} channels, and --channels "
            f"{SLICES} makes channels of the slices of one; save that channel as a stack of its own"
        )
    if "Z" not in layout.plane_axes and layout.plane_axes != "I":
        raise ContractError(
            f"{name}: axes {layout.axes} ({size_text(layout.shape)}) have no Z for --channels {SLICES} to slide over; "
            "declare them, e.g. --axes ZYX"
        )
    return layout


class Slices(Source):
    """A stack: what is read of a plane are the slices around it, as channels, continued by the border rule at its ends.

    Attributes:
        stack: The same with one channel.
    """

    def __init__(self, stack: Source, count: int, border: Border) -> None:
        """ContractError for a border of numbers that pixels have after their normalisation: there are none before it."""
        if border == "zero":
            raise ContractError(
                f"{stack.name}: --channels {SLICES} continues a stack by pixels, and border zero is 0 after their "
                "normalisation; use --border mirror, edge or constant"
            )
        self.__dict__.update(vars(stack))
        self.stack = stack
        self.channels = count
        self.on_device = False
        self._border = border
        self._along = stack.plane_axes.index("Z") if "Z" in stack.plane_axes else 0
        half = count // 2
        self.reading = f"{stack.reading}; with {half} slice{'s' if half > 1 else ''} before and behind as channels"

    def planes_of(self, plane: int) -> list[int | None]:
        """The plane that each channel of a plane comes from; None: nothing but the constant border."""
        place = [int(i) for i in np.unravel_index(plane, self.plane_shape)]
        middle, size, half = place[self._along], self.plane_shape[self._along], self.channels // 2
        found = list[int | None]()
        for at in range(middle - half, middle + half + 1):
            if self._border == "constant" and not 0 <= at < size:
                found.append(None)
                continue
            place[self._along] = _inside(at, size, self._border)
            found.append(int(np.ravel_multi_index(place, self.plane_shape)))
        return found

    def read(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        self._window(plane, start, stop)
        out = np.zeros((self.channels, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
        planes = self.planes_of(plane)
        for one in {p for p in planes if p is not None}:
            out[[k for k, p in enumerate(planes) if p == one]] = self.stack.read(one, start, stop)
        return out

    def valid(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> NDArray[np.bool_] | None:
        masks = [self.stack.valid(p, start, stop) for p in sorted({p for p in self.planes_of(plane) if p is not None})]
        known = [mask for mask in masks if mask is not None]
        return np.logical_and.reduce(known) if known else None

    def read_valid(
        self, plane: int, start: Sequence[int], stop: Sequence[int]
    ) -> tuple[Array, NDArray[np.bool_] | None]:
        return self.read(plane, start, stop), self.valid(plane, start, stop)


ONE_CHANNEL = ChannelChoice((0,), "one channel")


def _inside(at: int, size: int, border: Border) -> int:
    """The slice that stands for number ``at`` beyond the ends of a stack."""
    if border == "edge" or size == 1:
        return min(max(at, 0), size - 1)
    at %= 2 * (size - 1)
    return min(at, 2 * (size - 1) - at)
