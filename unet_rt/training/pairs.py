"""Which images and masks of a folder belong together, told from their names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ImageError
from ..images.formats import SUFFIXES

IMAGE_WORDS = {"image", "images", "img", "imgs", "im", "raw", "input", "inputs", "frame", "frames", "volume", "photo"}


MASK_WORDS = {
    "mask", "masks", "label", "labels", "lbl", "gt", "st", "groundtruth", "truth", "target", "targets", "annotation",
    "annotations", "seg", "segs", "segmentation", "segmentations", "man", "manual", "binary", "instances",
}  # fmt: skip


NEUTRAL_WORDS = {"t", "ground", "png", "tif", "8bit"}  # neither, but may differ between the two


SKIPPED_FOLDERS = {"tra", "tracking", "overlay", "overlays", "preview"}


@dataclass(frozen=True)
class Pair:
    """An image and its mask; several masks are one object each."""

    image: Path
    masks: tuple[Path, ...]


def find_pairs(folder: Path, images: str | None = None, masks: str | None = None) -> tuple[list[Pair], list[str]]:
    """(pairs, notes) of a folder.

    Args:
        folder: Searched with everything below it.
        images, masks: Sub-folders, where names do not say it. Both or none.

    Raises:
        ImageError: there is no pair, or an image has two masks of the same name.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; check the path")
    if (images is None) != (masks is None):
        raise ImageError(f"only the sub-folder of {'images' if masks is None else 'masks'} is named; name both")
    if images is not None and masks is not None:
        sides = [_files(folder / images), _files(folder / masks)]
        for side, files in zip((images, masks), sides, strict=True):
            if not files:
                raise ImageError(f"{folder / side}: no file ending in {', '.join(SUFFIXES)}; check the path")
        found = _match(
            [(_key(p.relative_to(folder / images), True), p) for p in sides[0]],
            [(_key(p.relative_to(folder / masks), True), p) for p in sides[1]],
        )
        where = f"{folder / images} and {folder / masks}"
    else:
        files = _files(folder)
        if not files:
            raise ImageError(f"{folder}: no image in it or below; files ending in {', '.join(SUFFIXES)} are read")
        found = _by_words(folder, files, own_names=False)
        if not found[0]:
            found = _by_words(folder, files, own_names=True)
        where = str(folder)
    pairs, alone, orphans = found
    if not pairs:
        raise ImageError(
            f"{where}: {len(alone)} images and {len(orphans)} masks, and no two belong together"
            f"{_examples(alone, orphans)}; name each mask as its image, in folders images/ and masks/, or name the "
            "sub-folders (--images, --masks)"
        )
    notes = []
    if alone:
        notes.append(f"{len(alone)} images without a mask are left out, e.g. {alone[0].name}")
    if orphans:
        notes.append(f"{len(orphans)} masks without an image are left out, e.g. {orphans[0].name}")
    return pairs, notes


def _examples(alone: Sequence[Path], orphans: Sequence[Path]) -> str:
    names = [f"{kind} {files[0].name}" for kind, files in (("image", alone), ("mask", orphans)) if files]
    return f" (e.g. {', '.join(names)})" if names else ""


def _files(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(p.startswith((".", "__")) for p in parts) or {p.lower() for p in parts[:-1]} & SKIPPED_FOLDERS:
            continue
        if path.suffix.lower() in SUFFIXES and path.is_file():
            found.append(path)
    return found


def words_of(name: str) -> list[str]:
    """Lower-case words and numbers of a name: ``man_seg012`` -> man, seg, 012."""
    return re.findall(r"[a-z]+|[0-9]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


Key = tuple[tuple[str, ...], ...]


def _key(relative: Path, own_name: bool) -> Key:
    """The path without the words that tell images from masks; folders that were nothing else are dropped."""
    parts = [*relative.parts[:-1], relative.stem]
    drop = IMAGE_WORDS | MASK_WORDS | NEUTRAL_WORDS
    last = tuple(w for w in words_of(parts[-1]) if w not in drop)
    if not last or not own_name:
        last = last or tuple(words_of(parts[-1]))
    folders = (tuple(w for w in words_of(p) if w not in drop) for p in parts[:-1])
    return (*(f for f in folders if f), last)


def _is_mask(relative: Path, own_names: bool) -> bool:
    words = [set(words_of(p)) for p in relative.parts[:-1]]
    if own_names:
        words.append(set(words_of(relative.stem)))
    for part in reversed(words):
        if part & MASK_WORDS:
            return True
        if part & IMAGE_WORDS:
            return False
    return False


Matched = tuple[list[Pair], list[Path], list[Path]]


def _by_words(folder: Path, files: Sequence[Path], own_names: bool) -> Matched:
    sides: tuple[list[tuple[Key, Path]], list[tuple[Key, Path]]] = ([], [])
    for path in files:
        relative = path.relative_to(folder)
        sides[_is_mask(relative, own_names)].append((_key(relative, own_names), path))
    return _match(*sides)


def _match(images: Sequence[tuple[Key, Path]], masks: Sequence[tuple[Key, Path]]) -> Matched:
    """(pairs, images without masks, masks without images)."""
    by_key: dict[Key, list[Path]] = defaultdict(list)
    for key, path in masks:
        by_key[key].append(path)
    by_number: dict[Any, list[Path]] = defaultdict(list)
    for key, path in masks:
        by_number[_number(key)].append(path)
    seen: dict[Key, Path] = {}
    numbers = [_number(key) for key, _ in images]
    pairs: list[Pair] = []
    used: set[Path] = set()
    for (key, path), number in zip(images, numbers, strict=True):
        found = by_key.get(key, [])
        if not found and number is not None and numbers.count(number) == 1 and len(by_number[number]) == 1:
            found = by_number[number]
        if len(found) > 1:
            # Two annotators, or gold and silver truth: the gold one.
            gold = [p for p in found if "gt" in {w for part in p.parts for w in words_of(part)}]
            if len(gold) != 1:
                raise ImageError(
                    f"{path.name} has {len(found)} masks: {found[0]}, {found[1]}; name the sub-folders (--images, --masks)"
                )
            found = gold
        if not found:
            continue
        if key in seen:
            raise ImageError(f"{seen[key]} and {path} have the same mask {found[0].name}; keep one of them")
        seen[key] = path
        pairs.append(Pair(path, (found[0],)))
        used.add(found[0])
    done = {p.image for p in pairs}
    # One image alone in its folder, and masks beside it: one object each.
    lonely: dict[Key, list[Path]] = defaultdict(list)
    pieces: dict[Key, list[Path]] = defaultdict(list)
    for key, path in images:
        lonely[key[:-1]].append(path)
    for key, path in masks:
        pieces[key[:-1]].append(path)
    for place, paths in lonely.items():
        free = [p for p in pieces.get(place, []) if p not in used]
        if place and len(paths) == 1 and paths[0] not in done and len(lonely) > 1 and free:
            pairs.append(Pair(paths[0], tuple(free)))
            done.add(paths[0])
            used.update(free)
    pairs.sort(key=lambda p: p.image)
    return pairs, [p for _, p in images if p not in done], [p for _, p in masks if p not in used]


def _number(key: Key) -> tuple[Key, int] | None:
    """(folder, last number of the name)."""
    digits = [w for w in key[-1] if w.isdigit()]
    return (key[:-1], int(digits[-1])) if digits else None
