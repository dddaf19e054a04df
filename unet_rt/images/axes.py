"""Which axis of an image is which, and which channels the network gets: by declaration, by metadata, else by rule.

Letters: ``Y X`` (and ``Z``) spatial, ``C`` channels, ``S`` colour samples of a pixel, ``T`` time; any other letter
(``I`` pages of a file, ``N`` batch, ...) is a sequence. What is neither spatial nor a channel is a plane axis: the
network runs over each plane. For a 2-D network ``Z`` is a plane axis too.

The rules for images that declare nothing, ``n`` being the number of channels of the network:

==========  ======================================================================================================
2-D, ndim   reading
==========  ======================================================================================================
2           ``YX``
3           ``CYX`` or ``YXC``, whichever axis has size ``n``; ``n == 1``: ``IYX`` (planes) unless the last axis is
            3 or 4 (colour), or the first one is or the last one is 2 or 5 to 16 beside two larger ones (planes or
            channels: an error that names both)
4           ``ICYX`` or ``IYXC``, whichever axis has size ``n``; ``n == 1``: ``TZYX``
5           ``TZCYX``, ``TCZYX`` or ``TZYXC``
==========  ======================================================================================================

3-D networks: the same with ``ZYX`` in place of ``YX``. Two fitting axes are a ContractError that names both readings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ContractError, size_text

LUMA = "luma"
MAX_BY_RULE = 4  # an axis of 3 or 4 next to a large one is taken for colour, more are not
MAX_CHANNELS = 16  # colours or a few stains: a last axis of up to so many may hold channels


@dataclass(frozen=True)
class Layout:
    """How an image's axes are read.

    Attributes:
        axes: One letter per axis of the stored pixels, e.g. ``"TCZYX"``.
        shape: Their sizes.
        spatial: Positions of (Z,) Y, X.
        channel: Position of the channel axis, None if there is none.
        planes: Positions of the plane axes, in stored order.
        notes: What was decided by rule, for the printed reading.
    """

    axes: str
    shape: tuple[int, ...]
    spatial: tuple[int, ...]
    channel: int | None
    planes: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels stored: 1 without a channel axis."""
        return 1 if self.channel is None else self.shape[self.channel]

    @property
    def channel_letter(self) -> str:
        """``C``, or ``S`` where the channels are the colours of one picture; empty without a channel axis."""
        return "" if self.channel is None else self.axes[self.channel]

    @property
    def plane_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.planes)

    @property
    def plane_axes(self) -> str:
        return "".join(self.axes[i] for i in self.planes)

    @property
    def plane_count(self) -> int:
        return math.prod(self.plane_shape)

    @property
    def space(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.spatial)


@dataclass(frozen=True)
class ChannelChoice:
    """Which stored channels make the network's channels.

    Attributes:
        channels: Stored channel per network channel; repeats allowed. The three colours for ``luma``.
        luma: The three colours are mixed into one channel.
        text: For the printed reading: ``"channel 0 of 2"``.
        check: What must hold for every pixel before this choice is right: ``opaque`` (the dropped alpha channel is
            fully opaque), ``equal`` (the colours dropped equal the one taken), or nothing.
    """

    channels: tuple[int, ...]
    text: str
    luma: bool = False
    check: str = ""


def parse_channels(text: str) -> tuple[int, ...] | str:
    """``"0,2"`` -> (0, 2); ``"luma"`` or channel names stay text. ContractError for anything that cannot be either."""
    parts = [part.strip() for part in text.split(",")]
    if not text.strip() or "" in parts:
        raise ContractError(f"--channels {text!r} has an empty entry; use e.g. --channels 0 or --channels 2,1,0")
    if all(part.isdigit() for part in parts):
        return tuple(int(part) for part in parts)
    if any(part.lstrip("+-").isdigit() for part in parts):
        raise ContractError(f"--channels {text!r}: channels count from 0 and are not negative; use e.g. --channels 0")
    return text.strip()


