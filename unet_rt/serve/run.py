"""A service from start to end: its processes, a socket, a server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace

from ..errors import ServiceError
from .settings import Settings, check_exposure


def serve(settings: Settings, host: str, port: int, *, ready: Callable[[str], None]) -> None:
    """Serves until the process is told to stop (SIGINT, SIGTERM).

    Args:
        settings: Engines, limits, token, roots.
        host: Address to listen at.
        port: 0: any that is free.
        ready: Called with the service's URL when it answers.

    Raises:
        ServiceError: The extra ``serve`` is missing, the address is taken, or would be open to anybody.
        EngineError, ParityError, BackendError: An engine cannot be loaded.
    """
    try:
        import prometheus_client  # noqa: F401 - asked for before anything is started
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ServiceError(500, f"{error.name} is missing; pip install 'unet-rt[serve]'") from error
    check_exposure(host, settings.token)
    if settings.token is None:
        settings = replace(settings, hosts=tuple(dict.fromkeys((host, "localhost", "127.0.0.1", "::1"))))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ServiceError(
            500, f"{host} port {port} cannot be used ({error.strerror}); choose another --port"
        ) from error
    with listener:
        name = f"[{host}]" if ":" in host else host
        asyncio.run(_serve(settings, listener, lambda: ready(f"http://{name}:{listener.getsockname()[1]}")))


async def _serve(settings: Settings, listener: socket.socket, ready: Callable[[], None]) -> None:
    import uvicorn

    from .app import make_app
    from .pool import Pool

    async with Pool(settings) as pool:
        config = uvicorn.Config(
            make_app(settings, pool),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=10,
            lifespan="off",
        )
        ready()
        await uvicorn.Server(config).serve(sockets=[listener])
