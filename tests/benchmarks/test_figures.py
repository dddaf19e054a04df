"""The figures of all pages are those of the records; none is typed by hand."""

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


def test_a_figure_changed_by_hand_is_noticed(tables: ModuleType) -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in tables.pages()}
    assert any(tables.BLOCK.search(text) for text in texts.values()), "no page has a block of figures"
    for page, text in texts.items():
        changed = text
        for block in reversed(list(tables.BLOCK.finditer(text))):
            digit = re.search(r"\d", block.group(3))
            assert digit is not None, f"{block.group(2)} of {page.name} holds no figure"
            at = block.start(3) + digit.start()
            changed = f"{changed[:at]}{(int(digit.group()) + 1) % 10}{changed[at + 1 :]}"
        assert tables.filled(changed, page) == text


def test_pictures_are_found_from_where_a_page_lies(tables: ModuleType) -> None:
    text = "<!-- figures: pipeline -->\n<!-- end of figures -->"
    assert "](benchmarks/results/pipeline.svg)" in tables.filled(text, ROOT / "README.md")
    assert "](../benchmarks/results/pipeline.svg)" in tables.filled(text, ROOT / "docs" / "benchmarks.md")
    assert "](results/pipeline.svg)" in tables.filled(text, ROOT / "benchmarks" / "README.md")


def test_the_front_has_few_rows_of_the_records(tables: ModuleType) -> None:
    head, _, *rows = tables.BLOCKS["front"]().partition("\n\n")[0].splitlines()
    assert 6 <= len(rows) <= 8
    assert all(row.count("|") == head.count("|") for row in rows)
    with_figure = {"predict-nuclei": rows[:2], "predict-paper": rows[2:4], "memory": rows[6:7], "large": rows[7:]}
    for name, own in with_figure.items():  # as the tables that they come from say
        figures = set(re.findall(r"\d[\d,.]*(?= MB| \|)|[\d.]+%", " ".join(own)))
        assert figures, name
        assert all(figure in tables.BLOCKS[name]() for figure in figures), (name, figures)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a:n} {b:x} {c:/1e3:.1f} {d:?yes:no} {e!u}", "1.50 2 x 3 4.5 no UP"),
        ("{none} of {a} ?? {a:n}", "1.50"),
        ("@rows | {k} | {none} ?? |", "| 1 |  |\n| 2 |  |"),
        ("ks: [[rows|, |{k}]].", "ks: 1, 2."),
        ("[[empty||{k}]]", ""),
        ("@named {key}: {value}", "x: 1"),
    ],
)
def test_templates_are_filled(tables: ModuleType, template: str, text: str) -> None:
    fields = {"a": 1.5, "b": [2, 3], "c": 4500, "d": False, "e": "up", "none": None}
    fields |= {"rows": [{"k": 1}, {"k": 2}], "empty": [], "named": {"x": 1}}
    assert tables.render.draw(template, fields) == text


def test_unknown_figures_are_named(tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"no figures called 'no-such'.*engine-paper"):
        tables.filled("<!-- figures: no-such -->\n<!-- end of figures -->")


@pytest.mark.parametrize(
    ("value", "text"), [(2340.3, "2,340"), (12.345, "12.3"), (0.04567, "0.0457"), (100.4, "100"), (9.999, "10.0")]
)
def test_numbers_have_three_digits(tables: ModuleType, value: float, text: str) -> None:
    assert tables.render.number(value) == text
