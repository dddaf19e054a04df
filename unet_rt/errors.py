"""Errors of unet-rt. Every message states the fact, the value and the way out.

The command line turns each of these into exit code 2 (wrong use), except
:class:`ParityError` (exit code 1: the work was done and the answer is no).
"""

from __future__ import annotations

from collections.abc import Iterable


class UnetRtError(Exception):
    """Base of every error that unet-rt raises on purpose."""


class ContractError(UnetRtError):
    """The input contract (axes, channels, normalisation, task, ...) is missing, ambiguous or contradicted."""


class IncompleteContractError(ContractError):
    """What decides the result is said nowhere: all of it, before anything is computed.

    Attributes:
        options: Of the command line, those that would say it.
    """

    def __init__(self, message: str, options: Iterable[str]) -> None:
        super().__init__(message)
        self.options = tuple(options)


class GraphError(UnetRtError):
    """The ONNX graph cannot be read, or cannot do what was asked of it."""


class ImageError(UnetRtError):
    """An image cannot be read, does not fit the contract, or holds values that cannot be predicted."""


class OutputError(UnetRtError):
    """An output cannot be written."""


class TileError(UnetRtError):
    """A tile, halo, step or overlap that the network or the image does not allow."""


class EngineError(UnetRtError):
    """An engine folder that is corrupt, foreign, stale or unproven."""


class BackendError(UnetRtError):
    """A backend or device that is missing, broken, or refuses the graph."""


class DeviceMemoryError(BackendError):
    """The device has not enough free memory."""


class TileMemoryError(DeviceMemoryError):
    """The device's memory does not hold ``batch`` tiles, and fewer were not tried or do not exist; nothing was run yet."""

    def __init__(self, message: str, batch: int) -> None:
        super().__init__(message)
        self.batch = batch


class ParityError(UnetRtError):
    """The measured difference to the baseline is outside the budget."""


class PixelRangeWarning(UserWarning):
    """Many pixels of an image lie outside the range that build saw, so that its result may mean nothing."""


class ServiceError(UnetRtError):
    """A request that the service does not take, or cannot answer; ``status`` is the number that HTTP has for it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def first_line(error: BaseException) -> str:
    """What another library said, short enough to stand in a sentence; the kind of the error where it said nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def size_text(shape: Iterable[int | None]) -> str:
    """A size along several axes, for people: ``512x512``; ``?`` where it is free."""
    return "x".join("?" if n is None else str(n) for n in shape)
