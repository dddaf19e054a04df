"""The service as an application of ASGI: ``make_app`` for a server of one's own, ``unet-rt serve`` for everybody else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ..errors import ServiceError
from .guard import Guard
from .pool import Pool
from .protocol import Protocol
from .replies import error_reply
from .service import STATIC, Service
from .settings import Settings


def make_app(settings: Settings, pool: Pool | None = None) -> Starlette:
    """The service for a server of ASGI (uvicorn, hypercorn), or to be mounted in an application of one's own.

    Its processes start with the application and end with it. Serve it from one process: the queue is in it.

    Args:
        settings: Engines, limits, token, roots.
        pool: Processes that compute, where they are to be started beforehand.

    Raises:
        EngineError: A folder is no engine.
    """
    service = Service(settings, pool or Pool(settings))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service.pool:
            yield

    app = Starlette(
        routes=_routes(service),
        lifespan=lifespan,
        middleware=[Middleware(Guard, token=settings.token, hosts=settings.hosts)],
        exception_handlers={HTTPException: _http_error},
    )
    app.state.service = service
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    way_out = "see /openapi.json for what there is"
    failed = ServiceError(error.status_code, f"{request.method} {request.url.path}: {error.detail}; {way_out}")
    return error_reply(failed, error.headers)


def _routes(service: Service) -> list[Route | Mount]:
    answered = service.answered
    tile = "/v1/views/{key}/{picture}/{level:int}/{column:int}_{row:int}.png"
    return [
        Route("/", service.page),
        Route("/health", service.health),
        Route("/metrics", service.show_metrics),
        Route("/openapi.json", service.show_openapi),
        Route("/v1/engines", service.list_engines),
        Route("/v1/predict/{name}", answered("predict", service.predict), methods=["POST"]),
        Route("/v1/views/{key}/{file}", answered("view", service.view)),
        Route(tile, answered("tile", service.tile)),
        *Protocol(service).routes(),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
