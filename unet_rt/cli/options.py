"""Options that verbs share, and how their words are read."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, ContractError, IncompleteContractError

if TYPE_CHECKING:
    from functools import partial

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


def add_module(p: argparse.ArgumentParser) -> None:
    """The options of how a state dict becomes a module; :func:`checkpoint_opener` reads them."""
    p.add_argument("--architecture", metavar="NAME=VALUE,..|FILE", help="of a state dict: network=UNet,width=64,..")
    p.add_argument(
        "--module",
        metavar="FILE.py:NAME|MODULE:NAME",
        help="of a state dict: your class or function that makes the module",
    )
    p.add_argument("--arguments", metavar="JSON", help="of that class or function, e.g. '{\"classes\": 3}'")


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


def add_choices(group: argparse._ArgumentGroup) -> None:
    """The options of which of a file's images is read, and which of its pixels are none."""
    group.add_argument("--series", metavar="N|NAME", help="of files that hold several images: number, from 0, or name")
    group.add_argument("--nodata", type=float, metavar="V", help="value of pixels that hold no data (nan may be one)")


def add_scope(group: argparse._ActionsContainer) -> None:
    """The option of what a normalisation's statistics are taken over."""
    group.add_argument(
        "--normalize-scope", choices=("image", "channel", "slice"), help="what statistics are taken over"
    )


def add_contract(p: argparse.ArgumentParser) -> None:
    """The options of the input contract, and of how images are read."""
    add_choices(add_reading(p))
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
    """Pixels per axis, of 512x512, or one number for all axes; None for auto."""
    if text == "auto":
        return None
    try:
        shape = tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512, 512x384 or 32x256x256") from None
    if any(n < 1 for n in shape):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are 1 or more")
    return shape


SIZE = "N|HxW|DxHxW"  # how sizes are written: one number for all axes, or one for each


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


def completed(argv: Sequence[str], options: Sequence[str]) -> str:
    """The command that was given, to be typed again with these options and the user's words for them."""
    kept = [part for part in argv if part not in ("--json", "--debug")]
    said = [word for option in options for word in (option, f"YOUR_{option.strip('-').upper()}")]
    return shlex.join(["unet-rt", *kept, *said])


def complete_command(error: IncompleteContractError, argv: Sequence[str]) -> IncompleteContractError:
    """The error with the command that answers all of it."""
    return IncompleteContractError(f"{error}; then: {completed(argv, error.options)}", error.options)


def checkpoint_opener(args: argparse.Namespace) -> partial[Opened]:
    """What opens the checkpoint, as --architecture, --module and --arguments say; in any process."""
    import json
    from functools import partial

    path = Path(args.checkpoint)
    if path.suffix == ".py":
        given = args.argv.index(args.checkpoint) if args.checkpoint in args.argv else len(args.argv)
        argv = [*args.argv[:given], "YOUR_WEIGHTS.pt", *args.argv[given + 1 :]]
        argv += [] if args.module else ["--module", f"{path}:{_module_name(path)}"]
        raise ContractError(
            f"{path} is the code of a network, and a checkpoint holds its weights, from "
            f"torch.save(module.state_dict(), ...); name both: {completed(argv, [])}"
        )
    require_torch("runs the module", "torch")
    from ..models.source import open_module

    try:
        arguments = json.loads(args.arguments) if args.arguments else None
    except json.JSONDecodeError as error:
        raise ContractError(
            f"--arguments {args.arguments!r} is not JSON ({error}); use e.g. '{{\"classes\": 3}}'"
        ) from error
    return partial(open_module, path, architecture=args.architecture, factory=args.module, arguments=arguments)


def _module_name(path: Path) -> str:
    """The network that a Python file seems to define: its last class that is a Module; nothing is executed."""
    import ast

    try:
        nodes = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return "NAME"
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    networks = [c.name for c in classes if any(ast.unparse(base).endswith("Module") for base in c.bases)]
    return networks[-1] if networks else "NAME"


def require_torch(what: str, extra: str) -> None:
    """Raises BackendError where torch is missing, which does ``what`` and comes with the extra of that name."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise BackendError(f"torch is missing, which {what}; pip install 'unet-rt[{extra}]'")
