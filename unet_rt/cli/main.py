"""The command line. The only package that prints; every verb is one file, whose functions call the library.

Exit codes: 0 good, 1 the answer is no (parity failed, budget missed), 2 wrong use, 130 interrupted, 143 terminated.
With ``--json``, stdout holds one JSON document whatever happens: the result, or ``{"error": {"type", "message"}}``.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from .._version import __version__
from ..errors import ParityError, UnetRtError
from ..system.durable import remove_unfinished
from .bench import add_bench
from .build import add_build
from .demo import add_demo
from .doctor import add_doctor
from .export import add_export
from .inspect import add_inspect
from .pack import add_pack
from .predict import add_predict
from .printing import clear_line, print_json
from .serve import add_serve
from .train import add_train
from .unpack import add_unpack
from .verify import add_verify


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    program = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # file names of any script, on terminals of one
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = make_parser()
    try:
        args = parser.parse_args(argv)
    except _UsageError as error:
        return _fail(argparse.Namespace(json="--json" in argv), error, 2)
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    args.argv = argv
    if program and not args.debug:
        _silence_libraries()
    try:
        with _terminable():
            code = int(args.run(args) or 0)
            if sys.stdout is not None:  # None: started without one
                sys.stdout.flush()
            return code
    except ParityError as error:
        return _fail(args, error, 1)
    except UnetRtError as error:
        return _fail(args, error, 2)
    except (KeyboardInterrupt, _Terminated) as error:
        remove_unfinished()
        code = 130 if isinstance(error, KeyboardInterrupt) else 143
        return _fail(args, error, code, "interrupted; " if code == 130 else "terminated; ")
    except BrokenPipeError:
        _drop_stdout()  # whoever read it has gone, which is no news to them
        return 141
    except (MemoryError, OSError) as error:
        return _fail(args, error, 2)
    except Exception as error:  # a defect of ours: say so in one line, and how to see more
        return _fail(args, error, 2, "internal error, please report it with the output of --debug: ")


def _silence_libraries() -> None:
    """Keeps warnings and logs of other libraries from people who cannot act on them; ours go to stderr."""
    import logging

    if not sys.warnoptions:  # nor PYTHONWARNINGS: who asks for them gets them
        warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())
    ours = logging.StreamHandler()
    ours.setFormatter(logging.Formatter("unet-rt: %(message)s"))
    logging.getLogger("unet_rt").addHandler(ours)


def _drop_stdout() -> None:
    """Lets what is left in stdout's buffer go nowhere, so that Python's exit does not fail on it again."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _UsageError(UnetRtError):
    """Options that argparse refuses."""


class _Terminated(BaseException):
    """SIGTERM."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that every output that is open is removed."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread of the process, where signals are not ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(args: argparse.Namespace, error: BaseException, code: int, prefix: str = "") -> int:
    """Says what went wrong: one line on stderr, with --json a document on stdout as well."""
    if getattr(args, "debug", False):
        traceback.print_exception(error)
    clear_line()
    kind, text = type(error).__name__, " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"out of memory ({text}); use a smaller --tile or --batch"
    elif isinstance(error, KeyboardInterrupt | _Terminated):
        kind, text = prefix[: -len("; ")].capitalize(), "no half-written output is left"
    elif isinstance(error, OSError):
        text = f"{error.filename or 'a file'}: {error.strerror or text}"
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            text += f"; free some space (temporary files are in {tempfile.gettempdir()}; TMPDIR names another place)"
    print(f"unet-rt: {prefix}{text}", file=sys.stderr)
    try:
        if args.json:
            print_json({"error": {"type": kind.strip("_"), "message": prefix + text}})
        elif sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # stdout itself is what fails
        _drop_stdout()
    return code


# --- arguments ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Refuses in one line; the usage of ``build`` alone would be sixteen."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise _UsageError(f"{message}; {usage}; see {self.prog} --help")


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
