"""What the service does with a request: read it, have it computed, answer."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .._version import __version__
from ..engine.folder import EngineFolder, read_folder
from ..errors import ServiceError, UnetRtError
from ..images.formats import NPY_MAGIC, TIFF_MAGIC
from .failures import status_of, text_of
from .job import MEDIA, Job, Options, read_options
from .metrics import Metrics
from .openapi import openapi
from .pool import Pool, QueueFull
from .replies import engine_record, error_reply
from .roots import find_reference, find_target
from .settings import Settings
from .views import Views

STATIC = Path(__file__).parent / "static"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_TENSOR_BYTES = 2**28  # of one request to the raw network, which lies in memory
Handler = Callable[[Request], Awaitable[Response]]


class SentOnce(FileResponse):
    """A file that is sent, and what was kept for it given back, whoever leaves in between."""

    def __init__(self, path: Path, release: Callable[[], None], **options: Any) -> None:
        super().__init__(path, **options)
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


class Service:
    """What the routes share: settings, processes, counters, results kept for the page."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self.settings, self.pool = settings, pool
        self.folders: dict[str, EngineFolder] = {name: read_folder(path) for name, path in settings.engines.items()}
        self.metrics = Metrics(pool)
        self.views = Views(settings.views)

    def answered(self, what: str, handler: Handler) -> Handler:
        """A handler whose errors are answers, and which is counted."""

        async def handle(request: Request) -> Response:
            begun = time.perf_counter()
            try:
                reply = await handler(request)
            except QueueFull as error:
                reply = error_reply(error, {"Retry-After": str(error.seconds)})
            except ServiceError as error:
                reply = error_reply(error)
            except ClientDisconnect:
                reply = Response(status_code=499)
            except (UnetRtError, OSError, MemoryError) as error:
                reply = error_reply(ServiceError(status_of(error), text_of(error)))
            self.metrics.count(what, reply.status_code, time.perf_counter() - begun)
            return reply

        return handle

    # --- what is always there -----------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return FileResponse(
            STATIC / "index.html",
            headers={
                "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'"
            },
        )

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": __version__, "inside": self.pool.inside})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def show_openapi(self, request: Request) -> Response:
        return JSONResponse(openapi(sorted(self.settings.engines)))

    async def list_engines(self, request: Request) -> Response:
        return JSONResponse([self.record(name) for name in self.folders])

    def record(self, name: str) -> dict[str, Any]:
        """What is said of an engine.

        Raises:
            ServiceError: 404 where there is none of that name.
        """
        if name not in self.folders:
            known = ", ".join(sorted(self.folders))
            raise ServiceError(404, f"there is no engine {name!r}; there are {known}")
        folder = self.folders[name]
        return engine_record(name, folder.spec, folder.parity, self.pool.versions.get(name, ""))

    # --- predictions --------------------------------------------------------------------------------------------------

    async def predict(self, request: Request) -> Response:
        """One image in, its result out."""
        name = request.path_params["name"]
        self.record(name)
        options = self._allowed(read_options(request.query_params, request.headers.get("accept", "")))
        with ExitStack() as stack:
            folder = stack.enter_context(self.pool.place())
            async with self.time_limit():
                image = options.reference or str(await self.receive(request, folder))
                answer = await self.while_there(
                    request, self.pool.run(Job("predict", name, str(folder), image, options))
                )
            report = answer["report"]
            self.metrics.count_pixels(name, report["mpx"])
            headers = {"Unet-Rt-Report": json.dumps(report, ensure_ascii=True)}
            if options.out:
                return JSONResponse({"engine": name, "out": options.out, "report": report})
            if options.format == "view":
                key = self.views.keep(folder)
                return JSONResponse(
                    {"view": key, **json.loads((self.views.folder(key) / "answer.json").read_text("utf-8"))}
                )
            return SentOnce(
                Path(answer["file"]), stack.pop_all().close, media_type=MEDIA[options.format], headers=headers
            )

    def _allowed(self, options: Options) -> Options:
        """The options, with paths that lie below the allowed roots in full."""
        roots = self.settings.roots
        if options.reference:
            options = replace(options, reference=find_reference(options.reference, roots))
        if options.out:
            options = replace(options, out=str(find_target(options.out, roots)))
        return options

    async def receive(self, request: Request, folder: Path) -> Path:
        """The body in a file, whose first bytes say what it is.

        Raises:
            ServiceError: 413 for too many bytes, 415 for anything but PNG, TIFF and npy, 400 for none.
        """
        limit, got, path = self.settings.max_bytes, 0, folder / "image"
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise _too_long(int(declared), limit)
        suffix = ""
        async with await anyio.open_file(path, "wb") as stream:
            async for chunk in request.stream():
                if chunk and not got:
                    suffix = _suffix(chunk)
                got += len(chunk)
                if got > limit:
                    raise _too_long(got, limit)
                await stream.write(chunk)
        if not got:
            raise ServiceError(400, "the body is empty; send an image (PNG, TIFF, npy), or name one with reference=")
        return path.rename(path.with_suffix(suffix))

    async def read_body(self, request: Request) -> bytes:
        """The whole body, in memory: tensors.

        Raises:
            ServiceError: 413 for too many bytes.
        """
        parts, got, limit = list[bytes](), 0, min(self.settings.max_bytes, MAX_TENSOR_BYTES)
        async for chunk in request.stream():
            parts.append(chunk)
            got += len(chunk)
            if got > limit:
                raise _too_long(got, limit)
        return b"".join(parts)

    @asynccontextmanager
    async def time_limit(self) -> AsyncIterator[None]:
        """Ends what takes longer than a request may, with 504."""
        seconds = self.settings.seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            text = f"there was no result in {seconds:g} s; send a smaller image, or ask the operator for a longer --timeout"
            raise ServiceError(504, text) from None

    async def while_there(self, request: Request, work: Any) -> Any:
        """What ``work`` returns, unless the client leaves: then the work is cancelled."""
        job = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_wait_until_gone(request))
        try:
            await asyncio.wait([job, gone], return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                raise ClientDisconnect
            return job.result()
        finally:
            for task in (job, gone):
                task.cancel()
            await asyncio.gather(job, gone, return_exceptions=True)

    # --- results kept for the page ------------------------------------------------------------------------------------

    async def view(self, request: Request) -> Response:
        """A file of a result that the page shows."""
        return FileResponse(self.views.file(request.path_params["key"], request.path_params["file"]))

    async def tile(self, request: Request) -> Response:
        """One tile of a picture or mask that the page shows."""
        at, labels = request.path_params, request.query_params.get("labels")
        if labels is not None and re.fullmatch(r"(\d{1,3}(,\d{1,3})*)?", labels) is None:
            raise ServiceError(400, f"labels={labels[:40]} are no labels; send integers by comma")
        shown = None if labels is None else {int(label) for label in labels.split(",") if label}
        data = await asyncio.to_thread(
            self.views.tile, at["key"], at["picture"], at["level"], (at["column"], at["row"]), shown
        )
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=600"})


def _suffix(head: bytes) -> str:
    if head.startswith(PNG_MAGIC):
        return ".png"
    if head[:4] in TIFF_MAGIC:
        return ".tif"
    if head.startswith(NPY_MAGIC):
        return ".npy"
    raise ServiceError(415, f"the body begins with {head[:8]!r}, which is no PNG, TIFF or npy; send one of these")


def _too_long(size: int, limit: int) -> ServiceError:
    return ServiceError(
        413, f"the body has {size:,} bytes or more, and {limit:,} are taken; use reference= for large files"
    )


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
