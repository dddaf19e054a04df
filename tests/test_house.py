"""The size of things: files and functions that can be read in a sitting, short lists of parameters, telling names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import unet_rt

PACKAGE = Path(unet_rt.__file__).parent
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

FILE_LINES = 400
FUNCTION_LINES = 60  # from the first statement behind the docstring: what is said of a function does not lengthen it
PARAMETERS = 8  # without self and cls
# Public verbs: each option of theirs is one that users type.
VERBS = {
    ("building/build.py", "build"),
    ("judging/bench.py", "bench"),
    ("judging/verify.py", "verify"),
    ("prediction/predict.py", "predict"),
    ("training/export.py", "export"),
    ("training/trainer.py", "train"),
}
SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "tools"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Lines from the first statement behind the docstring to the end."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0


def parameters(function: Function) -> list[str]:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def too_large(source: str, text: str) -> list[str]:
    """What of a file is larger than a reader takes in, a line each."""
    found = []
    if (lines := text.count("\n")) > FILE_LINES:
        found.append(f"{source}: {lines} lines, at most {FILE_LINES}: cut it by what it is about")
    for function in functions(ast.parse(text)):
        where = f"{source}:{function.lineno} {function.name}"
        if (lines := body_lines(function)) > FUNCTION_LINES:
            found.append(f"{where}: {lines} lines, at most {FUNCTION_LINES}")
        if (count := len(parameters(function))) > PARAMETERS and (source, function.name) not in VERBS:
            found.append(f"{where}: {count} parameters, at most {PARAMETERS}: frozen values for what belongs together")
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_files_and_functions_can_be_read_in_a_sitting(source: str) -> None:
    found = too_large(source, (PACKAGE / source).read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_the_ruler_measures() -> None:
    long = "def f(a, b, c, d, e, f, g, h, i):\n    '''Text.\n\n    More.\n    '''\n" + "    a = 1\n" * 61
    assert too_large("x.py", long) == [
        "x.py:1 f: 61 lines, at most 60",
        "x.py:1 f: 9 parameters, at most 8: frozen values for what belongs together",
    ]
    assert too_large("x.py", "class C:\n    def f(self, a, b, c, d, e, f, g, h):\n        pass\n") == []
    assert too_large("x.py", "x = 1\n" * 401) == ["x.py: 401 lines, at most 400: cut it by what it is about"]


def test_the_verbs_are_there() -> None:
    """A verb that moved would otherwise be exempt for nothing."""
    for source, name in VERBS:
        assert name in {f.name for f in functions(ast.parse((PACKAGE / source).read_text(encoding="utf-8")))}, source


def test_names_of_files_say_what_is_inside() -> None:
    assert not {part for source in SOURCES for part in Path(source).with_suffix("").parts} & SAY_NOTHING


def test_packages_hand_on_no_functions() -> None:
    """Beside the root, which offers the public names, and models and training, which users import from."""
    offering = {"__init__.py", "backends/__init__.py", "models/__init__.py", "training/__init__.py"}
    for source in SOURCES:
        if source.endswith("__init__.py") and source not in offering:
            tree = ast.parse((PACKAGE / source).read_text(encoding="utf-8"))
            assert not [node for node in tree.body if not isinstance(node, ast.Expr)], source
