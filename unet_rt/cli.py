"""The command line. The only module that prints; every verb is one function that calls the library.

Exit codes: 0 good, 1 the answer is no (parity failed, budget missed), 2 wrong use, 130 interrupted, 143 terminated.
With ``--json``, stdout holds one JSON document whatever happens: the result, or ``{"error": {"type", "message"}}``.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ._version import __version__
from .errors import ContractError, ImageError, OutputError, ParityError, UnetRtError

if TYPE_CHECKING:
    from .building.report import BuildReport
    from .contract.contract import Contract
    from .engine.budget import Budget
    from .models.state import Opened
    from .prediction.report import RunReport
    from .prediction.request import Tables


Progress = Callable[[int, int], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # file names of any script, on terminals of one
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except _UsageError as error:
        return _failed(argparse.Namespace(json="--json" in argv), error, 2)
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    args.argv = argv
    try:
        with _terminable():
            code = int(args.run(args) or 0)
            if sys.stdout is not None:  # None: started without one
                sys.stdout.flush()
            return code
    except ParityError as error:
        return _failed(args, error, 1)
    except UnetRtError as error:
        return _failed(args, error, 2)
    except (KeyboardInterrupt, _Terminated) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 143
        return _failed(args, error, code, "interrupted; " if code == 130 else "terminated; ")
    except BrokenPipeError:
        _drop_stdout()  # whoever read it has gone, which is no news to them
        return 141
    except (MemoryError, OSError) as error:
        return _failed(args, error, 2)
    except Exception as error:  # a defect of ours: say so in one line, and how to see more
        return _failed(args, error, 2, "internal error, please report it with the output of --debug: ")


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


def _failed(args: argparse.Namespace, error: BaseException, code: int, prefix: str = "") -> int:
    """Says what went wrong: one line on stderr, with --json a document on stdout as well."""
    if getattr(args, "debug", False):
        traceback.print_exception(error)
    _clear()
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
            _print_json({"error": {"type": kind.strip("_"), "message": prefix + text}})
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="unet-rt",
        description="Run trained U-Nets on images of any size, exactly.",
        epilog="Start with: unet-rt inspect model.onnx. unet-rt VERB --help lists a verb's options. "
        "Exit codes: 0 good, 1 the answer is no, 2 wrong use.",
    )
    parser.add_argument("--version", action="version", version=f"unet-rt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for add in (
        _add_inspect,
        _add_build,
        _add_predict,
        _add_verify,
        _add_bench,
        _add_pack,
        _add_unpack,
        _add_train,
        _add_export,
        _add_doctor,
        _add_demo,
    ):
        add(verbs)
    return parser


def _add_inspect(verbs: Any) -> None:
    p = _verb(
        verbs, "inspect", _inspect, "what a graph needs: stride, halo, exactness and what it costs", "MODEL.onnx "
    )
    p.add_argument("model", metavar="MODEL.onnx", help="ONNX file")


def _add_build(verbs: Any) -> None:
    p = _verb(verbs, "build", _build, "measure candidates, prove parity, write an engine folder", "MODEL.onnx ... ")
    p.add_argument(
        "model",
        metavar="MODEL.onnx",
        nargs="+",
        help="ONNX file, bioimage.io package or rdf.yaml; several (folds) become one engine of their mean probability",
    )
    p.add_argument("--samples", metavar="PATH", nargs="+", help="images like those the network will see")
    p.add_argument("--out", metavar="DIR", help="the engine folder (default: MODEL.urt; ensemble.urt for several)")
    p.add_argument("--backend", default="auto", metavar="NAME", help="auto, onnxruntime, openvino or tensorrt")
    p.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda[:N]")
    p.add_argument("--precision", default="auto", metavar="NAME", help="auto, fp32, fp16, bf16 or int8")
    p.add_argument("--tile", type=_shape, metavar="HxW", help="tile size in pixels, or auto")
    p.add_argument(
        "--halo",
        default="auto",
        metavar="exact|measured|N",
        help="samples discarded at inner tile edges (default: exact, unless that costs too much)",
    )
    p.add_argument(
        "--overlap", type=_shape, metavar="HxW", help="overlap of blended tiles, for networks that are not exact"
    )
    p.add_argument("--blend", choices=("gaussian", "constant"), default="gaussian", help="weights of blended tiles")
    p.add_argument(
        "--budget",
        metavar="KEY=VALUE",
        nargs="+",
        default=[],
        help="label_change=1e-3 (INT8: 5e-3) dice=0.99 error=1e-2 seam=1e-5",
    )
    p.add_argument("--no-exam", action="store_true", help="keep no sample tiles in the engine (confidential images)")
    _overwrite_option(p)
    p.add_argument(
        "--cache",
        metavar="DIR",
        default=os.environ.get("UNET_RT_CACHE") or None,
        help="keep engines here by all that decided them (default: $UNET_RT_CACHE, else nowhere)",
    )
    p.add_argument("--search-minutes", type=float, metavar="N", help="time for the search (default: 10)")
    _threads_option(p)
    _contract_options(p)


def _add_predict(verbs: Any) -> None:
    p = _verb(verbs, "predict", _predict, "predict images of any size", "ENGINE IMAGE|FOLDER ... --out PATH ")
    p.add_argument("engine", metavar="ENGINE", help="engine folder, from unet-rt build")
    p.add_argument("images", metavar="IMAGE|FOLDER", nargs="+", help="files, Zarr folders, URLs, folders of images")
    p.add_argument(
        "--out",
        metavar="PATH",
        required=True,
        help="file (.tif, .png, .npy), .zarr, or folder: NAME.tif for every image",
    )
    p.add_argument(
        "--output",
        choices=("mask", "probability", "raw", "instances"),
        help="default: a mask; the raw values of a regression; instances: objects, numbered",
    )
    p.add_argument(
        "--head", metavar="NAME", help="which output of the network, where it has several (default: the first)"
    )
    p.add_argument(
        "--mask-values",
        type=_numbers,
        default=(),
        metavar="0,255",
        help="value of every label in a mask, default 0,1,..",
    )
    p.add_argument("--normalize", metavar="HOW", help="for engines whose contract declares none")
    p.add_argument("--tile", type=_shape, metavar="HxW", help="tile size in pixels (default: chosen for the image)")
    p.add_argument("--batch", type=int, metavar="N", help="tiles per run; default: as build found fastest")
    _threads_option(p)
    p.add_argument("--device", metavar="NAME", help="another GPU than the engine was built for: cuda:N")
    p.add_argument("--overlay", action="store_true", help="also draw the mask over the image (NAME.overlay.png)")
    _overwrite_option(p)
    p.add_argument("--accept-unverified", action="store_true", help="run an engine whose parity is not proven here")
    _reading_options(p).add_argument(
        "--level",
        metavar="N|UMum",
        help="of pyramids (Zarr, TIFF, slides): number or pixel size, e.g. 0.5um; default: the finest, 0; with --resample: "
        "the coarsest that is fine enough",
    )
    group = p.add_argument_group("where and how often")
    group.add_argument("--mask", metavar="IMAGE", help="predict only where this image of the same size is not 0")
    group.add_argument(
        "--tta", choices=("none", "flip", "d4"), default="none", help="mean over flips: 4 or 8 times the work"
    )
    group.add_argument(
        "--pixel-size", type=_lengths, default=(), metavar="UM[,UM]", help="of the images, in micrometres (of level 0)"
    )
    group.add_argument(
        "--resample", action="store_true", help="bring images to the pixel size of training, results back"
    )
    group = p.add_argument_group("large images: a killed run goes on with the same command")
    group.add_argument(
        "--memory", type=_memory, metavar="4GB", help="bound on resident memory; default: half of the free"
    )
    group.add_argument("--shard", type=_shard, metavar="I/N", help="every N-th block only; the last shard writes --out")
    group.add_argument("--scheduler", metavar="local:N|tcp://..", help="have Dask workers compute the blocks")
    group.add_argument("--restart", action="store_true", help="throw away what an interrupted run has left")
    group = p.add_argument_group("objects (--output instances)")
    group.add_argument("--min-size", type=int, default=1, metavar="N", help="leave out objects of fewer pixels")
    group.add_argument("--objects", metavar="CSV", help="table of all objects")
    group.add_argument("--areas", metavar="CSV", help="table of what each class covers")
    group.add_argument("--geojson", metavar="JSON", help="outlines as polygons, for slide viewers")


def _add_verify(verbs: Any) -> None:
    p = _verb(verbs, "verify", _verify, "hold an engine against its own FP32 graph", "ENGINE ")
    p.add_argument("engine", metavar="ENGINE", help="engine folder, from unet-rt build")
    p.add_argument("--images", metavar="PATH", nargs="+", help="images to compare on (default: the engine's exam)")
    p.add_argument("--labels", metavar="PATH", nargs="+", help="masks of the same file names")
    p.add_argument("--head", metavar="NAME", help="the output that labels belong to, of several (default: the first)")
    p.add_argument("--baseline", metavar="MODEL.onnx", help="another FP32 graph to compare with")
    p.add_argument(
        "--budget", metavar="KEY=VALUE", nargs="+", default=[], help="what may differ (default: as at build)"
    )
    p.add_argument("--tile", type=_shape, metavar="HxW", help="tile of the engine (default: small, so that seams show)")
    p.add_argument(
        "--picture",
        metavar="PNG",
        help="picture of the worst tile (default: verify-worst.png, and only where the budget is missed)",
    )
    _threads_option(p)
    _reading_options(p)


def _add_bench(verbs: Any) -> None:
    p = _verb(
        verbs, "bench", _bench, "time a network's engines beside the libraries used directly", "ENGINE|MODEL.onnx "
    )
    p.add_argument("model", metavar="ENGINE|MODEL.onnx", help="engine folder, or ONNX file: engines are built from it")
    p.add_argument("--image", metavar="PATH", help="image to measure on (default: drawn microscopy)")
    p.add_argument("--samples", metavar="PATH", nargs="+", help="images to build lower precisions from (ONNX files)")
    p.add_argument(
        "--baselines",
        metavar="NAME",
        nargs="*",
        help="out of onnxruntime, openvino, eager, monai, monai-gaussian (default: those that are installed)",
    )
    p.add_argument("--checkpoint", metavar="PATH", help="the same network for PyTorch: what unet-rt export takes")
    p.add_argument("--architecture", metavar="NAME=VALUE,..|FILE", help="of a state dict, as in unet-rt export")
    p.add_argument("--module", metavar="PACKAGE:FUNCTION", help="of a state dict, as in unet-rt export")
    p.add_argument("--arguments", metavar="JSON", help="of that function, as in unet-rt export")
    p.add_argument("--plot", metavar="PNG", help="picture: a point per contender, speed against agreement")
    p.add_argument("--tile", type=_shape, metavar="HxW", help="tile of everybody in pixels")
    p.add_argument("--runs", type=_count, default=5, metavar="N", help="rounds that count (default: 5)")
    p.add_argument("--seconds", type=float, default=120.0, metavar="N", help="of each of two timings (default: 120)")
    _threads_option(p)
    _contract_options(p)


def _add_pack(verbs: Any) -> None:
    p = _verb(verbs, "pack", _pack, "make an engine folder one archive, the same bytes every time", "ENGINE ")
    p.add_argument("engine", metavar="ENGINE", help="engine folder, from unet-rt build")
    p.add_argument("--out", metavar="FILE", help="the archive (default: ENGINE.tar)")
    _overwrite_option(p)


def _add_unpack(verbs: Any) -> None:
    p = _verb(verbs, "unpack", _unpack, "make an archive an engine folder again", "ARCHIVE ")
    p.add_argument("archive", metavar="ARCHIVE", help="from unet-rt pack")
    p.add_argument("--out", metavar="DIR", help="the engine folder (default: ARCHIVE without .tar)")
    p.add_argument("--sha256", metavar="HASH", help="refuse an archive that has another")
    _overwrite_option(p)


def _add_train(verbs: Any) -> None:
    p = _verb(verbs, "train", _train, "train a network on a folder of images and masks", "DATA --out MODEL.pt ")
    p.add_argument("data", metavar="DATA", help="folder of images and masks, e.g. images/a.png and masks/a.png")
    p.add_argument("--out", metavar="MODEL.pt", required=True, help="the checkpoint; curves are drawn beside it")
    _training_options(p)


def _add_export(verbs: Any) -> None:
    p = _verb(verbs, "export", _export, "write a trained network as ONNX, checked", "CHECKPOINT --out MODEL.onnx ")
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="from unet-rt train; a state dict; nnU-Net's .../fold_0")
    p.add_argument("--out", metavar="MODEL.onnx", required=True, help="the ONNX file")
    p.add_argument("--architecture", metavar="NAME=VALUE,..|FILE", help="of a state dict: network=UNet,width=64,..")
    p.add_argument("--module", metavar="PACKAGE:FUNCTION", help="of a state dict: your function that makes the module")
    p.add_argument("--arguments", metavar="JSON", help="of that function, e.g. '{\"classes\": 3}'")
    p.add_argument("--sizes", type=_numbers, metavar="256,320", help="sizes at which graph and module are compared")
    p.add_argument("--pixels", metavar="IMAGE", help="image to compare them on (default: drawn microscopy)")
    p.add_argument("--exporter", choices=("auto", "trace", "dynamo"), default="auto", help="of torch; default: auto")
    p.add_argument("--opset", type=int, metavar="N", help="ONNX operator set (default: 18)")
    _overwrite_option(p)
    _contract_options(p)


def _add_doctor(verbs: Any) -> None:
    _verb(verbs, "doctor", _doctor, "backends, versions, devices, CPU features")


def _add_demo(verbs: Any) -> None:
    p = _verb(verbs, "demo", _demo, "build, predict and verify the network that ships with unet-rt on a drawn image")
    p.add_argument("--out", metavar="DIR", default="demo-output", help="folder for the results (default: demo-output)")
    p.add_argument("--size", type=_side, default=4096, metavar="PX", help="side of the image")


def _verb(
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


def _threads_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--threads", type=int, default=0, metavar="N", help="default: as many as this process may use")


def _overwrite_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--overwrite", action="store_true", help="replace what is there")


def _reading_options(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = p.add_argument_group("how images are read")
    group.add_argument("--axes", metavar="TCZYX", help="axes of the images, where files do not say")
    group.add_argument("--channels", metavar="0,2|NAME,..|luma", help="channels in the network's order")
    return group


def _scope_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--normalize-scope", choices=("image", "channel", "slice"), help="what statistics are taken over"
    )


def _training_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--preset", choices=("default", "paper"), default="default", help="paper: the recipe of the paper")
    p.add_argument("--network", choices=("UNet", "FCN8s", "SegNet"), default="UNet", help="default: UNet")
    for name, text in (("width", "channels of the first level"), ("depth", "number of poolings")):
        p.add_argument(f"--{name}", type=int, metavar="N", help=text)
    p.add_argument("--padding", choices=("same", "valid"), help="of the U-Net's convolutions")
    p.add_argument("--up", choices=("transposed", "bilinear", "nearest"), help="of the U-Net's expanding path")
    p.add_argument("--norm", choices=("batch", "none"), help="BatchNorm or none")
    p.add_argument("--dropout", type=float, metavar="P", help="at the end of the contracting path")
    p.add_argument("--steps", type=int, metavar="N", help="updates; default: 1000 on a CPU, 4000 on a GPU")
    p.add_argument("--minutes", type=float, metavar="N", help="stop after that time, in place of --steps")
    p.add_argument("--tile", type=_side, metavar="PX", dest="tile_px", help="side of a training tile")
    p.add_argument("--batch", type=int, metavar="N", help="tiles per step")
    p.add_argument("--optimizer", choices=("adam", "sgd"), help="sgd has momentum 0.99")
    p.add_argument("--learning-rate", type=float, metavar="X", help="at the start; it falls to nothing")
    p.add_argument("--balance", type=float, metavar="X", help="1: classes count alike; 0: pixels do")
    p.add_argument("--w0", type=float, metavar="X", help="weight of borders between objects; default 10")
    p.add_argument("--sigma", type=float, metavar="PX", dest="sigma_px", help="reach of that weight; default 5")
    p.add_argument("--seed", type=int, metavar="N", help="of everything random; default 0")
    p.add_argument("--no-augment", action="store_true", help="tiles as they are in the images")
    p.add_argument("--limit", type=int, metavar="N", help="train on the first N images only")
    p.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 on a GPU")
    p.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda[:N]")
    _threads_option(p)
    p.add_argument("--resume", action="store_true", help="go on with a training that was interrupted")
    _overwrite_option(p)
    group = p.add_argument_group("how the folder is read")
    group.add_argument("--images", metavar="DIR", help="sub-folder of the images, where names do not say it")
    group.add_argument("--masks", metavar="DIR", help="sub-folder of the masks")
    group.add_argument("--masks-are", choices=("binary", "instances", "classes"), help="default: told from the masks")
    group.add_argument("--normalize", metavar="HOW", help="default: percentile=1,99.8 of the whole image")
    _scope_option(group)
    _reading_options(p)


def _contract_options(p: argparse.ArgumentParser) -> None:
    _reading_options(p)
    group = p.add_argument_group(
        "the input contract (options win over --contract, which wins over the model's metadata)"
    )
    group.add_argument("--contract", metavar="FILE.json", help="the contract as a file; see the manual")
    group.add_argument(
        "--normalize",
        metavar="HOW",
        help="none | scale=255 | dtype | minmax | percentile=1,99.8 | zscore | imagenet | mean=..;std=..;scale=..;clip=..",
    )
    _scope_option(group)
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


def _side(text: str) -> int:
    if not text.isdecimal() or not 64 <= int(text) <= 20000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels from 64 to 20000")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
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


def _memory(text: str) -> int:
    number = text.upper().removesuffix("B").rstrip("KMGT")
    unit = text.upper().removesuffix("B")[len(number) :]
    try:
        size = int(float(number) * 1000 ** ("", "K", "M", "G", "T").index(unit))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory such as 4GB or 800MB") from None
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: some memory is needed")
    return size


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard such as 0/8 (the first of eight) to 7/8")
    return int(index), int(count)


def _channels(args: argparse.Namespace) -> Any:
    if args.channels is None:
        return None
    from .images.axes import parse_channels

    return parse_channels(args.channels)


def _contract(args: argparse.Namespace) -> Contract:
    from .contract.contract import Contract, Normalization
    from .contract.words import parse_normalization

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
        from .contract.json import contract_from_file

        found = found.over(contract_from_file(Path(args.contract)))
    return found


def _budget(args: argparse.Namespace) -> Budget | None:
    from .engine.budget import Budget

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


# --- printing -------------------------------------------------------------------------------------------------------


def _out(args: argparse.Namespace) -> Any:
    return sys.stderr if args.json else sys.stdout


def _say(args: argparse.Namespace) -> Callable[[str], None]:
    """Progress in sentences, on stderr: one line that is overwritten on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K  {text[:110]}", end="", file=sys.stderr, flush=True)


