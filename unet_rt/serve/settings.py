"""What an operator says of a service: engines, who may ask, what may be read and written, how much of everything."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import EngineError, ServiceError


@dataclass(frozen=True)
class Settings:
    """What a service is started with.

    Attributes:
        engines: Engine folders by the name that requests call them.
        roots: Folders, or prefixes of URLs, that references and outputs may lie in. Empty: neither is taken.
        token: What requests must carry (``Authorization: Bearer TOKEN``); None: nothing.
        workers: Processes that compute; each holds every engine.
        threads: Threads of each; 0: an equal share of those that this process may use.
        max_bytes: Of a request's body.
        max_px: Pixels of an image, all planes.
        seconds: From a request's arrival to its answer.
        queue: Requests that may be there at a time, waiting ones included.
        views: Results that are kept for the page.
        hosts: Names of this server that a request may call it by where there is no token; empty: any.
    """

    engines: Mapping[str, Path]
    roots: tuple[str, ...] = ()
    token: str | None = None
    workers: int = 1
    threads: int = 0
    max_bytes: int = 2**31
    max_px: int = 2**30
    seconds: float = 600.0
    queue: int = 64
    views: int = 8
    hosts: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("queue", 1), ("views", 1), ("max_bytes", 1), ("max_px", 1)):
            if getattr(self, name) < least:
                raise ServiceError(400, f"{name} {getattr(self, name)} is too few; use {least} or more")
        if not self.seconds > 0:
            raise ServiceError(400, f"a time limit of {self.seconds} s answers nothing; use more than 0")
        if self.token is not None and (len(self.token) < 8 or not self.token.isascii() or not self.token.isprintable()):
            raise ServiceError(400, "the token must be 8 printable ASCII characters or more; e.g. openssl rand -hex 16")


def name_engines(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Engine folders by name: that of the folder, without ``.urt``.

    Raises:
        EngineError: Two of the same name.
    """
    named: dict[str, Path] = {}
    for folder in folders:
        path = Path(folder)
        name = path.resolve().name.removesuffix(".urt")
        if name in named:
            raise EngineError(f"{named[name]} and {path} would both be called {name}; rename one of the folders")
        named[name] = path
    return named


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, token: str | None) -> None:
    """ServiceError where a service without a token could be reached from other machines."""
    if token is None and not is_loopback(host):
        raise ServiceError(
            400, f"{host} is reached from other machines, and nobody is asked for a token; pass --token as well"
        )
