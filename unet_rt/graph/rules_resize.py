"""What resizing does to stride, halo and exactness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import numpy as np

from . import line as lines
from .file import Node
from .line import Line, Sampling
from .numbers import Follower, Number, plain_number
from .tensor import (
    CannotRun,
    Inputs,
    Tensor,
    Walk,
    axis_size,
    first_input,
    is_tracked,
    numbers_of,
    plain,
    rule,
    sole_line,
    unknown,
    value_of,
)

# Samples along an axis, for which what float32 makes of sizes and positions is looked through; no image has more.
_LONGEST = 1 << 22
# A bound from here on is none to speak of.
_SPOKEN_OF = 1 << 20

# ---------------------------------------------------------------------------------------------------------- resize


@rule("Resize", "Upsample", numbers=(3,))
def _resize(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, a = first_input(x), node.attributes
    rank = first.rank
    old = node.op == "Upsample" or state.graph.opset < 11
    position = 1 if old else 2
    given_scales = a.get("scales", value_of(x[position]) if len(x) > position else None)
    given_sizes = value_of(x[3]) if len(x) > 3 else None
    scales = None if given_scales is None or len(given_scales) == 0 else [float(s) for s in given_scales]
    sizes = None if given_sizes is None or len(given_sizes) == 0 else [int(s) for s in given_sizes]
    if scales is None and sizes is None:
        return unknown(state, node, x, "takes its size from the image")
    axes = [int(k) % rank for k in a.get("axes", range(rank))]
    policy = a.get("keep_aspect_ratio_policy", "stretch")
    result = list(first.axes or ())
    texts: list[str] = []
    notes: list[str] = []
    wanted = [] if sizes is None or x[3] is None or x[3].followed is None else numbers_of(x[3])
    meant: dict[int, Fraction] = {}
    follower = state.follower(node)
    for number, k in zip(wanted, axes, strict=False):
        if policy != "stretch" or _proportion(number, state.length(result[k])) is None:
            texts.append("resizes by a factor that changes with the size of the image")
            meant[k] = _factor_meant(number, state.length(result[k]))
    if sizes is not None and policy != "stretch":
        sizes = _in_proportion(sizes, [axis_size(result[k]) for k in axes], policy)
    for i, k in enumerate(axes):
        n = axis_size(result[k])
        if sizes is not None:
            size, factor = sizes[i], meant.get(k) or Fraction(sizes[i], n)
        elif scales is not None:
            # As the backends do: the scale and the product in float32.
            size = int(np.floor(np.float32(scales[i]) * np.float32(n)))
            factor = _fraction(scales[i])
            texts += _sizes_held(follower, state.length(result[k]), n, scales[i], factor)
        if size < 1:
            raise CannotRun(f"leaves {size} samples")
        if size == n and factor == 1:
            continue
        line = sole_line(result[k])
        if line is None:
            if is_tracked(result[k]):
                texts.append("resizes a flattened axis")
            result[k] = plain(size)
            continue
        if sizes is not None and x[3].followed is None:  # type: ignore[union-attr]
            texts.append(f"resizes to {size} samples whatever the size of the image")
        if a.get("mode", "nearest") == "nearest" and (most := _positions_held(factor)) < _SPOKEN_OF:
            follower.holds(plain_number(most) - state.length(result[k]))
        moved, fault, note = _resize_line(node, line, size, factor)
        result[k] = (moved,)
        texts += fault
        notes += note
    return [
        Tensor(
            tuple(result),
            first.dtype,
            faults=frozenset(state.remark(node, t) for t in texts),
            notes=frozenset(state.remark(node, t) for t in notes),
            bounds=frozenset(follower.bounds),
        )
    ]


def _in_proportion(sizes: Sequence[int], given: Sequence[int], policy: str) -> list[int]:
    """The sizes nearest to ``sizes`` in the proportion of ``given``: none larger, or none smaller."""
    ratios = [size / n for n, size in zip(given, sizes, strict=True)]
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [round(ratio * n) for n in given]


def _sizes_held(follower: Follower, length: Number, n: int, scale: float, factor: Fraction) -> list[str]:
    """Why ``scale`` in float32 gives other sizes than ``factor``; finds up to where it does not.

    0.7 in float32 is below 7/10, and in some products with a size so is what is rounded down: a sample less.
    """
    if Fraction(float(np.float32(scale))) == factor:
        return []
    wrong = _wrong_sizes(scale, factor, n % factor.denominator)
    if n in wrong:
        return [f"resizes by a factor of {factor}, which float32 rounds: {n} samples give one less"]
    below, above = wrong[wrong < n], wrong[wrong > n]
    if len(below):
        follower.holds(length - plain_number(int(below[-1]) + 1))
    if len(above):
        follower.holds(plain_number(int(above[0]) - 1) - length)
    return []


@lru_cache(maxsize=64)
def _wrong_sizes(scale: float, factor: Fraction, residue: int) -> lines.Integers:
    """Sizes of this residue modulo the denominator of ``factor`` that float32 does not take to the size they are due."""
    sizes = np.arange(residue, _LONGEST, factor.denominator, dtype=np.int64)
    made = np.floor(np.float32(scale) * sizes.astype(np.float32)).astype(np.int64)
    wrong: lines.Integers = sizes[made != sizes * factor.numerator // factor.denominator]
    return wrong


def _positions_held(factor: Fraction) -> int:
    """Samples up to which float32 cannot move a position past the border between two neighbours, unless it lies on it."""
    if _is_power_of_two(factor.numerator) and _is_power_of_two(factor.denominator):
        return _LONGEST  # float32 holds every position
    # Borders lie at whole or half samples, positions at multiples of half the denominator of the step between them.
    return int(Fraction(2**23, 2 * factor.numerator))


def _proportion(number: Number, length: Number) -> Fraction | None:
    """``number`` / ``length`` where that is the same at all sizes of the image."""
    ratios = {c / length.terms[m] for m, c in number.terms.items() if m in length.terms}
    return ratios.pop() if len(ratios) == 1 and set(number.terms) == set(length.terms) else None


def _factor_meant(number: Number, length: Number) -> Fraction:
    """What ``number`` / ``length`` tends to in large images; 0 where that is no factor.

    At another size of the image it may be just that: strides and sizes are looked for on it, rather than on a ratio of
    chance.
    """
    ratios = {c / length.terms[m] for m, c in number.terms.items() if m and m in length.terms}
    factor = ratios.pop() if len(ratios) == 1 else Fraction(0)
    return max(factor, Fraction(0))


def _fraction(scale: float) -> Fraction:
    """The simple fraction that a float32 scale stands for."""
    simple = Fraction(scale).limit_denominator(256)
    return (
        simple if simple > 0 and abs(float(simple) / scale - 1) < 2e-7 else Fraction(scale).limit_denominator(1 << 20)
    )


def _resize_line(node: Node, line: Line, size: int, factor: Fraction) -> tuple[Line, list[str], list[str]]:
    a = node.attributes
    old = node.op == "Upsample"
    mode = {"bilinear": "linear", "trilinear": "linear"}.get(a.get("mode", "nearest"), a.get("mode", "nearest"))
    coordinates = a.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    rounding = a.get("nearest_mode", "floor" if old else "round_prefer_floor")
    texts: list[str] = []
    notes: list[str] = []
    slope, half = 1 / factor, Fraction(1, 2)
    n = line.size
    if coordinates == "align_corners":
        texts.append("aligns corners: its positions stretch with the size")
        sampling = Sampling(Fraction(n - 1, size - 1) if size > 1 and n > 1 else slope, Fraction(0))
    elif coordinates == "asymmetric":
        sampling = Sampling(slope, Fraction(0))
    elif coordinates == "tf_half_pixel_for_nn":
        sampling = Sampling(slope, slope / 2)
    elif coordinates in ("half_pixel", "pytorch_half_pixel"):
        sampling = Sampling(slope, slope / 2 - half)
    elif coordinates == "half_pixel_symmetric":
        sampling = Sampling(slope, slope / 2 - half)
        if factor * n != size:
            texts.append("centres on the image (half_pixel_symmetric), which shifts with the size")
    else:
        texts.append(f"reads by {coordinates}, which depends on the size")
        sampling = Sampling(slope, slope / 2 - half)
    dyadic = _is_power_of_two(factor.numerator) and _is_power_of_two(factor.denominator)
    if mode == "nearest":
        exact_scale = Fraction(float(np.float32(float(factor)))) == factor
        if not exact_scale and lines.near_tie(sampling, size, rounding):
            texts.append(f"picks neighbours by a factor of {factor}, which float32 coordinates decide by rounding")
        moved = lines.nearest(line, sampling, size, rounding)
    elif mode in ("linear", "cubic"):
        moved = lines.interpolate(line, sampling, size, mode, bool(a.get("antialias", 0)))
        if not dyadic and coordinates != "align_corners":
            notes.append(
                f"({mode}, factor {factor}) is exact up to float32 coordinates: at most about {_drift(200):.0e} of the "
                f"difference between neighbours near pixel 200, {_drift(60_000):.0e} near pixel 60,000"
            )
    else:
        texts.append(f"interpolates by {mode}, which is unknown")
        moved = lines.interpolate(line, sampling, size, "cubic", False)
    if coordinates == "align_corners":  # for the report: what the factor would be without the stretch
        ratio = Fraction(size, n)
        scale = line.scale * ratio
        moved = replace(
            moved,
            scale=scale,
            place=line.place + (1 / ratio / 2 - half) / line.scale,
            stride=math.lcm(line.stride, scale.denominator),
        )
    return moved, texts, notes


def _drift(pixel: int) -> float:
    """Rounding of a float32 coordinate near ``pixel``."""
    return pixel * 2.0**-24


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0
