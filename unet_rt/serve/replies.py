"""Answers on their way out: errors as JSON, and files whose folder goes when they are sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ServiceError

if TYPE_CHECKING:
    from starlette.responses import JSONResponse


def error_reply(error: ServiceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The one form of an error: ``{"error": {"type", "message"}}``, as ``unet-rt --json`` prints it."""
    from starlette.responses import JSONResponse

    kind = getattr(error, "kind", type(error).__name__)
    return JSONResponse({"error": {"type": kind, "message": str(error)}}, error.status, dict(headers or {}))


def engine_record(name: str, spec: Any, parity: Mapping[str, Any] | None, version: str) -> dict[str, Any]:
    """What is said of an engine: where and how it runs, its tile, contract and record of parity."""
    return {
        "name": name,
        "backend": spec.backend,
        "library": version,
        "precision": spec.precision,
        "device": spec.device,
        "tile": list(spec.tile),
        "exact": spec.exact,
        "halo": spec.halo,
        "contract": spec.contract.to_json(),
        "parity": parity,
    }