def _clear() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


class _Bar:
    """A tqdm bar for work of more than two seconds; silent where stderr is not a terminal."""

    def __init__(self, name: str):
        self._name, self._done = name, 0
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            # What an earlier run has done is not counted into the speed.
            self._bar = tqdm(total=total, initial=done, desc=self._name[:30], unit="tile", delay=2, leave=False)
            self._done = done
        self._bar.update(done - self._done)
        self._done = done
        if done == total:
            self._bar.close()


class _TrainingBar:
    """A tqdm bar of training; silent where stderr is not a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, share: float, step: int, loss: float) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
            self._bar = tqdm(total=1.0, desc="training", bar_format=form, leave=False)
            self._bar.update(share)
        self._bar.set_postfix_str(f"step {step} loss {loss:.3f}", refresh=False)
        self._bar.update(min(share, 1.0) - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _print_json(document: Any) -> None:
    from .system.json import record_json

    print(record_json(document), end="", flush=True)


# --- verbs ----------------------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> int:
    from .graph.report import check_images, inspect
    from .reports import inspect_text

    report = inspect(args.model)
    check_images(report)
    if args.json:
        _print_json(report.to_json())
    else:
        print(inspect_text(report))
    return 0


def _build(args: argparse.Namespace) -> int:
    from .building.build import SEARCH_MINUTES, build
    from .reports import build_text

    reports: list[BuildReport] = []
    engine = build(
        args.model,
        samples=args.samples,
        out=args.out,
        budget=_budget(args),
        contract=_contract(args),
        backend=args.backend,
        device=args.device,
        precision=args.precision,
        tile=args.tile,
        halo=args.halo,
        overlap=args.overlap,
        blend=args.blend,
        threads=args.threads,
        axes=args.axes,
        channels=_channels(args),
        keep_exam=not args.no_exam,
        overwrite=args.overwrite,
        cache=args.cache,
        search_minutes=SEARCH_MINUTES if args.search_minutes is None else args.search_minutes,
        say=_say(args),
        report=reports.append,
    )
    engine.close()
    _clear()
    if not reports:
        folder = "" if engine.folder is None else str(engine.folder.path)
        if args.json:
            _print_json({"folder": folder, "up_to_date": True, "spec": engine.spec.to_json()})
        print(
            f"{folder}: up to date ({engine.spec.backend} {engine.spec.precision}); the same model, samples and options "
            "built it on this machine",
            file=_out(args),
        )
        return 0
    done = reports[0]
    if done.advice:
        argv = args.argv if done.spec.contract.task else [*args.argv, "--task", "YOUR_TASK"]
        done = replace(done, advice=_with_samples(argv, done.folder))
    print(build_text(done), file=_out(args))
    for warning in done.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    if args.json:
        _print_json(done.to_json())
    return 0


def _with_samples(argv: Sequence[str], folder: Path) -> str:
    """The command that was given, once more, with samples: every other option decides the result as well."""
    kept = [part for part in argv if part not in ("--json", "--debug", "--overwrite")]
    if not any(part == "--out" or part.startswith("--out=") for part in kept):
        kept += ["--out", str(folder)]
    return shlex.join(["unet-rt", *kept, "--samples", "YOUR_IMAGES", "--overwrite"])


def _predict(args: argparse.Namespace) -> int:
    from .contract.words import parse_normalization
    from .engine.load import load
    from .images.open import list_images
    from .prediction.predict import predict
    from .prediction.stage import stage_folder
    from .reports import run_text

    images = list_images(args.images)
    targets = _targets(args, images)
    overlays = [_overlay_name(target) if args.overlay else None for target in targets]
    if not args.overwrite:
        for target, picture in zip(targets, overlays, strict=True):
            if picture is not None and picture.exists() and not stage_folder(target).exists():
                raise OutputError(f"{picture} exists; pass --overwrite to replace it, or choose another --out")
    reports: list[RunReport] = []
    results: list[dict[str, Any]] = []
    normalization = parse_normalization(args.normalize, None) if args.normalize else None
    tables = _tables(args, len(images))
    device = None if args.device == "auto" else args.device
    with (
        ExitStack() as folders,
        load(
            args.engine, device=device, threads=args.threads or None, accept_unverified=args.accept_unverified
        ) as engine,
    ):
        if args.accept_unverified:
            print(f"WARNING: {args.engine} runs unverified, as asked", file=sys.stderr)
        folders.enter_context(_folder_of(args, targets))
        for image, target, overlay in zip(images, targets, overlays, strict=True):
            try:
                predict(
                    engine,
                    image,
                    out=target,
                    output=args.output,
                    head=args.head,
                    axes=args.axes,
                    channels=_channels(args),
                    level=args.level,
                    tile=args.tile,
                    batch=args.batch,
                    threads=args.threads,
                    mask_values=args.mask_values,
                    normalization=normalization,
                    overlay=overlay,
                    overwrite=args.overwrite,
                    progress=_Bar(Path(image).name),
                    report=reports.append,
                    pixel_size_um=args.pixel_size,
                    resample=args.resample,
                    tta=args.tta,
                    region=args.mask,
                    memory_bytes=args.memory,
                    shard=args.shard,
                    scheduler=args.scheduler,
                    restart=args.restart,
                    tables=tables,
                )
            except (ImageError, ContractError) as error:
                if len(images) == 1:
                    raise
                # One bad image of many costs nobody the others.
                print(f"error: {image}: {error}", file=sys.stderr)
                results.append({"image": str(image), "error": str(error)})
                continue
            done = reports[-1]
            if overlay is not None and overlay.exists():  # the last shard draws it
                done.notes.append(f"overlay: {overlay}")
            if target.suffix.lower() == ".png" and done.class_share and not args.mask_values:
                done.notes.append("the mask holds labels 0, 1, .., which viewers show as black; see --mask-values")
            results.append({**done.to_json(), "out": str(target)})
            print(run_text(done, target if target.exists() else None), file=_out(args))
    if args.json:
        _print_json(results)
    bad = len(images) - len(reports)
    if bad:
        print(f"{bad} of {len(images)} images were not predicted", file=sys.stderr)
    return 2 if bad else 0


def _tables(args: argparse.Namespace, images: int) -> Tables | None:
    """What is wanted of objects; None where nothing is."""
    from .prediction.request import Tables

    paths = {name: getattr(args, name) for name in ("objects", "areas", "geojson") if getattr(args, name)}
    if not paths and args.min_size == 1:
        return None
    if args.output != "instances":
        raise ContractError("--min-size, --objects, --areas and --geojson are about objects; use --output instances")
    if paths and images > 1:
        raise OutputError(f"{images} images do not go into one table; predict them one by one")
    return Tables(args.min_size, **{name: Path(path) for name, path in paths.items()})


def _targets(args: argparse.Namespace, images: Sequence[Path | str]) -> list[Path]:
    """One output per image: --out itself for one image, files in the folder --out for several."""
    if not args.out:
        raise OutputError("--out is empty; name a file or a folder")
    out = Path(args.out)
    suffix = ".tif"
    if out.is_file() and len(images) > 1:
        raise OutputError(f"{out} is a file, and {len(images)} images need a folder; choose another --out")
    zarr = out.suffix.lower() == ".zarr"  # a folder that is one output
    if len(images) == 1 and (zarr or (not out.is_dir() and (out.suffix != "" or out.exists()))):
        _not_the_image(out, images)
        return [out]
    if zarr or (not out.is_dir() and out.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")):
        raise OutputError(f"{len(images)} images need a folder, and {out} is named like a file; choose another --out")
    targets = [out / (Path(image).stem.removesuffix(".ome") + suffix) for image in images]
    doubles = {t for t in targets if targets.count(t) > 1}
    if doubles:
        raise OutputError(f"several images would be written to {min(doubles)}; predict them into different folders")
    for target in targets:
        _not_the_image(target, images)
    if not args.overwrite:
        existing = [t for t in targets if t.exists()]
        if existing:
            raise OutputError(f"{existing[0]} exists; pass --overwrite to replace it")
    return targets


def _not_the_image(target: Path, images: Sequence[Path | str]) -> None:
    """OutputError where an output would replace one of the images: --overwrite is not meant for them."""
    if target.exists() and any(isinstance(image, Path) and target.samefile(image) for image in images):
        raise OutputError(f"{target} is an image to be predicted, which an output never replaces; choose another --out")


def _overlay_name(target: Path) -> Path:
    return target.with_name(target.name.removesuffix(target.suffix) + ".overlay.png")


@contextmanager
def _folder_of(args: argparse.Namespace, targets: Sequence[Path]) -> Iterator[None]:
    """Makes the folder --out where outputs go into one, and removes it again where nothing came of it."""
    folder = Path(args.out)
    if targets[0].parent != folder or folder.is_dir():
        yield
        return
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created ({error.strerror}); choose another --out") from error
    try:
        yield
    finally:
        with suppress(OSError):  # it holds outputs that are whole
            folder.rmdir()


def _verify(args: argparse.Namespace) -> int:
    from .judging.verify import verify
    from .reports import verify_text

    report = verify(
        args.engine,
        args.images,
        labels=args.labels,
        head=args.head,
        baseline=args.baseline,
        budget=_budget(args),
        axes=args.axes,
        channels=_channels(args),
        tile=args.tile,
        picture=args.picture or "verify-worst.png",
        picture_always=args.picture is not None,
        threads=args.threads,
        say=_say(args),
    )
    _clear()
    if args.json:
        _print_json(report.to_json())
    print(verify_text(report), file=_out(args))
    if args.picture and report.picture is None:
        print(f"{args.picture} is not drawn: that takes 2-D images and a difference", file=sys.stderr)
    return 0 if report.accepted else 1


def _bench(args: argparse.Namespace) -> int:
    from .judging.bench import bench_model
    from .reports import bench_text

    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        raise OutputError(f"{Path(args.plot).parent} is not a folder; choose another --plot")
    module = None
    if args.checkpoint is not None:
        module = _opened(args).module
    elif args.architecture or args.module or args.arguments:
        raise ContractError("--architecture, --module and --arguments say how --checkpoint is read; pass it as well")
    report = bench_model(
        args.model,
        image=args.image,
        samples=args.samples,
        baselines=args.baselines,
        module=module,
        contract=_contract(args),
        axes=args.axes,
        channels=_channels(args),
        tile=args.tile,
        threads=args.threads,
        runs=args.runs,
        seconds=args.seconds,
        say=_say(args),
    )
    _clear()
    print(bench_text(report), file=_out(args))
    if args.plot:
        from .outputs.charts import scatter

        points = [
            (r.name, r.mpx_per_s, 100 * (1 - r.relative_error if r.label_agreement is None else r.label_agreement))
            for r in report.rows
        ]
        scatter("agreement with FP32 in %", "Mpx/s", points, Path(args.plot))
    if args.json:  # last: where the picture cannot be written, stdout holds the error alone
        _print_json(report.to_json())
    return 0


def _pack(args: argparse.Namespace) -> int:
    from .engine.archive import pack

    out = Path(args.out) if args.out else Path(Path(args.engine).resolve().name + ".tar")
    digest = pack(args.engine, out, overwrite=args.overwrite)
    if args.json:
        _print_json({"archive": str(out), "sha256": digest, "bytes": out.stat().st_size})
    print(f"{digest}  {out}", file=_out(args))
    return 0


def _unpack(args: argparse.Namespace) -> int:
    from .engine.archive import unpack

    opened = unpack(args.archive, args.out, expected=args.sha256, overwrite=args.overwrite)
    spec = opened.spec
    if args.json:
        _print_json({"folder": str(opened.path), "spec": spec.to_json()})
    print(f"{opened.path}: {spec.backend} {spec.precision} for {spec.device}", file=_out(args))
    return 0


def _train(args: argparse.Namespace) -> int:
    from .contract.words import parse_normalization
    from .system import limits as machine

    _torch("trains networks", "train")
    from .training.fit import NORMALIZATION, Options, fit
    from .training.trainer import Progress as Validated

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    options = Options(
        preset=args.preset,
        network=args.network,
        architecture=given("width", "depth", "padding", "up", "norm", "dropout"),
        recipe=given(
            "steps", "minutes", "tile_px", "batch", "optimizer", "learning_rate", "balance", "w0", "sigma_px", "seed",
            "precision",
        ),
        normalization=parse_normalization(args.normalize, args.normalize_scope) if args.normalize else NORMALIZATION,
        masks_are=args.masks_are,
        images=args.images,
        masks=args.masks,
        axes=args.axes,
        channels=_channels(args),
        augment=not args.no_augment,
        limit=args.limit,
        device=args.device,
        threads=args.threads or machine.threads(),
    )  # fmt: skip
    bar = _TrainingBar()

    def report(now: Validated) -> None:
        _clear()
        print(
            f"step {now.step} ({now.share:.0%}, {now.seconds:.0f} s): loss {now.loss:.4f}, validation IoU {now.iou:.4f}"
            f"{', the best so far' if now.best else ''}",
            file=_out(args),
            flush=True,
        )

    try:
        result = fit(
            args.data,
            args.out,
            options,
            resume=args.resume,
            overwrite=args.overwrite,
            say=lambda text: print(text, file=_out(args), flush=True),
            report=report,
            progress=bar,
        )
    finally:
        bar.close()
    if args.json:
        _print_json(result.to_json())
    print(
        f"{result.path}: validation IoU {result.best.iou:.4f} at step {result.best.step}; curves in {result.curves}\n"
        f"next: unet-rt export {shlex.quote(str(result.path))} --out "
        f"{shlex.quote(str(result.path.with_suffix('.onnx')))}",
        file=_out(args),
    )
    return 0


def _export(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    _torch("runs the module", "torch")
    from .errors import size_text
    from .training.export import OPSET, export, read_pixels

    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise OutputError(f"{out} exists; pass --overwrite to replace it, or choose another --out")
    opened = _opened(args)
    contract = _contract(args).over(opened.contract)
    done = export(
        opened.module,
        out,
        contract=contract,
        sizes=args.sizes,
        pixels=read_pixels(args.pixels, contract, args.axes, args.channels) if args.pixels else None,
        exporter=args.exporter,
        opset=args.opset or OPSET,
        metadata=opened.metadata,
    )
    if args.json:
        _print_json({**asdict(done), "path": str(done.path), "contract": contract.to_json()})
    sizes = " and ".join(map(size_text, done.sizes))
    print(
        f"{done.path}: {done.parameters:,} parameters, opset {done.opset}, free batch and spatial axes\n"
        f"equals the module at {sizes} px, off by at most {done.max_error:.2g} ({done.tolerance:.2g} is float32's share)"
        f"{''.join(f'{chr(10)}note: {note}' for note in (*opened.notes, *done.notes))}",
        file=_out(args),
    )
    if contract.normalization is None:
        print(
            "note: nothing says how pixels are normalised; pass --normalize here, or to unet-rt build", file=_out(args)
        )
    return 0


def _opened(args: argparse.Namespace) -> Opened:
    """The module of --checkpoint, as --architecture, --module and --arguments say."""
    import json

    _torch("runs the module", "torch")
    from .models.source import open_module

    try:
        arguments = json.loads(args.arguments) if args.arguments else None
    except json.JSONDecodeError as error:
        raise ContractError(
            f"--arguments {args.arguments!r} is not JSON ({error}); use e.g. '{{\"classes\": 3}}'"
        ) from error
    return open_module(Path(args.checkpoint), architecture=args.architecture, factory=args.module, arguments=arguments)


def _torch(what: str, extra: str) -> None:
    """BackendError where torch is missing."""
    from importlib.util import find_spec

    from .errors import BackendError

    if find_spec("torch") is None:
        raise BackendError(f"torch is missing, which {what}; pip install 'unet-rt[{extra}]'")


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    found = doctor.collect()
    if args.json:
        _print_json(found)
    else:
        print(doctor.format(found))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .demo import demo

    begun = time.perf_counter()
    result = demo(
        Path(args.out), size=args.size, say=lambda text: print(text, file=_out(args), flush=True), progress=_Bar("demo")
    )
    if args.json:
        _print_json(result)
    print(f"done in {time.perf_counter() - begun:.0f} s; look at {Path(args.out) / 'report.md'}", file=_out(args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
