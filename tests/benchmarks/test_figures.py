"""The figures of README.md, docs/ and benchmarks/README.md are those of the records; none is typed by hand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_and_plots_say_what_the_records_say(tables: ModuleType) -> None:
    assert [str(path.relative_to(ROOT)) for path in tables.stale()] == [], "run: python benchmarks/tables.py"


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_a_figure_changed_by_hand_is_noticed(tables: ModuleType, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = list(tables.BLOCK.finditer(text))
    assert blocks, f"{page} has no block of figures"
    for block in blocks:
        digit = re.search(r"\d", block.group(3))
        assert digit is not None, f"{block.group(2)} holds no figure"
        at = block.start(3) + digit.start()
        changed = f"{text[:at]}{(int(digit.group()) + 1) % 10}{text[at + 1 :]}"
        assert tables.filled(changed) == text


def test_unknown_figures_are_named(tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"no figures called 'no-such'.*engine-paper"):
        tables.filled("<!-- figures: no-such -->\n<!-- end of figures -->")


@pytest.mark.parametrize(
    ("value", "text"), [(2340.3, "2,340"), (12.345, "12.3"), (0.04567, "0.0457"), (100.4, "100"), (9.999, "10.0")]
)
def test_numbers_have_three_digits(tables: ModuleType, value: float, text: str) -> None:
    assert tables.number(value) == text
