"""Axes of the tensors that a bioimage.io description names, of format versions 0.4 and 0.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ContractError

_LETTERS = {"batch": "N", "channel": "C", "b": "N", "c": "C", "z": "Z", "y": "Y", "x": "X", "t": "T", "time": "T"}
_UM = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6, "angstrom": 1e-4,
       "picometer": 1e-6, "inch": 25400.0}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """One axis of a described tensor. ``key`` is how steps refer to it."""

    key: str
    letter: str
    size: int | None = None
    names: tuple[str, ...] = ()
    count: int | None = None
    um: float | None = None


def axes_of(tensor: Mapping[str, Any], name: str) -> list[Axis]:
    """The axes of a described tensor; ``name`` is what errors call the description."""
    described = tensor.get("axes")
    if isinstance(described, str):  # 0.4: "bcyx", with the sizes in "shape"
        shape = tensor.get("shape")
        sizes: list[Any] = [None] * len(described)
        if isinstance(shape, Sequence) and len(shape) == len(described):
            sizes = list(shape)
        elif isinstance(shape, Mapping) and "min" in shape and len(shape["min"]) == len(described):
            sizes = [low if step == 0 else None for low, step in zip(shape["min"], shape["step"], strict=True)]
        axes = []
        for letter, size in zip(described, sizes, strict=True):
            known = _letter(letter, name)
            fixed = int(size) if isinstance(size, (int, float)) and size else None
            axes.append(Axis(letter, known, fixed, count=fixed if known == "C" else None))
        return axes
    if not isinstance(described, Sequence):
        raise ContractError(f"{name}: axes {described!r} are not readable; download the package again")
    return [_axis(axis, name) for axis in described]


def _axis(axis: Any, name: str) -> Axis:
    if not isinstance(axis, Mapping):
        raise ContractError(f"{name}: axis {axis!r} is not readable; download the package again")
    kind = str(axis.get("type"))
    key = str(axis.get("id", {"space": "x", "batch": "batch"}.get(kind, kind)))
    if kind == "channel":
        names = tuple(str(n) for n in axis.get("channel_names") or ())
        return Axis(key, "C", names=names, count=len(names) or None)
    letter = "N" if kind == "batch" else _letter(key, name)
    size = axis.get("size")
    um = None
    if letter in "ZYX" and axis.get("unit") in _UM:
        um = float(axis.get("scale", 1.0)) * _UM[str(axis["unit"])]
    return Axis(key, letter, size if isinstance(size, int) else None, um=um)


def _letter(key: str, name: str) -> str:
    if key not in _LETTERS:
        raise ContractError(f"{name}: axis {key!r} is not supported; batch, channel, z, y and x are")
    return _LETTERS[key]
