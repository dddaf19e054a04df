"""Reading the input contract: options, JSON files, ONNX metadata, bioimage.io packages; and settling what is left open.

Keys of the ONNX ``metadata_props`` that are read (first match wins):

=============================  =====================================================================================
``unet_rt.contract``           the whole contract as JSON, as ``unet-rt export`` writes it
``unet_rt.<field>``            one field in the words of the command line: ``normalize``, ``normalize_scope``, ``axes``,
                               ``channels``, ``task``, ``output_is``, ``classes``, ``threshold``, ``pixel_size_um``,
                               ``trained_tile``, ``value_range``, ``border`` (lists by comma)
``Image.NominalPixelRange``    ONNX's own: ``NominalRange_0_255``, ``Normalized_0_1``, ``Normalized_1_1``
``Image.BitmapPixelFormat``    ONNX's own: ``Gray8``, ``Rgb8``, ``Bgr8`` give the channels and their order
=============================  =====================================================================================

A single ``unet_rt.`` key wins over the same field of ``unet_rt.contract``.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from .contract import Border, Contract, Head, Method, Normalization, OutputIs, Scope, Task
from .errors import ContractError
from .image import Source
from .normalize import value_range

Array = npt.NDArray[Any]

METADATA_KEY = "unet_rt.contract"
_RECORDS = (METADATA_KEY, "unet_rt.half")  # what passes and backends say of a graph: no fields
CHOICES = (
    "none (the network takes grey levels), scale=255, dtype (largest value of the dtype), minmax, percentile=1,99.8, "
    "zscore, imagenet, or mean=..;std=..;scale=..;clip=.."
)
IMAGENET = Normalization("fixed", scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

# The words of the command line -------------------------------------------------------------------------------------


def parse_normalization(text: str, scope: str | None = None) -> Normalization:
    """``--normalize`` and ``--normalize-scope`` -> Normalization. Inverse of :func:`format_normalization`.

    Raises:
        ContractError: Anything but ``none | scale=255 | dtype | minmax | percentile=1,99.8 | zscore | imagenet |
            mean=..;std=..;scale=..``, each with ``;clip=low,high`` (grey levels), ``;clip_after=low,high`` (of the
            result) and ``;eps=..`` where wanted.
    """
    words: dict[str, str] = {}
    for part in text.split(";"):
        word, equals, value = (piece.strip() for piece in part.partition("="))
        word = word.lower()
        if word in words:
            raise ContractError(f"--normalize {text!r} gives {word} twice; give it once")
        words[word] = value if equals else ""
    heads: list[str] = [w for w in words if w in ("none", "dtype", "minmax", "percentile", "zscore", "imagenet")]
    known = (*heads, "scale", "mean", "std", "clip", "clip_after", "eps")
    for word in words:
        if word not in known:
            choices = ["none", "dtype", "minmax", "percentile", "zscore", "imagenet", "scale", "mean", "std", "clip"]
            raise ContractError(f"--normalize {text!r}: {word!r} is unknown{_close(word, choices)}; choose {CHOICES}")
    fixed: list[str] = [w for w in ("mean", "std", "scale") if w in words]
    if len(heads) + bool(fixed) != 1:
        said = " and ".join(heads + fixed) or "no method"
        raise ContractError(f"--normalize {text!r} names {said}; choose one of {CHOICES}")
    clip = _pair(words["clip"], "clip", text) if "clip" in words else None
    if heads:
        head, value = heads[0], words[heads[0]]
        if value and head != "percentile":
            raise ContractError(f"--normalize {text!r}: {head} takes no number; write {head} alone")
        result = IMAGENET if head == "imagenet" else Normalization(_method(head))
        if head == "percentile" and value:
            result = replace(result, percentiles=_pair(value, "percentile", text))
    elif fixed == ["scale"]:
        result = Normalization("scale", scale=_number(words["scale"], "scale", text))
    else:
        result = Normalization(
            "fixed",
            scale=_number(words["scale"], "scale", text) if "scale" in words else 1.0,
            mean=_numbers(words["mean"], "mean", text) if "mean" in words else (0.0,),
            std=_numbers(words["std"], "std", text) if "std" in words else (1.0,),
        )
    after = _pair(words["clip_after"], "clip_after", text) if "clip_after" in words else None
    result = replace(result, clip=clip, clip_after=after)
    if "eps" in words:
        result = replace(result, eps=_number(words["eps"], "eps", text))
    if scope is not None:
        result = replace(result, scope=_scope(scope))
    return check_normalization(result)


def format_normalization(normalization: Normalization) -> str:
    """The words of the command line for a normalisation (its scope apart)."""
    n = normalization
    if n.method == "percentile":
        parts = [f"percentile={_text(n.percentiles)}"]
    elif n.method == "scale":
        parts = [f"scale={_text((n.scale,))}"]
    elif n.method == "fixed":
        parts = [f"mean={_text(n.mean)}", f"std={_text(n.std)}", f"scale={_text((n.scale,))}"]
    else:
        parts = [n.method]
    if n.clip is not None:
        parts.append(f"clip={_text(n.clip)}")
    if n.clip_after is not None:
        parts.append(f"clip_after={_text(n.clip_after)}")
    if n.eps != Normalization("none").eps:
        parts.append(f"eps={_text((n.eps,))}")
    return ";".join(parts)


def check_normalization(n: Normalization) -> Normalization:
    """The same, or ContractError for numbers that make no sense."""
    numbers = (n.scale, *n.percentiles, *n.mean, *n.std, *(n.clip or ()), *(n.clip_after or ()), n.eps)
    if not all(math.isfinite(v) for v in numbers):
        raise ContractError(f"normalisation {format_normalization(n)}: every number must be finite")
    low, high = n.percentiles
    if not 0 <= low < high <= 100:
        raise ContractError(f"percentiles {low:g},{high:g} must rise within 0 to 100; use e.g. percentile=1,99.8")
    if high <= 1:
        raise ContractError(f"percentiles {low:g},{high:g} look like fractions; they are percent: percentile=1,99.8")
    if n.scale <= 0:
        raise ContractError(f"scale {n.scale:g} must be above 0; use the largest grey level, e.g. scale=255")
    if 0 in n.std or not n.mean or not n.std:
        raise ContractError(
            f"std {_text(n.std)} must not be 0 and mean {_text(n.mean)} not empty; one number per channel"
        )
    if len(n.mean) != len(n.std) and 1 not in (len(n.mean), len(n.std)):
        raise ContractError(
            f"mean has {len(n.mean)} numbers and std {len(n.std)}; give one per channel, or one for all"
        )
    if n.clip is not None and not n.clip[0] < n.clip[1]:
        raise ContractError(f"clip {_text(n.clip)} must rise; use e.g. clip=0,4095")
    if n.clip_after is not None and not n.clip_after[0] < n.clip_after[1]:
        raise ContractError(f"clip_after {_text(n.clip_after)} must rise; use e.g. clip_after=0,1")
    if n.eps < 0:
        raise ContractError(f"eps {n.eps:g} must not be negative; leave it out")
    return n


def _method(word: str) -> Method:
    for method in get_args(Method):
        if word == method:
            return method  # type: ignore[no-any-return]
    raise ContractError(f"normalisation method {word!r} is unknown{_close(word, get_args(Method))}; choose {CHOICES}")


def _scope(word: Any) -> Scope:
    for scope in get_args(Scope):
        if word == scope:
            return scope  # type: ignore[no-any-return]
    raise ContractError(f"normalisation scope {word!r} is unknown; choose {', '.join(get_args(Scope))}")


def _text(values: Iterable[float]) -> str:
    return ",".join(repr(int(v)) if float(v).is_integer() and abs(v) < 1e15 else repr(float(v)) for v in values)


def _number(text: str, word: str, whole: str) -> float:
    values = _numbers(text, word, whole)
    if len(values) != 1:
        raise ContractError(f"{whole!r}: {word} is one number, not {len(values)}")
    return values[0]


def _pair(text: str, word: str, whole: str) -> tuple[float, float]:
    values = _numbers(text, word, whole)
    if len(values) != 2:
        raise ContractError(f"{whole!r}: {word} is two numbers, low,high, not {len(values)}")
    return values[0], values[1]


def _numbers(text: str, word: str, whole: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ContractError(f"{whole!r}: {word}={text} is not a number (or numbers by comma)") from None


def _close(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (meant {matches[0]!r}?)" if matches else ""


# JSON --------------------------------------------------------------------------------------------------------------


def contract_from_file(path: str | Path) -> Contract:
    """The contract of a JSON file (``--contract``)."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ContractError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except ValueError as error:
        raise ContractError(f"{path}: not JSON ({error}); see the manual for an example") from error
    if not isinstance(data, dict):
        raise ContractError(f"{path}: holds a {type(data).__name__}; a contract is an object of keys and values")
    try:
        return contract_from_json(data)
    except ContractError as error:
        raise ContractError(f"{path}: {error}") from error