def read_axes(
    shape: Sequence[int],
    *,
    name: str,
    spatial: int,
    found: str | None = None,
    given: str | None = None,
    wanted: int | None = None,
    least: int = 0,
) -> Layout:
    """The layout of an image of ``shape``.

    Args:
        name: For messages.
        spatial: Spatial axes of the network, 2 or 3.
        found: Axes from metadata; None where there are none.
        given: Axes that the user declared; they win.
        wanted: Channels of the network; None where unknown.
        least: Stored channels that a selection of the user needs at least; 1 (channel 0 alone) decides between two
            readings and no more; 0: no selection, the number must fit.

    Raises:
        ContractError: The axes do not fit the network, or two readings do.
    """
    shape = tuple(int(n) for n in shape)
    if spatial not in (2, 3):
        raise ContractError(f"a network with {spatial} spatial axes is not supported; 2 and 3 are")
    if given is not None:
        return _layout(_check_given(given, shape, name), shape, spatial, name)
    if found is None or "Q" in found:
        # Q is the TIFF library's letter for "unknown".
        axes, notes = _by_rule(shape, spatial, wanted, least, name)
        return _layout(axes, shape, spatial, name, notes)
    return _from_metadata(found, shape, spatial, wanted, least, name)


def _check_given(given: str, shape: tuple[int, ...], name: str) -> str:
    axes = given.strip().upper()
    if not axes.isalpha() or len(set(axes)) != len(axes) or not {"Y", "X"} <= set(axes):
        raise ContractError(f"--axes {given!r} must be different letters with Y and X among them; use e.g. --axes ZYX")
    if len(axes) != len(shape):
        raise ContractError(
            f"{name}: --axes {given} names {len(axes)} axes, the pixels have {len(shape)} ({size_text(shape)}); "
            "give one letter per axis"
        )
    return axes


def _layout(axes: str, shape: tuple[int, ...], spatial: int, name: str, notes: tuple[str, ...] = ()) -> Layout:
    space = "ZYX"[-spatial:]
    missing = [letter for letter in space if letter not in axes]
    if missing:
        raise ContractError(
            f"{name}: axes {axes} ({size_text(shape)}) have no {' and no '.join(missing)}, and the network needs "
            f"{space}; "
            f"declare the axes, e.g. --axes {_suggest(axes, space)}"
        )
    both = [axes.index(letter) for letter in "CS" if letter in axes]
    large = [i for i in both if shape[i] > 1]
    if len(large) > 1:
        raise ContractError(
            f"{name}: axes {axes} ({size_text(shape)}) hold channels (C) and colour samples (S); declare one of them a "
            f"sequence, e.g. --axes {axes.replace('C', 'T' if 'T' not in axes else 'I')}"
        )
    channel = large[0] if large else (both[0] if both else None)
    positions = tuple(axes.index(letter) for letter in space)
    planes = tuple(i for i in range(len(axes)) if i not in positions and i != channel)
    return Layout(axes, shape, positions, channel, planes, notes)


def _suggest(axes: str, space: str) -> str:
    """Axes with one plane letter taken for the missing Z, as an example for a message."""
    if "Z" in space and "Z" not in axes:
        for letter in "ITN":
            if letter in axes:
                return axes.replace(letter, "Z")
    return space


def _from_metadata(
    found: str, shape: tuple[int, ...], spatial: int, wanted: int | None, least: int, name: str
) -> Layout:
    axes, notes = found.upper(), []
    has_channel = any(letter in axes for letter in "CS")
    if spatial == 3 and "Z" not in axes and axes.count("I") == 1:
        axes = axes.replace("I", "Z")
        notes.append("pages taken as Z")
    elif (
        not has_channel
        and wanted is not None
        and wanted > 1
        and not least
        and "I" in axes
        and shape[axes.index("I")] == wanted
    ):
        # Grey pages do not fit a network of several channels in any other reading.
        axes = axes.replace("I", "C")
        notes.append("pages taken as channels")
    return _layout(axes, shape, spatial, name, tuple(notes))


