"""Normalisation in the words of the command line, to and from a contract."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, get_args

from ..errors import ContractError
from .contract import Method, Normalization, Scope

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
            raise ContractError(
                f"--normalize {text!r}: {word!r} is unknown{suggestion(word, choices)}; choose {CHOICES}"
            )
    fixed: list[str] = [w for w in ("mean", "std", "scale") if w in words]
    if len(heads) + bool(fixed) != 1:
        said = " and ".join(heads + fixed) or "no method"
        raise ContractError(f"--normalize {text!r} names {said}; choose one of {CHOICES}")
    clip = _pair(words["clip"], "clip", text) if "clip" in words else None
    if heads:
        head, value = heads[0], words[heads[0]]
        if value and head != "percentile":
            raise ContractError(f"--normalize {text!r}: {head} takes no number; write {head} alone")
        result = IMAGENET if head == "imagenet" else Normalization(method_of(head))
        if head == "percentile" and value:
            result = replace(result, percentiles=_pair(value, "percentile", text))
    elif fixed == ["scale"]:
        result = Normalization("scale", scale=_number(words["scale"], "scale", text))
    else:
        result = Normalization(
            "fixed",
            scale=_number(words["scale"], "scale", text) if "scale" in words else 1.0,
            mean=parse_numbers(words["mean"], "mean", text) if "mean" in words else (0.0,),
            std=parse_numbers(words["std"], "std", text) if "std" in words else (1.0,),
        )
    after = _pair(words["clip_after"], "clip_after", text) if "clip_after" in words else None
    result = replace(result, clip=clip, clip_after=after)
    if "eps" in words:
        result = replace(result, eps=_number(words["eps"], "eps", text))
    if scope is not None:
        result = replace(result, scope=scope_of(scope))
    return check_normalization(result)


def format_normalization(normalization: Normalization) -> str:
    """The words of the command line for a normalisation (its scope apart)."""
    n = normalization
    if n.method == "percentile":
        parts = [f"percentile={numbers_text(n.percentiles)}"]
    elif n.method == "scale":
        parts = [f"scale={numbers_text((n.scale,))}"]
    elif n.method == "fixed":
        parts = [f"mean={numbers_text(n.mean)}", f"std={numbers_text(n.std)}", f"scale={numbers_text((n.scale,))}"]
    else:
        parts = [n.method]
    if n.clip is not None:
        parts.append(f"clip={numbers_text(n.clip)}")
    if n.clip_after is not None:
        parts.append(f"clip_after={numbers_text(n.clip_after)}")
    if n.eps != Normalization("none").eps:
        parts.append(f"eps={numbers_text((n.eps,))}")
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
            f"std {numbers_text(n.std)} must not be 0 and mean {numbers_text(n.mean)} not empty; one number per channel"
        )
    if len(n.mean) != len(n.std) and 1 not in (len(n.mean), len(n.std)):
        raise ContractError(
            f"mean has {len(n.mean)} numbers and std {len(n.std)}; give one per channel, or one for all"
        )
    if n.clip is not None and not n.clip[0] < n.clip[1]:
        raise ContractError(f"clip {numbers_text(n.clip)} must rise; use e.g. clip=0,4095")
    if n.clip_after is not None and not n.clip_after[0] < n.clip_after[1]:
        raise ContractError(f"clip_after {numbers_text(n.clip_after)} must rise; use e.g. clip_after=0,1")
    if n.eps < 0:
        raise ContractError(f"eps {n.eps:g} must not be negative; leave it out")
    return n


def method_of(word: str) -> Method:
    for method in get_args(Method):
        if word == method:
            return method  # type: ignore[no-any-return]
    raise ContractError(
        f"normalisation method {word!r} is unknown{suggestion(word, get_args(Method))}; choose {CHOICES}"
    )


def scope_of(word: Any) -> Scope:
    for scope in get_args(Scope):
        if word == scope:
            return scope  # type: ignore[no-any-return]
    raise ContractError(f"normalisation scope {word!r} is unknown; choose {', '.join(get_args(Scope))}")


def numbers_text(values: Iterable[float]) -> str:
    return ",".join(repr(int(v)) if float(v).is_integer() and abs(v) < 1e15 else repr(float(v)) for v in values)


def _number(text: str, word: str, whole: str) -> float:
    values = parse_numbers(text, word, whole)
    if len(values) != 1:
        raise ContractError(f"{whole!r}: {word} is one number, not {len(values)}")
    return values[0]


def _pair(text: str, word: str, whole: str) -> tuple[float, float]:
    values = parse_numbers(text, word, whole)
    if len(values) != 2:
        raise ContractError(f"{whole!r}: {word} is two numbers, low,high, not {len(values)}")
    return values[0], values[1]


def parse_numbers(text: str, word: str, whole: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ContractError(f"{whole!r}: {word}={text} is not a number (or numbers by comma)") from None


def suggestion(word: str, known: Iterable[str]) -> str:
    import difflib  # for errors only, and slow to import

    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (meant {matches[0]!r}?)" if matches else ""
