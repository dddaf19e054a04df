"""Predicting several images into a folder: which are left, their tables, and what is said of them."""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import OutputError
from .printing import text_stream

if TYPE_CHECKING:
    from ..prediction.folder import FolderRun
    from ..prediction.report import RunReport
    from ..prediction.request import Tables

_INDIFFERENT = {  # options that change no result
    "argv", "batch", "debug", "json", "memory", "overwrite", "restart", "run", "scheduler", "skip_existing", "threads",
    "verb",
}  # fmt: skip


class Item(NamedTuple):
    """One image, and where its outputs go."""

    image: Path | str
    target: Path
    overlay: Path | None
    geojson: Path | None

    @property
    def name(self) -> str:
        """Of the image, in tables."""
        return Path(self.image).name

    @property
    def outputs(self) -> list[Path]:
        return [path for path in (self.target, self.overlay, self.geojson) if path is not None]


@dataclass(frozen=True)
class Left:
    """What is left to be done of the images of a command.

    Attributes:
        run: Its marks; None: single images have none, and shards share theirs.
        items: The images to be predicted.
        done: Those that an earlier run of the command has done.
        skipped: Those whose output was there before the command (``--skip-existing``).
    """

    run: FolderRun | None
    items: list[Item]
    done: list[Item]
    skipped: list[Item]


def shared_tables(args: argparse.Namespace) -> dict[str, Path]:
    """The tables of all images, by kind."""
    tables = {kind: Path(getattr(args, kind)) for kind in ("objects", "areas") if getattr(args, kind)}
    if args.output == "instances":
        from ..prediction.folder import SUMMARY

        tables["summary"] = Path(args.out) / SUMMARY
    return tables


@contextmanager
def left_of(args: argparse.Namespace, items: Sequence[Item]) -> Iterator[Left]:
    """What is left to be done.

    Raises:
        OutputError: An output is there already, and is not to be replaced.
    """
    if args.skip_existing and args.overwrite:
        raise OutputError("--skip-existing keeps what is there, and --overwrite replaces it; give one of them")
    if args.shard is not None or not _into_folder(args, items):
        there = [item for item in items if item.target.exists() and not _under_way(item)]
        _check_outputs(args, items, None)
        yield Left(
            None, [i for i in items if not (args.skip_existing and i in there)], [], there if args.skip_existing else []
        )
        return
    from ..prediction.folder import open_run

    with open_run(Path(args.out), _command(args), restart=args.restart) as run:
        _check_outputs(args, items, run)
        done = [item for item in items if run.done(item.image, item.target)]
        there = [item for item in items if item.target.exists() and not run.begun(item.target) and not _under_way(item)]
        skipped = there if args.skip_existing else []
        yield Left(run, [item for item in items if item not in done and item not in skipped], done, skipped)


def _into_folder(args: argparse.Namespace, items: Sequence[Item]) -> bool:
    return items[0].target != Path(args.out)


def _under_way(item: Item) -> bool:
    from ..prediction.stage import stage_folder

    return stage_folder(item.target).exists()


def _check_outputs(args: argparse.Namespace, items: Sequence[Item], run: FolderRun | None) -> None:
    """OutputError where something is there that is neither this command's own nor to be replaced or kept."""
    if args.overwrite:
        return
    for item in items:
        if _under_way(item) or (run is not None and run.begun(item.target)):
            continue
        if args.skip_existing and item.target.exists():
            continue
        existing = [path for path in item.outputs if path.exists()]
        if existing and (_into_folder(args, items) or existing[0] != item.target):
            raise OutputError(
                f"{existing[0]} exists; pass --overwrite to replace it, --skip-existing to keep it, or choose another --out"
            )
    if run is None or args.skip_existing or run.resumed:
        return
    for table in shared_tables(args).values():
        if table.exists():
            raise OutputError(f"{table} exists; pass --overwrite to replace it, or choose another name")


def _command(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the outputs of a command."""
    options = {key: value for key, value in sorted(vars(args).items()) if key not in _INDIFFERENT}
    spec = Path(args.engine) / "spec.json"
    digest = hashlib.sha256(spec.read_bytes()).hexdigest() if spec.is_file() else None
    return {"options": {key: str(value) for key, value in options.items()}, "spec": digest}


def tables_of(tables: Tables | None, item: Item, run: FolderRun | None) -> Tables | None:
    """The tables of one image: its own outlines, and its lines of the tables of all."""
    if tables is None:
        return None
    tables = replace(tables, geojson=item.geojson)
    if run is None:
        return tables
    return replace(
        tables,
        objects=tables.objects and run.table(item.target, "objects"),
        areas=tables.areas and run.table(item.target, "areas"),
    )


def say_kept(args: argparse.Namespace, left: Left, items: Sequence[Item]) -> None:
    """Where a run ends early: what is kept, and that it goes on."""
    if left.run is not None and left.run.count:
        count = f"{left.run.count} of {len(items)} images are done and kept in {args.out}"
        print(f"{count}; the same command goes on with the rest", file=sys.stderr)
    elif left.items and _under_way(left.items[0]):
        print(f"finished blocks of {left.items[0].target} are kept; the same command goes on", file=sys.stderr)


def finish_tables(args: argparse.Namespace, left: Left, items: Sequence[Item]) -> None:
    """Makes the tables of all images, and says where they are."""
    if left.run is None:
        return
    tables, kept = shared_tables(args), {item.name for item in left.skipped}
    lost = kept - _names(tables["summary"]) if "summary" in tables else set()
    for kind, table in tables.items():
        left.run.unite(table, kind, [item.target for item in items if item not in left.skipped], kept)
        print(f"  -> {table}", file=text_stream(args))
    if lost:
        names = f"{len(lost)} skipped images, {min(lost)} first,"
        print(f"WARNING: {names} are not in the tables; predict them with --overwrite", file=sys.stderr)


def _names(table: Path) -> set[str]:
    """The images of a table; none where it is not there."""
    if not table.exists():
        return set()
    with table.open(encoding="utf-8", newline="") as opened:
        return {line.get("image", "") for line in csv.DictReader(opened)}


def advice_text(reports: Sequence[tuple[Item, RunReport]], least: float) -> str:
    """What to say, once, of images of which many pixels lie outside the range seen at build; empty where there are none."""
    odd = [(report.outside_range, item) for item, report in reports if (report.outside_range or 0) >= least]
    if not odd:
        return ""
    share, worst = max(odd, key=lambda pair: pair[0] or 0)
    if len(reports) == 1:
        return f"{share:.0%} of its pixels lie outside the range seen at build: look whether the result is right"
    return (
        f"{len(odd)} of {len(reports)} images have more than {least:.0%} of pixels outside the range seen at build, most "
        f"{worst.image} ({share:.0%}): look whether the results are right"
    )
