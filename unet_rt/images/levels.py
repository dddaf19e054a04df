"""Which level of a pyramid is read: one told by its number or its pixel size, or the coarsest that is fine enough.

Where a file says the pixel size of one level only, those of the others follow from their numbers of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ContractError, ImageError

Sizes = tuple[tuple[float, ...], ...]  # micrometres per pixel along the spatial axes, of all levels, finest first

PIXEL_SIZE_TOLERANCE = 0.1  # up to here, two pixel sizes are taken for the same
# Up to here, a level is as fine as what is wanted: scanners measure a nominal 0.5 um as 0.5034, levels have whole pixels.
FINE_ENOUGH = 0.02
_UNITS = ("um", "µm", "μm")  # with the micro sign, and with the Greek letter


def parse_level(level: int | str | None) -> int | float | None:
    """A level's number (int), or its pixel size in micrometres (float) where the text is one, such as ``0.5um``.

    Raises:
        ContractError: It is neither.
    """
    if not isinstance(level, str):
        return level
    text = level.strip().lower()
    if text.isdecimal():
        return int(text)
    unit = next((u for u in _UNITS if text.endswith(u)), None)
    try:
        um = float(text.removesuffix(unit)) if unit else 0.0
    except ValueError:
        um = 0.0
    if not 0 < um < float("inf"):
        raise ContractError(f"--level {level} is neither a number (0: the finest) nor a pixel size such as 0.5um")
    return um


def level_sizes(
    shapes: Sequence[Sequence[int]],
    opened: int,
    size_um: Sequence[float] | None,
    *,
    said: Sizes = (),
    finest_um: Sequence[float] = (),
) -> Sizes:
    """Pixel sizes of all levels, empty where they are not known.

    Args:
        shapes: Spatial shapes of all levels, finest first.
        opened: The level that ``size_um`` is that of.
        size_um: As the file says; None: it does not.
        said: Of all levels, where the file says them level by level.
        finest_um: Of the finest level, in place of what the file says.
    """
    ratios = [[a / b for a, b in zip(shapes[0], shape, strict=True)] for shape in shapes]
    if said:
        ratios = [[a / b for a, b in zip(size, said[0], strict=True)] for size in said]
    if not finest_um:
        if size_um is None:
            return ()
        finest_um = [um / ratio for um, ratio in zip(size_um, ratios[opened], strict=True)]
    return tuple(tuple(um * r for um, r in zip(finest_um, ratio, strict=True)) for ratio in ratios)


def level_of_size(um: float, sizes: Sizes, name: str) -> int:
    """The level whose pixels have a size along Y and X, within ``PIXEL_SIZE_TOLERANCE``; the nearest of several.

    Raises:
        ImageError: There is none, or the pixel sizes are not known.
    """
    if not sizes:
        raise ImageError(
            f"{name}: does not say its pixel size, so that --level {um:g}um names none; give that of the finest level with "
            "--pixel-size, or the level by its number"
        )
    apart = [max(abs(size / um - 1) for size in level[-2:]) for level in sizes]
    nearest = apart.index(min(apart))
    if apart[nearest] > PIXEL_SIZE_TOLERANCE:
        there = ", ".join(um_text(level[-2:]) for level in sizes)
        raise ImageError(
            f"{name}: no level has pixels of {um:g} um (there are {there} um); name one by its number, or leave --level "
            "away and use --resample, which makes pixels of the size of training"
        )
    return nearest


def fine_enough(wanted_um: Sequence[float], sizes: Sizes) -> int:
    """The coarsest level whose pixels are nowhere larger than what is wanted, or than those of the finest level.

    The finest one where nothing is known: what is missing is said where pixels are resampled.
    """
    if not sizes or len(wanted_um) != len(sizes[0]):
        return 0
    most = [max(wanted * (1 + FINE_ENOUGH), finest) for wanted, finest in zip(wanted_um, sizes[0], strict=True)]
    fine = [k for k, level in enumerate(sizes) if all(um <= bound for um, bound in zip(level, most, strict=True))]
    return max(fine, key=lambda k: sum(sizes[k]))


def um_text(sizes: Sequence[float]) -> str:
    """A pixel size for messages: one number where all axes have the same."""
    numbers = [f"{um:.4g}" for um in sizes]
    return numbers[0] if len(set(numbers)) == 1 else " x ".join(numbers)
