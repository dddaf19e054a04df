"""The command line. The only package that prints; every verb is one file, whose functions call the library.

Exit codes: 0 good, 1 the answer is no (parity failed, budget missed), 2 wrong use, 130 interrupted, 143 terminated.
With ``--json``, stdout holds one JSON document whatever happens: the result, or ``{"error": {"type", "message"}}``.

Little is imported before :func:`main` runs: what interrupts an import cannot be answered.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .process import Interrupted, Signals, drop_stdout, usable_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    program = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    signals = Signals()
    try:
        signals.catch()
        with usable_streams():
            try:
                code = _run(argv, program=program)
            except SystemExit:  # of --help and --version
                raise
            except BaseException as error:
                signals.ignore()  # cleaning up and saying so is not interrupted again
                return _fail(argv, error, signals)
            signals.ignore()
            return code if signals.number is None else _fail(argv, Interrupted(), signals)
    except Interrupted:  # before the streams were there
        return signals.code
    finally:
        signals.release()


def _run(argv: list[str], *, program: bool) -> int:
    from .parser import make_parser

    parser = make_parser()
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    args.argv = argv
    if program and not args.debug:
        _silence_libraries()
    code = int(args.run(args) or 0)
    sys.stdout.flush()
    return code


def _silence_libraries() -> None:
    """Keeps warnings and logs of other libraries from people who cannot act on them; ours go to stderr."""
    import logging
    import warnings

    if not sys.warnoptions:  # nor PYTHONWARNINGS: who asks for them gets them
        warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())
    ours = logging.StreamHandler()
    ours.setFormatter(logging.Formatter("unet-rt: %(message)s"))
    logging.getLogger("unet_rt").addHandler(ours)


def _fail(argv: list[str], error: BaseException, signals: Signals) -> int:
    """Says what went wrong: one line on stderr, with --json a document on stdout as well. Returns the exit code."""
    from ..system.durable import remove_unfinished
    from .printing import clear_line, print_json

    if signals.number is not None:
        remove_unfinished()
        error = error if isinstance(error, Interrupted) else Interrupted().with_traceback(error.__traceback__)
    elif isinstance(error, BrokenPipeError):
        drop_stdout()  # whoever read it has gone, which is no news to them
        return 141
    if "--debug" in argv:
        import traceback

        traceback.print_exception(error)
    clear_line()
    kind, text, code = _described(error, signals)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # of a file: no terminal is to obey it
    print(f"unet-rt: {text}", file=sys.stderr)
    try:
        if "--json" in argv:
            print_json({"error": {"type": kind, "message": text}})
        else:
            sys.stdout.flush()
    except OSError:  # stdout itself is what fails
        drop_stdout()
    return code


def _described(error: BaseException, signals: Signals) -> tuple[str, str, int]:
    """(its type, the line about it, exit code) of an error."""
    from ..errors import ParityError, UnetRtError

    kind, text = type(error).__name__, " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Interrupted | KeyboardInterrupt):
        kind = "Terminated" if signals.code == 143 else "Interrupted"
        return kind, f"{kind.lower()}; no half-written output is left", signals.code
    if isinstance(error, UnetRtError):
        return kind, text, 1 if isinstance(error, ParityError) else 2
    if isinstance(error, MemoryError):
        return kind, f"out of memory ({text}); use a smaller --tile or --batch", 2
    if isinstance(error, OSError):
        return kind, _about_file(error, text), 2
    # A defect of ours: say so in one line, and how to see more.
    return kind, f"internal error, please report it with the output of --debug: {text}", 2


def _about_file(error: OSError, text: str) -> str:
    import errno

    text = f"{error.filename or 'a file'}: {error.strerror or text}"
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        import tempfile

        try:
            folder = tempfile.gettempdir()
        except OSError:
            return f"{text}; there is no folder for temporary files, TMPDIR names one"
        text += f"; free some space (temporary files are in {folder}; TMPDIR names another place)"
    return text
