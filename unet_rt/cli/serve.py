"""The verb serve."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_threads, add_verb, parse_memory
from .printing import print_json, text_stream


def add_serve(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(verbs, "serve", _serve, "answer over HTTP: an image in, a mask out; with a page", "ENGINE ... ")
    p.add_argument("engines", metavar="ENGINE", nargs="+", help="engine folders; requests name them without .urt")
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: this machine alone, 127.0.0.1")
    p.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0: any that is free")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes that compute (default: 1)")
    p.add_argument("--token", metavar="TEXT", help="what requests must carry; required beyond this machine")
    p.add_argument(
        "--allow-root",
        action="append",
        default=[],
        metavar="DIR|URL",
        help="references and outputs may lie below it; may be given several times",
    )
    add_threads(p)
    limits = p.add_argument_group("limits of a request")
    limits.add_argument("--max-body", type=parse_memory, default=2**31, metavar="2GB", help="bytes of a body")
    limits.add_argument("--max-pixels", type=int, default=2**30, metavar="N", help="pixels of an image (default: 2^30)")
    limits.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds to its answer (default: 600)"
    )
    limits.add_argument("--queue", type=int, default=64, metavar="N", help="requests at a time (default: 64)")


def _serve(args: argparse.Namespace) -> int:
    from ..serve.run import serve
    from ..serve.settings import Settings, name_engines

    engines = name_engines(args.engines)
    settings = Settings(
        engines,
        tuple(args.allow_root),
        args.token,
        workers=args.workers,
        threads=args.threads,
        max_bytes=args.max_body,
        max_px=args.max_pixels,
        seconds=args.timeout,
        queue=args.queue,
    )

    def ready(url: str) -> None:
        if args.json:
            print_json({"url": url, "engines": list(engines)})
        print(f"serving {', '.join(engines)} at {url}", file=text_stream(args), flush=True)

    serve(settings, args.host, args.port, ready=ready)
    return 0