def _by_rule(
    shape: tuple[int, ...], spatial: int, wanted: int | None, least: int, name: str
) -> tuple[str, tuple[str, ...]]:
    space = "ZYX"[-spatial:]
    ndim, extra = len(shape), len(shape) - spatial
    if extra < 0:
        raise ContractError(
            f"{name}: pixels of {ndim} axes ({size_text(shape)}) are not enough for a {spatial}-D network; "
            f"it needs at least {space}"
        )
    if extra == 0:
        return space, ()
    sequence = {2: "TZI", 3: "TIN"}[spatial]
    readings = {  # in order of preference where they mean the same
        (2, 1): ["CYX", "YXC"],
        (2, 2): ["ICYX", "IYXC"],
        (2, 3): ["TZCYX", "TCZYX", "TZYXC"],
        (3, 1): ["CZYX", "ZCYX", "ZYXC"],
        (3, 2): ["TCZYX", "TZCYX", "TZYXC"],
    }.get((spatial, extra))
    if readings is None:
        raise ContractError(
            f"{name}: pixels of {ndim} axes ({size_text(shape)}) say nothing about their meaning; "
            f"declare them, e.g. --axes {'TZCYX'[-ndim:]}"
        )
    planes_only = (sequence[:extra] if extra > 1 else ("I" if spatial == 2 else "T")) + space
    sizes = {axes: shape[axes.index("C")] for axes in readings}
    if least > 1:  # the user picks channels: an axis that has them and is no larger than colours or a few stains
        fits = [axes for axes in readings if least <= sizes[axes] <= MAX_CHANNELS]
    elif wanted is None:
        fits = [axes for axes in readings if sizes[axes] in (1, 3, 4)]
    else:
        fits = [axes for axes in readings if sizes[axes] == wanted]
    if len(fits) > 1 and all(sizes[axes] == 1 for axes in fits):
        fits = fits[:1]  # an axis of size one: every reading gives the same planes
    if len(fits) > 1:
        raise ContractError(
            f"{name}: {size_text(shape)} can be read as {' or '.join(fits)}; say which with --axes, "
            f"e.g. --axes {fits[0]}"
        )
    if fits:
        return fits[0], ("axes by rule",)
    last = readings[-1]
    if sizes[last] in (3, MAX_BY_RULE) and shape[last.index("X")] > MAX_BY_RULE:
        return last.replace("C", "S"), ("axes by rule",)  # colour: whether it fits is for the channels to say
    if wanted is None or wanted == 1:
        few = readings[0] if extra == 1 and shape[0] in (3, MAX_BY_RULE) else ""
        if 1 < shape[-1] <= MAX_CHANNELS < min(shape[-3:-1]):
            few = last
        if few and not least:
            raise ContractError(
                f"{name}: {size_text(shape)} can be read as {planes_only} ({math.prod(shape[:extra])} planes) or {few} "
                f"({sizes[few]} channels); say which with --axes, e.g. --axes {planes_only}"
            )
        return few or planes_only, ("axes by rule",)
    raise ContractError(
        f"{name}: no axis of {size_text(shape)} has the {wanted} channels of the network; "
        f"declare the axes with --axes (e.g. --axes {readings[0]}) and choose with --channels"
        + (", or --channels slices for a network of neighbouring slices" if spatial == 2 and wanted % 2 else "")
    )


def choose_channels(
    layout: Layout,
    *,
    name: str,
    wanted: int | None,
    selection: Sequence[int] | str | None = None,
    names: Sequence[str] = (),
    wanted_names: Sequence[str] = (),
    alpha: int | None = None,
) -> ChannelChoice:
    """Which stored channels the network gets.

    Args:
        wanted: Channels of the network; None: all that are stored.
        selection: The user's: indices, channel names, or ``"luma"``.
        names: Names of the stored channels, from metadata.
        wanted_names: Names of the network's channels, from the contract.
        alpha: Stored channel that is an alpha channel, None if none is.

    Raises:
        ContractError: The number does not fit and the user chose nothing.
    """
    stored = layout.channels
    if selection is not None:
        return _select(layout, name, wanted, selection, names)
    if wanted is None:
        wanted = stored if alpha is None else stored - 1
    if not names and layout.channel_letter == "S" and stored in (3, 4):
        names = ("red", "green", "blue", "alpha")[:stored]
    by_name = {channel_name.lower(): index for index, channel_name in enumerate(names)}
    if len(wanted_names) == wanted and len(by_name) == len(names) and all(n.lower() in by_name for n in wanted_names):
        picked = tuple(by_name[n.lower()] for n in wanted_names)
        if picked != tuple(range(stored)):
            dropped = alpha is not None and alpha not in picked
            text = f"{_picked_text(picked, stored)} by name ({', '.join(wanted_names)})"
            return ChannelChoice(picked, text, check="opaque" if dropped else "")
    if wanted == stored and (alpha is None or wanted > 2):
        text = _count_text(stored) + ("" if alpha is None else ", alpha among them")
        return ChannelChoice(tuple(range(stored)), text)
    colours = tuple(i for i in range(stored) if i != alpha)
    if alpha is not None and wanted == len(colours):
        return ChannelChoice(colours, f"{_count_text(wanted)}, opaque alpha dropped", check="opaque")
    if wanted == 1 and len(colours) == 3:
        # Grey saved as colour is common; that the colours are equal is checked on every pixel.
        return ChannelChoice((0,), "equal colours taken as one channel", check="equal")
    raise ContractError(_mismatch_text(layout, name, wanted, names))


