"""Options that verbs share, and how their words are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, ContractError

if TYPE_CHECKING:
    from ..contract.contract import Contract
    from ..engine.budget import Budget
    from ..models.state import Opened


def add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str, subject: str = ""
) -> argparse.ArgumentParser:
    """The parser of one verb, with the options that all of them have; ``run`` returns the exit code."""
    # What a verb works on comes first: options that take several values would swallow it.
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text, usage=f"unet-rt {name} {subject}[options]".rstrip()
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout; everything else on stderr")
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    parser.set_defaults(run=run)
    return parser


def add_threads(p: argparse.ArgumentParser) -> None:
    """The option of how many threads may run."""
    p.add_argument("--threads", type=int, default=0, metavar="N", help="default: as many as this process may use")


def add_overwrite(p: argparse.ArgumentParser) -> None:
    """The option that lets a verb replace what is there."""
    p.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_reading(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options of how images are read; the group, for a verb that has more of them."""
    group = p.add_argument_group("how images are read")
    group.add_argument("--axes", metavar="TCZYX", help="axes of the images, where files do not say")
    group.add_argument(
        "--channels",
        metavar="0,2|NAME,..|luma|slices",
        help="channels in the network's order; slices: neighbouring slices of a stack, for a network that takes those",
    )
    return group


def add_scope(group: argparse._ActionsContainer) -> None:
    """The option of what a normalisation's statistics are taken over."""
    group.add_argument(
        "--normalize-scope", choices=("image", "channel", "slice"), help="what statistics are taken over"
    )


def add_contract(p: argparse.ArgumentParser) -> None:
    """The options of the input contract, and of how images are read."""
    add_reading(p)
    group = p.add_argument_group(
        "the input contract (options win over --contract, which wins over the model's metadata)"
    )
    group.add_argument("--contract", metavar="FILE.json", help="the contract as a file; see the manual")
    group.add_argument(
        "--normalize",
        metavar="HOW",
        help="none | scale=255 | dtype | minmax | percentile=1,99.8 | zscore | imagenet | mean=..;std=..;scale=..;clip=..",
    )
    add_scope(group)
    group.add_argument(
        "--task",
        choices=("auto", "binary", "multiclass", "multilabel", "regression"),
        default="auto",
        help="what the output means",
    )
    group.add_argument(
        "--output-is", choices=("auto", "logits", "probabilities"), default="auto", help="what the network returns"
    )
    group.add_argument(
        "--threshold", metavar="0.5[,..]", help="probability above which a pixel is on, or one per class"
    )
    group.add_argument("--classes", metavar="NAME,..", help="names of the classes, in order")
    group.add_argument(
        "--border", choices=("mirror", "edge", "constant", "zero"), help="how images go on beyond their edges"
    )
    group.add_argument(
        "--pixel-size", type=parse_lengths, default=(), metavar="UM[,UM]", help="of training, in micrometres"
    )


def parse_size(text: str) -> tuple[int, ...] | None:
    """Pixels per axis, of 512x512; None for auto."""
    if text == "auto":
        return None
    try:
        shape = tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512x512") from None
    if any(n < 1 for n in shape):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are 1 or more")
    return shape


def parse_side(text: str) -> int:
    """Pixels of the side of a square, of a number from 64 to 20000."""
    if not text.isdecimal() or not 64 <= int(text) <= 20000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels from 64 to 20000")
    return int(text)


def parse_count(text: str) -> int:
    """A number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def parse_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, of 0,255."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers such as 0,255") from None


def parse_lengths(text: str) -> tuple[float, ...]:
    """Micrometres along the image's axes, of 0.5,0.5."""
    try:
        lengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or not all(0 < n < float("inf") for n in lengths):
        raise argparse.ArgumentTypeError(f"{text!r} is not micrometres along the image's axes, such as 0.5,0.5")
    return lengths


def parse_memory(text: str) -> int:
    """Bytes, of 4GB or 800MB."""
    number = text.upper().removesuffix("B").rstrip("KMGT")
    unit = text.upper().removesuffix("B")[len(number) :]
    try:
        size = int(float(number) * 1000 ** ("", "K", "M", "G", "T").index(unit))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory such as 4GB or 800MB") from None
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: some memory is needed")
    return size


def parse_shard(text: str) -> tuple[int, int]:
    """Number of a shard and how many there are, of 0/8."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard such as 0/8 (the first of eight) to 7/8")
    return int(index), int(count)


def read_channels(args: argparse.Namespace) -> Any:
    """The channels that --channels names; None where it is not passed."""
    if args.channels is None:
        return None
    from ..images.axes import parse_channels

    return parse_channels(args.channels)


def read_contract(args: argparse.Namespace) -> Contract:
    """The contract of a verb's options, over that of --contract."""
    from ..contract.contract import Contract, Normalization
    from ..contract.words import parse_normalization

    normalization: Normalization | None = None
    if args.normalize is not None:
        normalization = parse_normalization(args.normalize, args.normalize_scope)
    elif args.normalize_scope is not None:
        raise ContractError("--normalize-scope says what statistics are taken over; pass --normalize as well")
    threshold: tuple[float, ...] = ()
    if args.threshold is not None:
        try:
            threshold = tuple(float(part) for part in args.threshold.split(","))
        except ValueError:
            raise ContractError(f"--threshold {args.threshold!r} is not numbers such as 0.5") from None
    found = Contract(
        normalization=normalization,
        task=None if args.task == "auto" else args.task,
        output_is=None if args.output_is == "auto" else args.output_is,
        threshold=threshold,
        classes=tuple(args.classes.split(",")) if args.classes else (),
        pixel_size_um=args.pixel_size,
    )
    if args.border:
        from dataclasses import replace  # takes milliseconds to import, which --help would pay, too

        found = replace(found, border=args.border)
    if args.contract is not None:
        from ..contract.json import contract_from_file

        found = found.over(contract_from_file(Path(args.contract)))
    return found


def read_budget(args: argparse.Namespace) -> Budget | None:
    """The budget of --budget KEY=VALUE; None where it is not passed."""
    from ..engine.budget import parse_budget

    return parse_budget(args.budget)


def open_checkpoint(args: argparse.Namespace) -> Opened:
    """The module of --checkpoint, as --architecture, --module and --arguments say."""
    import json

    require_torch("runs the module", "torch")
    from ..models.source import open_module

    try:
        arguments = json.loads(args.arguments) if args.arguments else None
    except json.JSONDecodeError as error:
        raise ContractError(
            f"--arguments {args.arguments!r} is not JSON ({error}); use e.g. '{{\"classes\": 3}}'"
        ) from error
    return open_module(Path(args.checkpoint), architecture=args.architecture, factory=args.module, arguments=arguments)


def require_torch(what: str, extra: str) -> None:
    """Raises BackendError where torch is missing, which does ``what`` and comes with the extra of that name."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise BackendError(f"torch is missing, which {what}; pip install 'unet-rt[{extra}]'")
