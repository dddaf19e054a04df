"""Who may ask: a token, and without one only this machine's own pages and programs."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import ServiceError
from .replies import error_reply

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN = ("/health", "/v2/health/live", "/v2/health/ready", "/openapi.json", "/")  # with a token, too: they say nothing


class Guard:
    """Lets requests through that may be there, and answers the others."""

    def __init__(self, app: ASGIApp, token: str | None, hosts: tuple[str, ...]) -> None:
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
        await error_reply(refusal, headers)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ServiceError | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        path = scope["path"]
        if self._token is not None:
            if path in OPEN or path.startswith("/static/"):
                return None
            given = headers.get(b"authorization", b"")
            if hmac.compare_digest(given, b"Bearer " + self._token.encode()):
                return None
            fact = "the token is wrong" if given else "no token was given"
            return ServiceError(401, f"{fact}; send the header Authorization: Bearer TOKEN with the operator's token")
        # A page from elsewhere, open in a browser on this machine, reaches what listens here, but cannot lie in these.
        host = _host(b"//" + headers.get(b"host", b""))
        if self._hosts and host not in self._hosts:
            return ServiceError(403, f"this service is not called {host!r}; use {self._hosts[0]}")
        origin = headers.get(b"origin")
        if origin is not None and _host(origin) != host:
            return ServiceError(
                403, f"pages of {origin.decode('latin-1')} may not use this service; start it with --token"
            )
        return None


def _host(url: bytes) -> Any:
    try:
        return urlsplit(url.decode("latin-1")).hostname
    except ValueError:
        return None