def _select(
    layout: Layout, name: str, wanted: int | None, selection: Sequence[int] | str, names: Sequence[str]
) -> ChannelChoice:
    stored = layout.channels
    if isinstance(selection, str):
        parsed = parse_channels(selection)
        if parsed == LUMA:
            if stored not in (3, 4) or wanted not in (1, None):
                raise ContractError(
                    f"{name}: --channels luma makes one channel of red, green and blue; the image has {stored} "
                    f"channels and the network takes {wanted}; choose by number, e.g. --channels 0"
                )
            return ChannelChoice((0, 1, 2), "luma of 3 colours", luma=True)
        selection = _by_name(parsed, name, names) if isinstance(parsed, str) else parsed
    picked = tuple(int(index) for index in selection)
    bad = [index for index in picked if not 0 <= index < stored]
    if bad or not picked:
        raise ContractError(
            f"{name}: channel {bad[0] if bad else 'selection'} does not exist; the image has {stored} "
            f"(0 to {stored - 1}){_names_text(names)}; choose with --channels"
        )
    if wanted is not None and len(picked) != wanted:
        raise ContractError(
            f"{name}: --channels names {len(picked)} channels, the network takes {wanted}; "
            + (_grey_text(wanted) if stored == 1 < wanted else f"name as many{_example(stored, wanted)}")
        )
    return ChannelChoice(picked, _picked_text(picked, stored))


def _by_name(text: str, name: str, names: Sequence[str]) -> tuple[int, ...]:
    lower = [n.lower() for n in names]
    picked = []
    for part in (p.strip() for p in text.split(",")):
        if lower.count(part.lower()) != 1:
            known = _names_text(names) or "; the image names no channels"
            raise ContractError(f"{name}: no single channel is called {part!r}{known}; choose by number, --channels 0")
        picked.append(lower.index(part.lower()))
    return tuple(picked)


def _count_text(count: int) -> str:
    return "1 channel" if count == 1 else f"{count} channels"


def _picked_text(picked: tuple[int, ...], stored: int) -> str:
    return f"channel{'s' if len(picked) > 1 else ''} {','.join(map(str, picked))} of {stored}"


def _names_text(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _example(stored: int, wanted: int) -> str:
    return f", e.g. --channels {','.join(map(str, range(wanted)))}" if wanted <= stored else ""


def _grey_text(wanted: int) -> str:
    """What to do with grey for a network of several channels: slices and one grey repeated are for different networks."""
    slices = "if it takes neighbouring slices of a stack, use --channels slices; " if wanted % 2 else ""
    return (
        f"{slices}--channels {','.join('0' * wanted)} gives the same grey for each: right for colours, never for slices"
    )


def _mismatch_text(layout: Layout, name: str, wanted: int, names: Sequence[str]) -> str:
    stored = layout.channels
    fact = (
        f"{name}: the image has {_count_text(stored)} ({layout.axes} {size_text(layout.shape)}){_names_text(names)}, "
        f"the network takes {wanted}"
    )
    if stored == 1:
        return f"{fact}; {_grey_text(wanted)}"
    if wanted == 1 and stored in (3, 4):
        luma = ", or --channels luma for their luminance" if layout.channel_letter == "S" else ""
        return f"{fact}; use --channels 0 (or 1, 2) for one of them{luma}"
    ways = f"choose with --channels{_example(stored, wanted)}"
    return f"{fact}; {ways}, or declare other axes with --axes"
