"""Preprocessing of a bioimage.io description as a normalisation.

Steps of the preprocessing are composed into one normalisation ``(clip(x) - offset) / divisor``: ``scale_linear``,
``zero_mean_unit_variance`` (fixed or per sample), ``fixed_zero_mean_unit_variance``, ``scale_range``, ``clip`` before
and after them, ``ensure_dtype`` to a float. A step that this form cannot hold is an error that names it; none is skipped.

Statistics "per sample" are taken per plane (scope ``slice``): for a 2-D network each picture of a stack is a sample.
Where the step takes the channels of several together, they are taken over the whole image (scope ``image``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ContractError
from .contract import Normalization, Scope
from .rdf_axes import Axis
from .words import check_normalization


@dataclass
class _Chain:
    """Steps so far: ``y = (x - offset) / divisor`` per channel, or a statistic of that, after ``clip``."""

    offset: tuple[float, ...] = (0.0,)
    divisor: tuple[float, ...] = (1.0,)
    clip: tuple[float, float] | None = None
    clip_after: tuple[float, float] | None = None
    measured: Normalization | None = None
    plain: bool = True  # nothing but clips so far


def compose(steps: Sequence[Any], axes: Sequence[Axis], channels: int | None, name: str) -> Normalization:
    """The normalisation that the steps of a tensor come to; ``name`` is what errors call the description."""
    chain = _Chain()
    for step in steps:
        if not isinstance(step, Mapping):
            raise ContractError(f"{name}: preprocessing step {step!r} is not readable; download the package again")
        _add(chain, step, axes, channels, name)
    if chain.measured is not None:
        found = chain.measured
    elif chain.plain:
        found = Normalization("none")
    elif chain.offset == (0.0,) and len(chain.divisor) == 1 and chain.divisor[0] > 0:
        found = Normalization("scale", scale=chain.divisor[0])
    else:
        found = Normalization("fixed", mean=chain.offset, std=chain.divisor)
    return check_normalization(replace(found, clip=chain.clip, clip_after=chain.clip_after))


def _add(chain: _Chain, step: Mapping[str, Any], axes: Sequence[Axis], channels: int | None, name: str) -> None:
    what = str(step.get("id") or step.get("name"))
    kwargs = dict(step.get("kwargs") or {})
    if what == "ensure_dtype":
        if not str(kwargs.get("dtype")).startswith("float"):
            raise _unsupported(name, what, f"dtype {kwargs.get('dtype')}: rounding to integers")
        return
    if chain.clip_after is not None:
        raise _unsupported(name, what, "after a clip of scaled values")
    if what == "clip":
        first = chain.plain and chain.measured is None
        if (first and chain.clip is not None) or None in (kwargs.get("min"), kwargs.get("max")):
            raise _unsupported(name, what, "unless it comes once before and once after the others, with min and max")
        ends = (float(kwargs["min"]), float(kwargs["max"]))
        if first:
            chain.clip = ends
        else:
            chain.clip_after = ends
    elif chain.measured is not None:
        raise _unsupported(name, what, f"after {chain.measured.method} statistics")
    elif what == "scale_linear":
        _per_channel_only(kwargs, axes, name, what)
        gain, offset = numbers_of(kwargs.get("gain", 1.0)), numbers_of(kwargs.get("offset", 0.0))
        if 0 in gain:
            raise _unsupported(name, what, "with gain 0")
        # gain * y + offset = (y - (-offset / gain)) / (1 / gain)
        _then(chain, [-o / g for g, o in _pairs(gain, offset)], [1 / g for g, _ in _pairs(gain, offset)])
    elif what == "fixed_zero_mean_unit_variance" or (
        what == "zero_mean_unit_variance"
        and kwargs.get("mode", "fixed" if "mean" in kwargs else "per_sample") == "fixed"
    ):
        _per_channel_only(kwargs, axes, name, what)
        mean, std = numbers_of(kwargs.get("mean", 0.0)), numbers_of(kwargs.get("std", 1.0))
        _then(chain, [m for m, _ in _pairs(mean, std)], [s for _, s in _pairs(mean, std)])
    elif what in ("zero_mean_unit_variance", "scale_range"):
        _measure(chain, what, kwargs, axes, channels, name)
    else:
        raise _unsupported(name, what, "")


def _measure(
    chain: _Chain, what: str, kwargs: Mapping[str, Any], axes: Sequence[Axis], channels: int | None, name: str
) -> None:
    if kwargs.get("mode") == "per_dataset":
        raise _unsupported(name, what, "with mode per_dataset: statistics of a data set that is not here")
    if kwargs.get("reference_tensor") is not None:
        raise _unsupported(name, what, f"with reference_tensor {kwargs['reference_tensor']}")
    if len(chain.divisor) != 1 or chain.divisor[0] <= 0:
        raise _unsupported(name, what, "after a scaling per channel")
    scope = _scope(kwargs.get("axes"), axes, channels, name, what)
    # Statistics undo a linear step before them; only eps, in grey levels, feels its scale.
    eps = float(kwargs.get("eps", 1e-6)) * chain.divisor[0]
    if what == "zero_mean_unit_variance":
        chain.measured = Normalization("zscore", scope=scope, eps=eps)
        return
    low, high = float(kwargs.get("min_percentile", 0.0)), float(kwargs.get("max_percentile", 100.0))
    if (low, high) == (0.0, 100.0):
        chain.measured = Normalization("minmax", scope=scope, eps=eps)
    else:
        chain.measured = Normalization("percentile", scope=scope, percentiles=(low, high), eps=eps)


def _scope(kept: Any, axes: Sequence[Axis], channels: int | None, name: str, what: str) -> Scope:
    """What statistics over the listed axes are in the words of the contract."""
    if kept is None:
        keys = {a.key for a in axes}
    else:
        keys = set(kept)  # a string of letters in 0.4, a list of names in 0.5
    known = {a.key: a.letter for a in axes}
    strange = keys - set(known)
    if strange:
        raise _unsupported(name, what, f"over axes {sorted(strange)}, which the tensor does not have")
    letters = {known[key] for key in keys}
    missing = [a.letter for a in axes if a.letter in "ZYX" and a.letter not in letters]
    if missing:
        raise _unsupported(name, what, f"over axes without {', '.join(missing)}")
    together = "C" in letters and channels != 1
    if together:
        return "image"
    return "channel" if "N" in letters else "slice"


def _per_channel_only(kwargs: Mapping[str, Any], axes: Sequence[Axis], name: str, what: str) -> None:
    axis = kwargs.get("axis")
    if axis is not None and {a.key: a.letter for a in axes}.get(str(axis)) != "C":
        raise _unsupported(name, what, f"along axis {axis}")


def _then(chain: _Chain, offset: Sequence[float], divisor: Sequence[float]) -> None:
    """Adds ``(y - offset) / divisor`` to ``y = (x - o) / d``: ``(x - (o + d * offset)) / (d * divisor)``."""
    pairs = _pairs(_pairs(chain.offset, chain.divisor), _pairs(tuple(offset), tuple(divisor)))
    chain.offset = tuple(o + d * m for (o, d), (m, _) in pairs)
    chain.divisor = tuple(d * s for (_, d), (_, s) in pairs)
    chain.plain = False


def numbers_of(value: Any) -> tuple[float, ...]:
    """One number per channel, or one for all, as the description has them."""
    return tuple(float(v) for v in value) if isinstance(value, (list, tuple)) else (float(value),)


def _pairs(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Both by channel, one number standing for all."""
    count = max(len(a), len(b))
    if len(a) not in (1, count) or len(b) not in (1, count):
        raise ContractError(f"steps for {len(a)} and {len(b)} channels follow each other; download the package again")
    return [(a[i if len(a) > 1 else 0], b[i if len(b) > 1 else 0]) for i in range(count)]


def _unsupported(name: str, what: str, how: str) -> ContractError:
    return ContractError(
        f"{name}: preprocessing {what}{' ' + how if how else ''} is not supported; declare what the network gets with "
        "--normalize"
    )
