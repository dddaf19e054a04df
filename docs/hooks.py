"""What MkDocs does not do by itself: verbs and public names out of the code, links to files of the repository beside docs/.

A page links to ``../benchmarks/README.md`` or a picture there as it does on any other view of the repository; the site
gets a copy of that file below ``repository/``, and the link goes there.
"""

from __future__ import annotations

import argparse
import ast
import html
import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(?=<code>)")
VERBS = "<!-- verbs -->"
NAMES = re.compile(r"<!-- names of ([\w.]+) -->")
EVERYWHERE = {"help", "json", "debug"}  # options that every verb has
COPIED = {".md", ".svg", ".png", ""}  # "": LICENSE


def verbs() -> str:
    """Every verb of the command line, with all options, as Markdown."""
    from unet_rt.cli.parser import make_parser

    (choices,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return "\n\n".join(_verb(name, parser) for name, parser in choices.choices.items())


def _verb(name: str, parser: argparse.ArgumentParser) -> str:
    usage = " ".join(parser.format_usage().split()).removeprefix("usage: ")
    parts = [f"## {name}", f"{_sentence(parser.description or '')}", f"```text\n{usage}\n```"]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.dest not in EVERYWHERE]
        if not actions:
            continue
        if group.title not in (None, "options", "positional arguments"):
            parts.append(f"**{_sentence(group.title or '')}**")
        rows = "\n".join(f"| {_name(a)} | {_cell((a.help or '').replace('%%', '%'))} |" for a in actions)
        parts.append(f"| | |\n|---|---|\n{rows}")
    return "\n\n".join(parts)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _name(action: argparse.Action) -> str:
    choices = "|".join(map(str, action.choices or ()))
    value = "" if action.nargs == 0 else str(action.metavar or choices or action.dest.upper())
    forms = [f"{option} {value}".strip() for option in action.option_strings] or [value]
    return ", ".join(f"<code>{_cell(form)}</code>" for form in forms)


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;")


def names(package: str) -> str:
    """A directive of mkdocstrings for each name in ``__all__`` of a package, where the name is defined.

    Asked for by the package's own name, a function would lose to a module that is called like it.
    """
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    listed = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    home = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            home |= {alias.asname or alias.name: ".".join([*above, node.module, alias.name]) for alias in node.names}
    # What one calls comes first, then values, then errors.
    order = sorted((name for name in listed if name in home and name[0] != "_"), key=lambda n: (n[0].isupper(), n))
    order.sort(key=lambda n: n.endswith("Error"))
    return "\n\n".join(f"::: {home[name]}" for name in order)


def _beside(page: str, link: str) -> str | None:
    """Path in the repository of what a page links to outside docs/; None for any other link."""
    if "://" in link or link.startswith("mailto:"):
        return None
    base = page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(base), link))
    inside = path.startswith("docs/") and not page.startswith("repository/")
    return None if inside or path.startswith("..") or not (ROOT / path).is_file() else path


def _text_links(text: str) -> list[str]:
    return [match[2] for match in LINK.finditer(FENCE.sub("", text))]


def on_files(files: Any, config: Any) -> Any:
    """Copy what pages link to outside docs/, and what those copies link to."""
    from mkdocs.structure.files import File, InclusionLevel

    waiting = [(f.src_uri, f.content_string) for f in files.documentation_pages()]
    while waiting:
        page, text = waiting.pop()
        for link in _text_links(text):
            path = _beside(page, link)
            name = f"repository/{path}"
            if path is None or path.startswith("docs/") or files.get_file_from_path(name):
                continue
            if Path(path).suffix not in COPIED:
                continue
            copy = File.generated(
                config, name, abs_src_path=os.fspath(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(copy)
            if path.endswith(".md"):
                waiting.append((name, copy.content_string))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Draw verbs and names; let links out of docs/ go to the copies."""
    here = page.file.src_uri

    def turn(match: re.Match[str]) -> str:
        path = _beside(here, match[2])
        if path is None:
            return match[0]
        target = path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".") + match[3]

    text = NAMES.sub(lambda match: names(match[1]), LINK.sub(turn, markdown))
    return text.replace(VERBS, verbs()) if VERBS in text else text


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Docstrings name things in Sphinx's words; a reader needs the name alone."""
    return ROLE.sub("", content)
