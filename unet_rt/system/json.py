"""Records to and from JSON: frozen dataclasses by their fields and type hints, the one way for all of them."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from ..errors import UnetRtError

T = TypeVar("T")
Reader = Callable[[Any, str], Any]  # (data, what errors call it) -> value

# Metadata of a dataclass field: written only where it is not its default, and may be missing when it is read.
OPTIONAL: Mapping[str, Any] = types.MappingProxyType({"optional": True})


@dataclass(frozen=True)
class AtLeast:
    """Lower end of a number, in a type hint: ``Annotated[int, AtLeast(1)]``."""

    least: float


Count = Annotated[int, AtLeast(1)]
Size = Annotated[int, AtLeast(0)]


class Record:
    """Base of dataclasses that are written as JSON: every public field under its name. Others override ``to_json``."""

    def to_json(self) -> dict[str, Any]:
        """What ``json.dumps`` takes: dicts, lists, text, numbers."""
        return fields_json(self)


def record_json(record: Mapping[str, Any]) -> str:
    """The record as it is written; non-finite numbers are not JSON and are written as text."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(to_json(record)), indent=2, allow_nan=False) + "\n"


# Writing --------------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """What ``json.dumps`` takes of a value: a record, a container of them, a number or text."""
    if not isinstance(value, type) and hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return fields_json(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def fields_json(record: Any) -> dict[str, Any]:
    """The public fields of a dataclass, by name, in their order."""
    return {
        f.name: to_json(getattr(record, f.name))
        for f in fields(record)
        if not f.name.startswith("_") and not (f.metadata == OPTIONAL and getattr(record, f.name) == _default(f))
    }


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


# Reading --------------------------------------------------------------------------------------------------------------


def from_json(
    cls: type[T],
    data: Any,
    *,
    where: str,
    error: type[UnetRtError],
    way_out: str,
    readers: Mapping[type, Reader] = types.MappingProxyType({}),
) -> T:
    """The dataclass ``cls`` from what :func:`to_json` made of it.

    Args:
        cls: A dataclass, of types that JSON has, tuples, mappings, ``Literal``, unions, ``Fraction``, dataclasses.
        data: As ``json.loads`` returned it.
        where: What errors begin with, e.g. the file.
        error: Of what is refused.
        way_out: What to do about it.
        readers: Functions that read types of another form.

    Raises:
        UnetRtError: ``error``, where a field is missing or unknown, or its value is of another type or out of range.
    """
    return _Decoder(where, error, way_out, readers).read_record(cls, data, "")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Decoder:
    """Reads by type hints; ``name`` is where a value lies in the whole, e.g. ``outputs[0].stride``."""

    where: str
    error: type[UnetRtError]
    way_out: str
    readers: Mapping[type, Reader] = field(default_factory=dict)

    def refusal(self, fact: str) -> UnetRtError:
        return self.error(f"{self.where}: {fact}; {self.way_out}")

    def wrong(self, name: str, data: Any, wanted: str) -> UnetRtError:
        return self.refusal(f"{name or 'the record'} is {_short(data)}, not {wanted}")

    def read_record(self, cls: type, data: Any, name: str) -> Any:
        if not isinstance(data, dict):
            raise self.wrong(name, data, "an object")
        prefix, known, hints = f"{name}." if name else "", {f.name: f for f in fields(cls) if f.init}, _hints(cls)
        for key in data:
            if key not in known:
                from difflib import get_close_matches  # for errors only, and slow to import

                near = get_close_matches(str(key), known, n=1)
                meant = f" (meant {near[0]!r}?)" if near else ""
                raise self.refusal(f"unknown field {prefix}{key}{meant}; known are {', '.join(known)}")
        values = {}
        for key, f in known.items():
            if key in data:
                values[key] = self.read_value(hints[key], data[key], prefix + key)
            elif f.metadata != OPTIONAL:
                raise self.refusal(f"{prefix}{key} is missing")
        try:
            return cls(**values)
        except (ValueError, UnetRtError) as error:  # fields that do not go together
            raise self.refusal(f"{name or 'the record'}: {error}") from error

    def read_value(self, hint: Any, data: Any, name: str) -> Any:
        kind, args = get_origin(hint), get_args(hint)
        if hint is Any:
            return data
        if hint in self.readers:
            return self.readers[hint](data, f"{self.where}: {name}")
        if kind is Annotated:
            value = self.read_value(args[0], data, name)
            if value < args[1].least:
                raise self.wrong(name, data, f"a number of at least {args[1].least:g}")
            return value
        if kind in (Union, types.UnionType):
            return self.read_union(args, data, name)
        if kind is Literal:
            if not any(type(data) is type(arg) and data == arg for arg in args):
                raise self.wrong(name, data, f"one of {', '.join(map(str, args))}")
            return data
        if kind is tuple:
            return self.read_tuple(args, data, name)
        if isinstance(kind, type) and issubclass(kind, Mapping):
            if not isinstance(data, dict):
                raise self.wrong(name, data, "an object")
            return {key: self.read_value(args[1], item, f"{name}.{key}") for key, item in data.items()}
        return (
            self.read_record(hint, data, name)
            if isinstance(hint, type) and is_dataclass(hint)
            else self.read_scalar(hint, data, name)
        )

    def read_union(self, kinds: tuple[Any, ...], data: Any, name: str) -> Any:
        if data is None and type(None) in kinds:
            return None
        kinds = tuple(kind for kind in kinds if kind is not type(None))
        fitting = [kind for kind in kinds if isinstance(kind, type) and type(data) is kind]
        return self.read_value(fitting[0] if fitting else kinds[0], data, name)

    def read_tuple(self, kinds: tuple[Any, ...], data: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(data, list):
            raise self.wrong(name, data, "a list")
        if kinds[-1] is ...:
            kinds = (kinds[0],) * len(data)
        if len(data) != len(kinds):
            raise self.wrong(name, data, f"a list of {len(kinds)}")
        return tuple(
            self.read_value(kind, item, f"{name}[{k}]") for k, (kind, item) in enumerate(zip(kinds, data, strict=True))
        )

    def read_scalar(self, kind: type, data: Any, name: str) -> Any:
        try:
            if kind is float and type(data) in (int, float) and math.isfinite(data):
                return float(data)
            if kind is Fraction and isinstance(data, str):
                return Fraction(data)
        except (ValueError, ArithmeticError):
            pass  # refused below
        if kind in (bool, int, str) and type(data) is kind:
            return data
        raise self.wrong(name, data, _KINDS[kind])


_KINDS = {bool: "true or false", int: "a whole number", str: "text", float: "a finite number", Fraction: "a fraction"}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."
