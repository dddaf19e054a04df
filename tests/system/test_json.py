"""Records to and from JSON: what is written is read back equal, and whatever else is there is refused by name and value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from unet_rt.errors import EngineError
from unet_rt.system.json import OPTIONAL, AtLeast, Count, Record, from_json, record_json, to_json


@dataclass(frozen=True)
class Inner(Record):
    shape: tuple[int | str | None, ...]
    scale: Fraction
    pair: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.pair[0] > self.pair[1]:
            raise ValueError(f"pair {self.pair} must rise")


@dataclass(frozen=True)
class Outer(Record):
    name: str
    kind: Literal["a", "b"]
    batch: Count | None
    share: Annotated[float, AtLeast(0)]
    exact: bool
    inner: tuple[Inner, ...]
    best: Inner | None
    sizes: Mapping[str, tuple[Count, ...]]
    anything: Mapping[str, Any]
    extra: Mapping[str, Any] | None = field(default=None, metadata=OPTIONAL)


INNER = Inner((1, None, "x:2"), Fraction(1, 2))
VALUE = Outer("n", "a", 4, 0.5, True, (INNER, INNER), None, {"x": (1, 2)}, {"list": [1, {"y": None}]})


def read(data: Any) -> Outer:
    return from_json(Outer, data, where="spec.json", error=EngineError, way_out="build it again")


@pytest.mark.parametrize(
    "value", [VALUE, replace(VALUE, best=INNER, batch=None, inner=()), replace(VALUE, extra={"a": [1]})]
)
def test_what_is_written_is_read_back(value: Outer) -> None:
    assert read(json.loads(json.dumps(value.to_json()))) == value


def test_fields_are_written_in_their_order_and_optional_ones_only_where_they_say_something() -> None:
    written = VALUE.to_json()
    assert list(written) == ["name", "kind", "batch", "share", "exact", "inner", "best", "sizes", "anything"]
    assert written["inner"][0] == {"shape": [1, None, "x:2"], "scale": "1/2", "pair": [0.0, 1.0]}
    assert list(replace(VALUE, extra={}).to_json())[-1] == "extra"


def test_numbers_and_paths_are_those_of_python() -> None:
    values = {1: np.float32(0.5), "path": Path("a/b"), "pair": (np.int64(1), 2)}
    assert to_json(values) == {"1": 0.5, "path": "a/b", "pair": [1, 2]}
    text = record_json({"nan": math.nan, "inf": [np.float64("-inf")], "kept": 1.5})
    assert json.loads(text) == {"nan": "nan", "inf": ["-inf"], "kept": 1.5}


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"batch": -1}, "batch is -1, not a number of at least 1"),
        ({"batch": True}, "batch is True, not a whole number"),
        ({"batch": 1.0}, "batch is 1.0, not a whole number"),
        ({"batch": "x"}, "batch is 'x', not a whole number"),
        ({"name": 3}, "name is 3, not text"),
        ({"kind": "c"}, "kind is 'c', not one of a, b"),
        ({"kind": ["a"]}, r"kind is \['a'\], not one of a, b"),
        ({"share": -0.1}, "share is -0.1, not a number of at least 0"),
        ({"share": math.nan}, "share is nan, not a finite number"),
        ({"share": 10**400}, "share is 1000*... *, not a finite number"),
        ({"share": False}, "share is False, not a finite number"),
        ({"exact": 1}, "exact is 1, not true or false"),
        ({"inner": {}}, "inner is {}, not a list"),
        ({"inner": [3]}, r"inner\[0\] is 3, not an object"),
        ({"inner": [{**INNER.to_json(), "pair": [1]}]}, r"inner\[0\].pair is \[1\], not a list of 2"),
        ({"inner": [{**INNER.to_json(), "pair": [1, 0]}]}, r"inner\[0\]: pair \(1.0, 0.0\) must rise"),
        ({"inner": [{**INNER.to_json(), "scale": "1/0"}]}, r"inner\[0\].scale is '1/0', not a fraction"),
        ({"inner": [{**INNER.to_json(), "shape": [1.5]}]}, r"inner\[0\].shape\[0\] is 1.5, not"),
        ({"best": {"shape": [], "pair": [0, 1]}}, "best.scale is missing"),
        ({"sizes": {"x": [0]}}, r"sizes.x\[0\] is 0, not a number of at least 1"),
        ({"sizes": [1]}, r"sizes is \[1\], not an object"),
        ({"names": 3}, r"unknown field names \(meant 'name'\?\); known are name, kind"),
        ({"extra": 3}, "extra is 3, not an object"),
    ],
)
def test_anything_else_is_refused_with_field_value_and_way_out(change: dict[str, Any], fact: str) -> None:
    with pytest.raises(EngineError, match=f"^spec.json: {fact}.*; build it again$"):
        read({**VALUE.to_json(), **change})


def test_a_missing_field_and_another_document_are_refused() -> None:
    data = VALUE.to_json()
    del data["sizes"]
    with pytest.raises(EngineError, match=r"spec\.json: sizes is missing; build it again"):
        read(data)
    with pytest.raises(EngineError, match=r"spec.json: the record is \[\], not an object; build it again"):
        read([])


def test_types_of_another_form_have_readers() -> None:
    @dataclass(frozen=True)
    class Held:
        value: Inner

    def reader(data: Any, where: str) -> Inner:
        return Inner((), Fraction(len(data)), (0.0, float(where == "spec.json: value")))

    found = from_json(Held, {"value": "xyz"}, where="spec.json", error=EngineError, way_out="", readers={Inner: reader})
    assert found.value == Inner((), Fraction(3), (0.0, 1.0))
