"""The parser of the whole command line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .._version import __version__
from ..errors import UnetRtError
from .bench import add_bench
from .build import add_build
from .demo import add_demo
from .doctor import add_doctor
from .export import add_export
from .inspect import add_inspect
from .pack import add_pack
from .predict import add_predict
from .serve import add_serve
from .train import add_train
from .unpack import add_unpack
from .verify import add_verify


class UsageError(UnetRtError):
    """Options that argparse refuses."""


class _Parser(argparse.ArgumentParser):
    """Refuses in one line; the usage of ``build`` alone would be sixteen."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise UsageError(f"{message}; {usage}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, every verb and option in it."""
    parser = _Parser(
        prog="unet-rt",
        description="Run trained U-Nets on images of any size, exactly.",
        epilog="Start with: unet-rt inspect model.onnx. unet-rt VERB --help lists a verb's options. "
        "Exit codes: 0 good, 1 the answer is no, 2 wrong use.",
    )
    parser.add_argument("--version", action="version", version=f"unet-rt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for add in (
        add_inspect,
        add_build,
        add_predict,
        add_verify,
        add_bench,
        add_serve,
        add_pack,
        add_unpack,
        add_train,
        add_export,
        add_doctor,
        add_demo,
    ):
        add(verbs)
    return parser