def contract_from_json(data: Mapping[str, Any]) -> Contract:
    """Inverse of ``Contract.to_json``; ``normalization`` may also be the words of the command line.

    Raises:
        ContractError: Unknown keys (with the nearest known one), values of the wrong kind.
    """
    known = [f.name for f in fields(Contract)]
    _check_keys(data, known, "contract")
    values: dict[str, Any] = {}
    for key, value in data.items():
        if value is None:
            continue
        if key in ("channels", "classes"):
            values[key] = _strings(key, value)
        elif key in ("threshold", "pixel_size_um"):
            values[key] = _floats(key, value)
        elif key == "value_range":
            values[key] = _floats(key, value, 2)
        elif key == "trained_tile":
            numbers = _floats(key, value)
            if any(n != int(n) or n < 1 for n in numbers):
                raise ContractError(f"trained_tile {value!r} must be whole pixels above 0, e.g. [512, 512]")
            values[key] = tuple(int(n) for n in numbers)
        elif key == "normalization":
            values[key] = _normalization_from_json(value)
        elif key == "heads":
            values[key] = _heads_from_json(value)
        else:
            values[key] = _word(key, value)
    contract = Contract(**values)
    for threshold in (contract.threshold, *(head.threshold for head in contract.heads)):
        if any(not 0 <= t <= 1 for t in threshold):
            raise ContractError(f"threshold {_text(threshold)} must lie in 0 to 1; it is a probability, e.g. 0.5")
    if any(s <= 0 for s in contract.pixel_size_um):
        raise ContractError(f"pixel_size_um {_text(contract.pixel_size_um)} must be above 0")
    return contract


