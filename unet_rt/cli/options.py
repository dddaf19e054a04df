"""Options that verbs share, and how their words are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ContractError

if TYPE_CHECKING:
    from ..contract.contract import Contract
    from ..engine.budget import Budget


def verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str, subject: str = ""
) -> argparse.ArgumentParser:
    # What a verb works on comes first: options that take several values would swallow it.
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text, usage=f"unet-rt {name} {subject}[options]".rstrip()
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout; everything else on stderr")
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    parser.set_defaults(run=run)
    return parser


def threads_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--threads", type=int, default=0, metavar="N", help="default: as many as this process may use")


def overwrite_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--overwrite", action="store_true", help="replace what is there")


def reading_options(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = p.add_argument_group("how images are read")
    group.add_argument("--axes", metavar="TCZYX", help="axes of the images, where files do not say")
    group.add_argument("--channels", metavar="0,2|NAME,..|luma", help="channels in the network's order")
    return group


def scope_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--normalize-scope", choices=("image", "channel", "slice"), help="what statistics are taken over"
    )


def contract_options(p: argparse.ArgumentParser) -> None:
    reading_options(p)
    group = p.add_argument_group(
        "the input contract (options win over --contract, which wins over the model's metadata)"
    )
    group.add_argument("--contract", metavar="FILE.json", help="the contract as a file; see the manual")
    group.add_argument(
        "--normalize",
        metavar="HOW",
        help="none | scale=255 | dtype | minmax | percentile=1,99.8 | zscore | imagenet | mean=..;std=..;scale=..;clip=..",
    )
    scope_option(group)
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
    group.add_argument("--border", choices=("mirror", "edge", "constant"), help="how images go on beyond their edges")
    group.add_argument("--pixel-size", type=_lengths, default=(), metavar="UM[,UM]", help="of training, in micrometres")


def _shape(text: str) -> tuple[int, ...] | None:
    if text == "auto":
        return None
    try:
        shape = tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512x512") from None
    if any(n < 1 for n in shape):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are 1 or more")
    return shape


def side(text: str) -> int:
    if not text.isdecimal() or not 64 <= int(text) <= 20000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels from 64 to 20000")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers such as 0,255") from None


def _lengths(text: str) -> tuple[float, ...]:
    try:
        lengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or not all(0 < n < float("inf") for n in lengths):
        raise argparse.ArgumentTypeError(f"{text!r} is not micrometres along the image's axes, such as 0.5,0.5")
    return lengths


def memory(text: str) -> int:
    number = text.upper().removesuffix("B").rstrip("KMGT")
    unit = text.upper().removesuffix("B")[len(number) :]
    try:
        size = int(float(number) * 1000 ** ("", "K", "M", "G", "T").index(unit))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory such as 4GB or 800MB") from None
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: some memory is needed")
    return size


def shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard such as 0/8 (the first of eight) to 7/8")
    return int(index), int(count)


def channels(args: argparse.Namespace) -> Any:
    if args.channels is None:
        return None
    from ..images.axes import parse_channels

    return parse_channels(args.channels)


def _contract(args: argparse.Namespace) -> Contract:
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
        found = replace(found, border=args.border)
    if args.contract is not None:
        from ..contract.json import contract_from_file

        found = found.over(contract_from_file(Path(args.contract)))
    return found


def budget(args: argparse.Namespace) -> Budget | None:
    from ..engine.budget import Budget

    if not args.budget:
        return None
    values: dict[str, Any] = {}
    for part in args.budget:
        key, _, text = part.partition("=")
        try:
            values[key] = int(text) if key == "class_px" else float(text)
        except ValueError:
            raise ContractError(f"--budget {part!r} is not KEY=NUMBER; pass e.g. --budget label_change=1e-3") from None
    known = set(Budget.__dataclass_fields__)
    if set(values) - known:
        raise ContractError(f"--budget knows {', '.join(sorted(known))}, not {', '.join(sorted(set(values) - known))}")
    return Budget(**values)
