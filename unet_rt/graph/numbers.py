"""Numbers that a graph computes from the size of its image, followed as functions of that size.

A walk knows such a number at one size. Here it is a polynomial in the size along each axis, with the sizes for which it is
that polynomial: comparisons, branches, Min and Max hold up to some size, floors and remainders for sizes of one residue.
What is no such polynomial is lost, and says so: nothing is taken for granted between or beyond the sizes walked at.

Worked example: ``(32 - h % 32) % 32`` at h = 64. ``h % 32`` is 0 for all h that are 64 modulo 32, so the number is 0 there.
``Min(h, 1500)`` is h, for h up to 1500.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

# A sentence about a node, with the node's place in the graph to sort by.
Remark = tuple[int, str]
# Axes that are multiplied with each other; () belongs to the constant.
Monomial = tuple[int, ...]

# Down-sampling beyond this is no network for images but a size baked into the graph.
MAX_STRIDE = 2048
MAX_MODULUS = 2048
_MAX_DEGREE = 3
# Sizes from here on are no image's, and bounds there none to speak of.
_ENDLESS = 1 << 24
# Whole numbers up to here are float32, and halves, quarters, ... accordingly less.
_FLOAT_DIGITS = 1 << 24


class LostError(Exception):
    """A number cannot be followed. Raised and caught while a graph is walked, never shown."""


@dataclass(frozen=True)
class Bound:
    """Sizes along one axis of the image at which numbers are what they were followed to be.

    Attributes:
        axis: The spatial axis.
        node: The node that computes them.
        modulus: Sizes are those of the walk modulo this.
        low, high: The smallest and the largest of them, None: any.
    """

    axis: int
    node: Remark
    modulus: int = 1
    low: int = 1
    high: int | None = None


def lengthened(strides: Sequence[int], bounds: Iterable[Bound]) -> tuple[int, ...]:
    """``strides`` that keep the residues at which numbers of the graph stay what they are, as far as they are strides."""
    result = list(strides)
    for bound in bounds:
        both = math.lcm(result[bound.axis], bound.modulus)
        result[bound.axis] = both if both <= MAX_STRIDE else result[bound.axis]
    return tuple(result)


@dataclass(frozen=True)
class Number:
    """A polynomial in the sizes of the image.

    ``rounded``: as float32 it may be rounded, once. ``floored``: it is whole at the sizes of its bounds, whatever its terms.
    """

    terms: Mapping[Monomial, Fraction]
    rounded: bool = False
    floored: bool = False

    @property
    def whole(self) -> bool:
        return not self.rounded and (self.floored or all(c.denominator == 1 for c in self.terms.values()))

    @property
    def constant(self) -> bool:
        return all(m == () for m in self.terms)

    def at(self, sizes: Sequence[int]) -> Fraction:
        return sum((c * math.prod(sizes[a] for a in m) for m, c in self.terms.items()), Fraction(0))

    def __add__(self, other: Number) -> Number:
        terms = dict(self.terms)
        for m, c in other.terms.items():
            terms[m] = terms.get(m, Fraction(0)) + c
        return Number({m: c for m, c in terms.items() if c}, floored=self.whole and other.whole)

    def __neg__(self) -> Number:
        return Number({m: -c for m, c in self.terms.items()}, self.rounded, self.floored)

    def __sub__(self, other: Number) -> Number:
        return self + -other

    def __mul__(self, other: Number) -> Number:
        terms: dict[Monomial, Fraction] = {}
        for m, c in self.terms.items():
            for k, d in other.terms.items():
                both = tuple(sorted((*m, *k)))
                if len(both) > _MAX_DEGREE:
                    raise LostError("multiplies sizes more often than is followed")
                terms[both] = terms.get(both, Fraction(0)) + c * d
        return Number({m: c for m, c in terms.items() if c}, floored=self.whole and other.whole)


def plain_number(value: Any) -> Number:
    """A number that is the same at all sizes."""
    try:
        exact = Fraction(value)
    except (ValueError, OverflowError, TypeError) as error:
        raise LostError("holds what is no number") from error
    return Number({(): exact} if exact else {})


def size_number(axis: int, scale: Fraction, extra: Fraction) -> Number:
    """``scale`` x the size along an axis + ``extra``."""
    return Number({m: c for m, c in (((axis,), scale), ((), extra)) if c})


@dataclass
class Follower:
    """Arithmetic on numbers at one size of the image; collects where its answers hold."""

    sizes: Sequence[int]
    node: Remark
    bounds: set[Bound] = field(default_factory=set)

    def holds(self, g: Number) -> bool:
        """Whether ``g`` is at least 0."""
        value = g.at(self.sizes)
        coefficients = list(g.terms.values())
        if all(c >= 0 for c in coefficients):
            return True
        if all(c <= 0 for c in coefficients):
            return False
        axes = {m for m in g.terms if m}
        if len(axes) != 1 or len(axis := next(iter(axes))) != 1:
            raise LostError("compares several sizes with each other")
        slope = g.terms[axis]
        zero = -g.terms.get((), Fraction(0)) / slope
        if value >= 0:
            low, high = (math.ceil(zero), None) if slope > 0 else (1, math.floor(zero))
        else:
            low, high = (1, math.ceil(zero) - 1) if slope > 0 else (math.floor(zero) + 1, None)
        high = None if high is not None and high >= _ENDLESS else high
        if low > 1 or high is not None:
            self.bounds.add(Bound(axis[0], self.node, low=low, high=high))
        return value >= 0

    def equal(self, a: Number, b: Number) -> bool:
        g = a - b
        value = g.at(self.sizes)
        if value:
            return self.holds(-g if value > 0 else g)
        return self.holds(g) and self.holds(-g)

    def floor(self, x: Number) -> Number:
        """The largest whole number that is not above ``x``, at sizes of the same residue."""
        if x.constant:
            return plain_number(math.floor(x.at(self.sizes)))
        if x.whole:
            return x
        part = x.at(self.sizes) % 1
        if x.rounded:
            # A quotient that is whole is not rounded; another must be too far from the next whole number to reach it.
            near = min(part, 1 - part) or Fraction(1)
            self._within(x, _FLOAT_DIGITS // 2 * near)
        for m, c in x.terms.items():
            for axis in set(m) if c.denominator > 1 else ():
                if c.denominator > MAX_MODULUS:
                    raise LostError(f"computes with remainders modulo {c.denominator}")
                self.bounds.add(Bound(axis, self.node, modulus=c.denominator))
        return Number((x - plain_number(part)).terms, floored=True)

    def truncate(self, x: Number) -> Number:
        """``x`` without its fraction."""
        if x.whole:
            return x
        return self.floor(x) if self.holds(x) else -self.floor(-x)

    def round(self, x: Number) -> Number:
        if x.at(self.sizes) % 1 == Fraction(1, 2) and not x.constant:
            raise LostError("rounds halves")
        if x.constant:
            return plain_number(round(x.at(self.sizes)))
        if x.rounded:
            raise LostError("rounds what was rounded before")
        return self.floor(x + plain_number(Fraction(1, 2)))

    def divide(self, a: Number, b: Number) -> Number:
        if not b.terms:
            raise LostError("divides by 0")
        if b.constant:
            inverse = 1 / b.at(self.sizes)
            return Number({m: c * inverse for m, c in a.terms.items()})
        if set(a.terms) == set(b.terms):
            ratios = {a.terms[m] / b.terms[m] for m in a.terms}
            if len(ratios) == 1:
                return plain_number(next(iter(ratios)))
        raise LostError("divides by a number that changes with the size")

    def modulo(self, a: Number, b: Number, like_c: bool) -> Number:
        quotient = self.divide(a, b)
        whole = self.truncate(quotient) if like_c else self.floor(quotient)
        return a - whole * b

    def as_float(self, x: Number, given: Iterable[Number]) -> Number:
        """``x`` as float32 holds it, of exact operands or of ``given``."""
        if x.constant:
            return x
        if any(n.rounded for n in given):
            if not _is_scaled(x, given):
                raise LostError("computes on with numbers that float32 rounds")
            return Number(x.terms, True)
        denominator = 1 if x.whole else math.lcm(*(c.denominator for c in x.terms.values()))
        if denominator & (denominator - 1):
            return Number(x.terms, True)
        self._within(x, Fraction(_FLOAT_DIGITS, denominator))
        return x

    def _within(self, x: Number, limit: Fraction | int) -> None:
        most = plain_number(limit)
        if not (self.holds(most - x) and self.holds(most + x)):
            raise LostError("computes with numbers too large for float32")


def _is_scaled(x: Number, given: Iterable[Number]) -> bool:
    """Whether ``x`` is the one rounded number of ``given`` times a power of two."""
    for n in given:
        if n.rounded and set(n.terms) == set(x.terms):
            ratios = {abs(x.terms[m] / n.terms[m]) for m in x.terms}
            power = ratios.pop()
            return not ratios and all(k & (k - 1) == 0 for k in (power.numerator, power.denominator))
    return False
