"""Names of files as callers give them."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UnetRtError


def path_of(name: str | os.PathLike[str], error: type[UnetRtError]) -> Path:
    """``name`` as a path; ``error`` where no file can have it, which the system would answer with a ValueError."""
    if "\0" in os.fspath(name):
        raise error(f"{os.fspath(name)!r} holds a character that no file name has; check the name")
    return Path(name)
