"""Text drawn from records by templates; ``figures.txt`` holds them, one per block, under ``## NAME``.

Fields stand in braces as for Python's ``format``, with these besides: ``{x:n}`` three significant digits (``{x:n4}``
four), ``{x:x}`` joined by " x ", ``{x:/1e6:.0f}`` divided first, ``{x:?yes:NO}`` by truth, ``{x!u}`` in capitals.

- ``@rows TEXT``: a line per row of the list ``rows``, which may be a row of a table.
- ``[[rows|, |TEXT]]``: the same within a line, joined by what stands between the bars.
- ``TEXT ?? OTHER``, in a cell, a repeated line or between such brackets: the first whose fields the row has; None is none.

Rows of an object are its entries: the name as ``key``, and as ``value`` what is no object itself.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plots import number

Record = dict[str, Any]
EACH = re.compile(r"\[\[(\w+)\|([^|]*)\|(.*?)\]\]")


class Records:
    """The records of a folder, by name, each read once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, Record] = {}

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists()

    def __call__(self, name: str) -> Record:
        """A record.

        Raises:
            SystemExit: There is none.
        """
        if name not in self._read:
            if not self.has(name):
                raise SystemExit(f"there is no record {name}.json; run the benchmark that writes it")
            self._read[name] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return self._read[name]

    def some(self, name: str) -> list[Record]:
        """A record as a list, empty where there is none."""
        return [self(name)] if self.has(name) else []


class _Filler(string.Formatter):
    def convert_field(self, value: Any, conversion: Any) -> Any:
        return str(value).upper() if conversion == "u" else super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise KeyError("a field that a record has not")
        if format_spec[:1] in ("/", "?"):
            first, _, second = format_spec[1:].partition(":")
            if format_spec[0] == "/":
                return format(value / float(first), second)
            return first if value else second
        if format_spec[:1] == "n":
            return number(value, int(format_spec[1:] or 3))
        return " x ".join(map(str, value)) if format_spec == "x" else format(value, format_spec)


def fill(text: str, fields: Mapping[str, Any]) -> str:
    """The first of several texts whose fields there are, filled in."""
    texts = [part.strip(" ") for part in text.split("??")] if "??" in text else [text]
    for k, one in enumerate(texts):
        try:
            return _Filler().vformat(one, (), fields)
        except (KeyError, TypeError):  # TypeError: what would hold the field is None
            if k == len(texts) - 1:
                raise
    return ""


def rows_of(found: Any) -> list[Record]:
    """Rows of a list; of an object its entries."""
    if isinstance(found, Mapping):
        return [{"key": k, **v} if isinstance(v, Mapping) else {"key": k, "value": v} for k, v in found.items()]
    return [row if isinstance(row, Mapping) else {"key": row} for row in found or ()]


def draw(template: str, fields: Mapping[str, Any]) -> str:
    """A template with its fields and rows filled in."""
    lines = list[str]()
    for line in template.split("\n"):
        if not line.startswith("@"):
            drawn = _line(line, fields)
            lines += [drawn] if drawn or not EACH.fullmatch(line) else []  # no row, no line
            continue
        name, _, text = line[1:].partition(" ")
        lines += [_cells(text, row) if text.startswith("|") else _line(text, row) for row in rows_of(fields.get(name))]
    return "\n".join(lines)


def _line(text: str, fields: Mapping[str, Any]) -> str:
    """A line with what is repeated within it."""
    parts, at = list[str](), 0
    for match in EACH.finditer(text):
        name, between, each = match.groups()
        rows = [fill(each, row).replace("\\n", "\n") for row in rows_of(fields.get(name))]
        parts += [fill(text[at : match.start()], fields), between.replace("\\n", "\n").join(rows)]
        at = match.end()
    return "".join([*parts, fill(text[at:], fields)]).replace("\\n", "\n")


def _cells(text: str, row: Mapping[str, Any]) -> str:
    return "| " + " | ".join(fill(cell.strip(), row) for cell in text.strip("| ").split("|")) + " |"


def templates(path: Path) -> dict[str, str]:
    """Templates of a file by their names."""
    found = re.split(r"^## ([\w-]+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.removesuffix("\n") for name, text in zip(found[1::2], found[2::2], strict=True)}