def _heads_from_json(value: Any) -> tuple[Head, ...]:
    if not isinstance(value, list) or not all(isinstance(v, Mapping) and isinstance(v.get("name"), str) for v in value):
        raise ContractError(f"heads {value!r} must be a list of objects, each with the name of an output of the graph")
    heads = []
    for entry in value:
        _check_keys(entry, [f.name for f in fields(Head)], f"head {entry['name']!r}")
        said = contract_from_json({key: item for key, item in entry.items() if key != "name"})
        heads.append(Head(entry["name"], said.task, said.output_is, said.classes, said.threshold))
    names = [head.name for head in heads]
    if len(set(names)) < len(names):
        raise ContractError(f"heads {', '.join(names)}: one is named twice; declare each output once")
    return tuple(heads)


def _check_keys(data: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in data:
        if key not in known:
            near = _close(str(key), known)
            raise ContractError(f"{what}: unknown key {key!r}{near}; known are {', '.join(known)}")


_WORDS: dict[str, tuple[str, ...]] = {
    "task": get_args(Task),
    "output_is": get_args(OutputIs),
    "border": get_args(Border),
}


def _word(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ContractError(f"{key} {value!r} must be text")
    if key == "axes":
        axes = value.upper()
        if not axes.isalpha() or len(set(axes)) != len(axes) or not {"Y", "X"} <= set(axes):
            raise ContractError(f"axes {value!r} must be different letters with Y and X, e.g. NCYX")
        return axes
    if value not in _WORDS[key]:
        raise ContractError(f"{key} {value!r} is unknown{_close(value, _WORDS[key])}; choose {', '.join(_WORDS[key])}")
    return value


def _strings(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise ContractError(f"{key} {value!r} must be a list of names")
    return tuple(value)


def _floats(key: str, value: Any, count: int | None = None) -> tuple[float, ...]:
    listed = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in listed):
        raise ContractError(f"{key} {value!r} must be a list of finite numbers")
    if count is not None and len(listed) != count:
        raise ContractError(f"{key} {value!r} must have {count} numbers")
    return tuple(float(v) for v in listed)


def _normalization_from_json(value: Any) -> Normalization:
    if isinstance(value, str):
        return parse_normalization(value)
    if not isinstance(value, Mapping):
        raise ContractError(f"normalization {value!r} must be an object, or the words of --normalize")
    _check_keys(value, [f.name for f in fields(Normalization)], "normalization")
    if "method" not in value:
        raise ContractError("normalization has no method; choose " + ", ".join(get_args(Method)))
    values: dict[str, Any] = {"method": _method(str(value["method"]))}
    for key, item in value.items():
        if key == "scope":
            values[key] = _scope(item)
        elif key in ("scale", "eps"):
            values[key] = _floats(key, item, 1)[0]
        elif key in ("percentiles", "clip", "clip_after"):
            values[key] = None if item is None else _floats(key, item, 2)
        elif key in ("mean", "std"):
            values[key] = _floats(key, item)
    return check_normalization(Normalization(**values))


# ONNX metadata -----------------------------------------------------------------------------------------------------

_SINGLE = (
    "normalize", "normalize_scope", "axes", "channels", "task", "output_is", "classes", "threshold", "pixel_size_um",
    "trained_tile", "value_range", "border",
)  # fmt: skip


def contract_from_metadata(metadata: Mapping[str, str]) -> Contract:
    """The contract in an ONNX file's ``metadata_props``; empty where there is none. See the module's docstring."""
    contract = _from_onnx_image_keys(metadata)
    if METADATA_KEY in metadata:
        try:
            data = json.loads(metadata[METADATA_KEY])
        except ValueError as error:
            raise ContractError(
                f"metadata key {METADATA_KEY} is not JSON ({error}); export the network again"
            ) from error
        if not isinstance(data, dict):
            raise ContractError(f"metadata key {METADATA_KEY} is not an object; export the network again")
        contract = contract_from_json(data).over(contract)
    own = {k.removeprefix("unet_rt."): v for k, v in metadata.items() if k.startswith("unet_rt.") and k not in _RECORDS}
    _check_keys(own, _SINGLE, "metadata key unet_rt.<field>")
    values: dict[str, Any] = {}
    for key, text in own.items():
        if key in ("channels", "classes"):
            values[key] = [part.strip() for part in text.split(",")]
        elif key in ("threshold", "pixel_size_um", "trained_tile", "value_range"):
            values[key] = list(_numbers(text, key, f"unet_rt.{key}"))
        elif key == "normalize":
            values["normalization"] = parse_normalization(text, own.get("normalize_scope"))
        elif key != "normalize_scope":
            values[key] = text
    normalization = values.pop("normalization", None)
    if "normalize_scope" in own and normalization is None:
        if contract.normalization is None:
            raise ContractError("metadata has unet_rt.normalize_scope without unet_rt.normalize; add the latter")
        scope = own["normalize_scope"]
        normalization = parse_normalization(format_normalization(contract.normalization), scope)
    single = contract_from_json(values)
    return replace(single, normalization=normalization).over(contract)


def contract_to_metadata(contract: Contract) -> dict[str, str]:
    """What ``export`` writes; :func:`contract_from_metadata` reads it back equal."""
    return {METADATA_KEY: json.dumps(contract.to_json(), sort_keys=True)}


def _from_onnx_image_keys(metadata: Mapping[str, str]) -> Contract:
    """ONNX's documented image keys; keys and values are case-insensitive."""
    lower = {key.lower(): value.strip().lower() for key, value in metadata.items()}
    contract = Contract()
    pixel_range = lower.get("image.nominalpixelrange")
    if pixel_range is not None:
        readings = {
            "nominalrange_0_255": Normalization("none"),
            "normalized_0_1": Normalization("scale", scale=255.0),
            "normalized_1_1": Normalization("fixed", mean=(127.5,), std=(127.5,)),
        }
        if pixel_range not in readings:
            raise ContractError(
                f"metadata Image.NominalPixelRange {pixel_range!r} is not supported; declare it with --normalize: "
                f"{CHOICES}"
            )
        contract = replace(contract, normalization=readings[pixel_range], value_range=(0.0, 255.0))
    pixel_format = lower.get("image.bitmappixelformat")
    if pixel_format is not None:
        orders = {
            "gray8": ("gray",),
            "rgb8": ("red", "green", "blue"),
            "bgr8": ("blue", "green", "red"),
        }
        if pixel_format not in orders:
            raise ContractError(
                f"metadata Image.BitmapPixelFormat {pixel_format!r} is not supported; choose the channels with "
                "--channels"
            )
        contract = replace(contract, channels=orders[pixel_format])
    return contract


# bioimage.io -------------------------------------------------------------------------------------------------------


def contract_from_rdf(
    path: str | Path, work: Path | None = None, *, normalization: Normalization | None = None
) -> tuple[Contract, Path]:
    """(contract, path of the ONNX weights) of a bioimage.io package: see :mod:`unet_rt.bioimageio`."""
    from .bioimageio import read_package

    return read_package(Path(path), work, normalization)


# What is left open -------------------------------------------------------------------------------------------------


def missing_normalization(source: Source) -> ContractError:
    """The refusal of integer pixels with no normalisation declared anywhere: their range, and the choices."""
    low, high = value_range(source)
    return ContractError(
        f"no normalisation is declared, and {source.name} holds {source.dtype} pixels from {low:g} to {high:g}: "
        f"nothing says what the network was trained on. Declare it with --normalize: {CHOICES}"
    )


# Last operators that settle the reading of an output.
_SIGMOID = ("Sigmoid", "HardSigmoid")
_POSITIVE = ("Relu", "Softplus", "Exp", "Abs", "Sqrt")
TOLERANCE = 1e-3  # on probabilities and their sum: FP16 graphs round to 5e-4


class AmbiguousTaskError(ContractError):
    """An output can be read in two ways, which the message names."""


def resolve_task(
    contract: Contract,
    channels: int,
    final_op: str,
    sample: Array | tuple[float, float] | None = None,
) -> Contract:
    """The contract with ``task``, ``output_is`` and ``threshold`` decided.

    What is declared holds, unless the network cannot mean it. What is not follows from the number of channels, the last
    operator and the values on samples:

    ========  ====================  ==================================  ===========================================
    channels  last operator         values on samples                   reading
    ========  ====================  ==================================  ===========================================
    1         Sigmoid, HardSigmoid  any                                 binary probabilities
    1         Relu, Softplus, ...   any                                 regression (logits are negative too)
    1         any other             any                                 error: binary or regression
    2 or more Softmax               any                                 multi-class probabilities
    2 or more LogSoftmax            any                                 multi-class logits (their softmax is the same)
    2 or more Sigmoid, HardSigmoid  any                                 multi-label probabilities
    2 or more any other             in 0..1, sum to 1 over channels     multi-class probabilities
    2 or more any other             in 0..1, do not                     error: multi-label or regression
    2 or more Relu, Softplus, ...   else                                error: multi-class or regression
    2 or more any other             else, or none                       multi-class logits
    ========  ====================  ==================================  ===========================================

    One channel is never an argmax. Networks for several classes whose loss takes logits end in a convolution; that is
    by far the usual meaning of several channels, so that it is not called ambiguous. A threshold not declared is 0.5.

    Args:
        channels: Of the output.
        final_op: Last operator of the graph that computes this output.
        sample: Raw outputs (N, K, *spatial), or their (lowest, highest) value; None where nothing was run.

    Raises:
        AmbiguousTaskError: Two readings are possible; both are named.
        ContractError: What is declared contradicts the network.
    """
    if final_op in ("ArgMax", "ArgMin"):
        raise ContractError(
            f"the network ends in {final_op}: its output are labels, which cannot be stitched from; export it without"
        )
    if final_op == "Softmax" and channels == 1:
        raise ContractError(
            "the network ends in a Softmax over one channel, which is 1 everywhere; export it with a Sigmoid, or raw"
        )
    task = contract.task or _task(contract, channels, final_op, sample)
    output_is = contract.output_is or _output_is(task, final_op, sample)
    _check_task(task, output_is, channels, final_op)
    threshold = contract.threshold
    if task in ("binary", "multilabel"):
        threshold = threshold or (0.5,)
        if len(threshold) not in (1, channels):
            many = "one threshold" if channels == 1 else f"one threshold, or {channels}"
            raise ContractError(f"{len(threshold)} thresholds for {channels} output channel(s); give {many}")
        if any(not 0 <= t <= 1 for t in threshold):
            raise ContractError(f"threshold {_text(threshold)} must lie in 0 to 1; it is a probability, e.g. 0.5")
    elif threshold:
        raise ContractError(
            f"a threshold is declared ({_text(threshold)}), and a {task} output has none; leave it out, or declare "
            "--task binary or multilabel"
        )
    allowed = (1, 2) if task == "binary" else (channels,)
    if contract.classes and len(contract.classes) not in allowed:
        raise ContractError(
            f"{len(contract.classes)} classes are named ({', '.join(contract.classes)}) for {channels} output "
            f"channels; name {' or '.join(map(str, allowed))}"
        )
    twice = next((name for k, name in enumerate(contract.classes) if name in contract.classes[:k]), None)
    if twice is not None:  # figures are kept by name
        raise ContractError(
            f"two classes are named {twice!r} ({', '.join(contract.classes)}); give each a name of its own"
        )
    return replace(contract, task=task, output_is=output_is, threshold=threshold)


def first_contract(contract: Contract, names: Sequence[str]) -> Contract:
    """The contract as that of the first output alone: its own words, then those of a head of that output's name.

    Raises:
        ContractError: A head is declared that none of the outputs ``names`` is called.
    """
    unknown = [head.name for head in contract.heads if head.name not in names]
    if unknown:
        raise ContractError(f"the contract declares a head {unknown[0]!r}; the outputs are {', '.join(names)}")
    return replace(contract, heads=()).over(contract.of_head(names[0]))


def resolve_heads(
    contract: Contract,
    outputs: Sequence[tuple[str, int, str]],
    samples: Sequence[Array | None],
    *,
    left_open: Callable[[str], None] | None = None,
) -> Contract:
    """:func:`resolve_task` for every output of a network: the first is the contract's own, the others are its heads.

    Of the others, what is declared holds; a last operator that tells (Sigmoid, Softmax) is believed; the rest stay open,
    since nobody may ever ask for them, and neither an error about them nor a budget that they were never meant to hold
    should keep the first one from use.

    Args:
        contract: As declared. A head of the first output's name declares that one.
        outputs: (name, channels, last operator) of every output.
        samples: Its raw values, as for :func:`resolve_task`.
        left_open: Receives the two readings of the first output where there are two, and its task stays open; None: that
            is an error.

    Raises:
        ContractError: As for :func:`resolve_task`; a head that no output has the name of.
    """
    names = [name for name, _, _ in outputs]
    first = first_contract(contract, names)
    resolved, heads = first, list[Head]()
    for k, ((name, channels, final_op), sample) in enumerate(zip(outputs, samples, strict=True)):
        said = contract.of_head(name) if k else first
        if k and all(head.name != name for head in contract.heads):
            if final_op not in (*_SIGMOID, "Softmax", "LogSoftmax") or (final_op == "Softmax" and channels == 1):
                heads.append(Head(name))
                continue
            said = replace(said, task=None, output_is=None, classes=(), threshold=())
        try:
            found = resolve_task(said, channels, final_op, sample)
        except ContractError as error:
            text = f"output {name}: {error}" if len(names) > 1 else str(error)
            if k or left_open is None or not isinstance(error, AmbiguousTaskError):
                raise type(error)(text) from error
            left_open(text)
            found = said
        if k:
            heads.append(Head(name, found.task, found.output_is, found.classes, found.threshold))
        else:
            resolved = found
    return replace(resolved, heads=tuple(heads))


def _task(contract: Contract, channels: int, final_op: str, sample: Array | tuple[float, float] | None) -> Task:
    said, many = contract.output_is, channels > 1
    if said == "values":
        return "regression"
    if final_op in _SIGMOID:
        return "multilabel" if many else "binary"
    if final_op in ("Softmax", "LogSoftmax"):
        return "multiclass"
    if said is not None and not many:
        return "binary"  # logits or probabilities of one channel
    range_text = _range_text(sample)
    if not many:
        if final_op in _POSITIVE:
            return "regression"
        raise AmbiguousTaskError(
            f"the output has one channel, its last operator is {final_op}{range_text}: it can be the logit of a "
            "binary mask or the value of a regression; say which with --task binary or --task regression"
        )
    if said == "logits":
        return "multiclass"
    sums = _sums_to_one(sample)
    if _within_unit(sample):
        if sums:
            return "multiclass"
        if said == "probabilities" and sums is False:
            return "multilabel"
        raise AmbiguousTaskError(
            f"the output has {channels} channels in 0 to 1{'' if sums is None else ' that do not add up to one'}, its "
            "last "
            f"operator is {final_op}: it can be multi-label probabilities or the values of a regression; say which "
            "with --task multilabel or --task regression"
        )
    if said == "probabilities":
        raise AmbiguousTaskError(
            f"the output is declared probabilities, has {channels} channels, its last operator is "
            f"{final_op}{range_text}: "
            "it can be multi-class or multi-label; say which with --task multiclass or --task multilabel"
        )
    if final_op in _POSITIVE:
        raise AmbiguousTaskError(
            f"the output has {channels} channels, its last operator is {final_op}{range_text}: it can be multi-class "
            "logits or the values of a regression; say which with --task multiclass or --task regression"
        )
    return "multiclass"


def _output_is(task: Task, final_op: str, sample: Array | tuple[float, float] | None) -> OutputIs:
    if task == "regression":
        return "values"
    if final_op in (*_SIGMOID, "Softmax"):
        return "probabilities"
    if final_op == "LogSoftmax" or not _within_unit(sample):
        return "logits"
    if task == "multiclass":
        return "probabilities" if _sums_to_one(sample) else "logits"
    return "probabilities"


def _check_task(task: Task, output_is: OutputIs, channels: int, final_op: str) -> None:
    if task == "binary" and channels != 1:
        raise ContractError(
            f"a binary task has one output channel, this network {channels}; use --task multiclass (argmax) or "
            "multilabel"
        )
    if task in ("multiclass", "multilabel") and channels == 1:
        raise ContractError(
            f"a {task} task has several output channels, this network one; use --task binary or --task regression"
        )
    if (task == "regression") != (output_is == "values"):
        raise ContractError(
            f"task {task} and output {output_is} contradict each other; regression goes with values, the others with "
            "logits or probabilities"
        )
    if final_op in (*_SIGMOID, "Softmax") and output_is == "logits":
        raise ContractError(
            f"the output is declared logits, but the network ends in {final_op}; use --output-is probabilities"
        )
    if (task, final_op) in (("multilabel", "Softmax"), ("multilabel", "LogSoftmax")):
        raise ContractError(
            f"the task is declared multilabel, but the network ends in {final_op}; use --task multiclass"
        )


def _range(sample: Array | tuple[float, float] | None) -> tuple[float, float] | None:
    if sample is None:
        return None
    if isinstance(sample, tuple):
        return float(sample[0]), float(sample[1])
    return (float(np.min(sample)), float(np.max(sample))) if sample.size else None


def _range_text(sample: Array | tuple[float, float] | None) -> str:
    limits = _range(sample)
    return "" if limits is None else f", its values on samples {limits[0]:.4g} to {limits[1]:.4g}"


def _within_unit(sample: Array | tuple[float, float] | None) -> bool:
    limits = _range(sample)
    return limits is not None and limits[0] >= -TOLERANCE and limits[1] <= 1 + TOLERANCE


def _sums_to_one(sample: Array | tuple[float, float] | None) -> bool | None:
    """Whether channels add up to one; None where only a range is known."""
    if sample is None or isinstance(sample, tuple) or sample.ndim < 2 or not sample.size:
        return None
    return bool(np.abs(sample.sum(axis=1, dtype=np.float64) - 1).max() <= TOLERANCE * sample.shape[1])


# Encoders of segmentation_models_pytorch by the beginning of their names. The library itself asks its hub for these
# numbers since version 0.4; unet-rt downloads nothing. Colours are red, green, blue scaled to [0, 1] in all of them.
SMP_HALF = ((0.5,) * 3, (0.5,) * 3)
SMP_IMAGENET = (IMAGENET.mean, IMAGENET.std)
SMP_ENCODERS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    **dict.fromkeys(
        (
            "resnet", "resnext", "densenet", "vgg", "mobilenet", "efficientnet", "timm-efficientnet", "timm-resnest",
            "timm-res2", "timm-regnet", "timm-skres", "timm-mobilenet", "se_res", "senet", "mit_b", "mobileone",
        ),
        SMP_IMAGENET,
    ),
    **dict.fromkeys(("inception", "xception"), SMP_HALF),
    "dpn": ((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3),
    "timm-gernet": ((0.0,) * 3, (1.0,) * 3),
}  # fmt: skip


def contract_from_smp(encoder: str, *, weights: str | None = "imagenet", classes: tuple[str, ...] = ()) -> Contract:
    """What a network of segmentation_models_pytorch expects: the normalisation that its encoder was trained with.

    Args:
        encoder: As given to the network, e.g. ``"resnet34"``.
        weights: As given to the network; a network trained from the start is normalised as you trained it.
        classes: Names of the classes.

    Raises:
        ContractError: the encoder is not known.
    """
    if encoder.startswith("tu-"):
        mean, std = _timm(encoder.removeprefix("tu-"))
    else:
        found = [v for name, v in SMP_ENCODERS.items() if encoder.startswith(name)]
        if not found:
            raise ContractError(
                f"the normalisation of encoder {encoder!r} is not known here; declare it, e.g. "
                "Contract(normalization=parse_normalization('imagenet'))"
            )
        mean, std = SMP_HALF if weights == "advprop" else found[0]
    normalization = Normalization("fixed", scale=255.0, mean=mean, std=std)
    return Contract(
        axes="NCYX", channels=("red", "green", "blue"), normalization=normalization, output_is="logits", classes=classes
    )


def _timm(encoder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) from timm's own table, which is part of its package."""
    try:
        from timm.models import get_pretrained_cfg
    except ModuleNotFoundError as error:
        raise ContractError(f"timm is missing, which knows how {encoder} wants pixels; pip install timm") from error
    found = get_pretrained_cfg(encoder)
    if found is None:
        raise ContractError(f"timm knows no encoder {encoder!r}; declare the normalisation of your own training")
    return tuple(float(m) for m in found.mean), tuple(float(v) for v in found.std)
