"""Contracts from JSON: what people write in a file, and what an export or an engine carries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from ..errors import ContractError
from .contract import Border, Contract, Head, Method, Normalization, OutputIs, Task
from .words import check_normalization, method_of, numbers_text, parse_normalization, scope_of, suggestion


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
    check_keys(data, known, "contract")
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
            raise ContractError(
                f"threshold {numbers_text(threshold)} must lie in 0 to 1; it is a probability, e.g. 0.5"
            )
    if any(s <= 0 for s in contract.pixel_size_um):
        raise ContractError(f"pixel_size_um {numbers_text(contract.pixel_size_um)} must be above 0")
    return contract


def _heads_from_json(value: Any) -> tuple[Head, ...]:
    if not isinstance(value, list) or not all(isinstance(v, Mapping) and isinstance(v.get("name"), str) for v in value):
        raise ContractError(f"heads {value!r} must be a list of objects, each with the name of an output of the graph")
    heads = []
    for entry in value:
        check_keys(entry, [f.name for f in fields(Head)], f"head {entry['name']!r}")
        said = contract_from_json({key: item for key, item in entry.items() if key != "name"})
        heads.append(Head(entry["name"], said.task, said.output_is, said.classes, said.threshold))
    names = [head.name for head in heads]
    if len(set(names)) < len(names):
        raise ContractError(f"heads {', '.join(names)}: one is named twice; declare each output once")
    return tuple(heads)


def check_keys(data: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in data:
        if key not in known:
            near = suggestion(str(key), known)
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
        raise ContractError(
            f"{key} {value!r} is unknown{suggestion(value, _WORDS[key])}; choose {', '.join(_WORDS[key])}"
        )
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
    check_keys(value, [f.name for f in fields(Normalization)], "normalization")
    if "method" not in value:
        raise ContractError("normalization has no method; choose " + ", ".join(get_args(Method)))
    values: dict[str, Any] = {"method": method_of(str(value["method"]))}
    for key, item in value.items():
        if key == "scope":
            values[key] = None if item is None else scope_of(item)
        elif key in ("scale", "eps"):
            values[key] = _floats(key, item, 1)[0]
        elif key in ("percentiles", "clip", "clip_after"):
            values[key] = None if item is None and key != "percentiles" else _floats(key, item, 2)
        elif key in ("mean", "std"):
            values[key] = _floats(key, item)
    return check_normalization(Normalization(**values))
