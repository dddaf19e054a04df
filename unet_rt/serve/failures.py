"""Errors as answers: the status of HTTP, the kind, and one sentence with fact, value and way out."""

from __future__ import annotations

import errno
from typing import Any

from ..errors import EngineError, OutputError, ParityError, ServiceError, UnetRtError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def failure(error: BaseException) -> dict[str, Any]:
    """An error as an answer: its status, kind and sentence."""
    return {"error": {"type": type(error).__name__, "message": text_of(error)}, "status": status_of(error)}


def text_of(error: BaseException) -> str:
    """The sentence of an error: fact, value, way out."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnetRtError):
        return text
    if isinstance(error, MemoryError):
        return f"out of memory ({text}); send a smaller image, or ask the operator for fewer workers"
    if isinstance(error, OSError):
        return f"{error.strerror or text}; ask the operator to look at the service's disk"
    return f"internal error, please report it: {type(error).__name__}: {text}"


def status_of(error: BaseException) -> int:
    """The status of HTTP for an error."""
    if isinstance(error, ServiceError):
        return error.status
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return 507
        cause = cause.__cause__
    if isinstance(error, MemoryError):
        return 503
    if isinstance(error, EngineError | ParityError) or not isinstance(error, UnetRtError):
        return 500
    return 409 if isinstance(error, OutputError) else 422
