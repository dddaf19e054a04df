"""What a tile may change: labels by Budget.rounding, values of a regression by what FP32 rounds."""

from __future__ import annotations

from typing import Any

import pytest

from unet_rt.engine.budget import Budget
from unet_rt.engine.equality import Equality


@pytest.mark.parametrize(
    ("labels", "difference", "precision", "said"),
    [
        (None, 0.9e-5, "fp32", ""),
        (None, 1.1e-5, "fp32", "values by 1.10e-05 of the output's range, 1.0e-05 is allowed"),
        (None, 1.1e-5, "int8", ""),
        (None, 2e-2, "int8", "values by 2.00e-02"),
        (0.9e-4, 1.0, "fp32", ""),
        (1.1e-4, 0.0, "int8", "1.10e-04 of labels, budget rounding 1.0e-04"),
    ],
)
def test_the_bound(labels: float | None, difference: float, precision: str, said: str) -> None:
    equal = Equality("rounding", difference, labels, (64, 64), (128, 128), 4)
    excess = equal.excess(Budget(), precision)
    assert said in excess
    assert bool(said) == bool(excess)
    assert not equal.excess(Budget(rounding=1.0, error=1.0), "int8")


@pytest.mark.parametrize(
    ("kind", "max_abs", "labels", "said"),
    [
        ("bits", 0.0, 0.0, ""),
        ("bits", 1e-7, 0.0, "equal to the bit where the engine was built, and here are equal up to rounding"),
        ("rounding", 1e-6, 0.9e-4, ""),
        ("rounding", 1e-6, 2e-4, "budget rounding"),
    ],
)
def test_what_verify_finds_is_held_to_the_record(kind: Any, max_abs: float, labels: float, said: str) -> None:
    built = Equality(kind, 1e-6, 0.0, (64, 64), (128, 128), 4)
    found = built.broken_by(max_abs, max_abs, labels, Budget(), "fp32")
    assert said in found
    assert bool(said) == bool(found)


def test_the_words() -> None:
    assert Equality("bits", 0.0, 0.0, (64, 64), (128, 128), 4).text == "equal to the bit"
    assert (
        Equality("rounding", 2e-6, 0.0, (64,), (128,), 4).text
        == "equal up to rounding (2.0e-06 of the range, no label)"
    )
