"""The input contract: what an ONNX file does not say about the pixels it wants and the numbers it returns.

Frozen values and their JSON; other modules of this package read them from options, metadata and files.
Needs neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Method = Literal["none", "scale", "dtype", "minmax", "percentile", "zscore", "fixed"]
Scope = Literal["image", "channel", "slice"]
Task = Literal["binary", "multiclass", "multilabel", "regression"]
OutputIs = Literal["logits", "probabilities", "values"]
Border = Literal["mirror", "edge", "constant", "zero"]


@dataclass(frozen=True)
class Normalization:
    """How raw pixels become the network's input: ``clip((clip(x, *clip) - offset) / divisor, *clip_after)``, per channel.

    Attributes:
        method: Where offset and divisor come from.
            ``none``: 0 and 1. ``scale``: 0 and ``scale``. ``dtype``: 0 and the largest value of the integer dtype.
            ``minmax``, ``percentile``, ``zscore``: statistics of the whole image, never of a tile.
            ``fixed``: ``mean * scale`` and ``std * scale`` (``imagenet`` is one of these).
        scope: What a statistic is taken over: ``image`` (all channels together), ``channel`` (per channel, all planes of a
            stack together) or ``slice`` (per channel and plane). To a 2-D network each plane of a stack is an image; to a
            3-D one the volumes of a series are one. None: not declared, which is ``slice`` for 2-D networks and
            ``channel`` for 3-D ones.
        scale: Divisor in grey levels.
        percentiles: (low, high) in percent.
        mean, std: One number, or one per channel, in units of ``scale``.
        clip: (low, high) in raw grey levels, applied first; None for no clipping.
        clip_after: (low, high) in the network's units, applied last. Done by clipping raw grey levels where they reach
            these values, so that all channels have to have the same numbers.
        eps: Added to a measured divisor, so that a flat image does not divide by zero.
    """

    method: Method
    scope: Scope | None = None
    scale: float = 1.0
    percentiles: tuple[float, float] = (1.0, 99.8)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    clip: tuple[float, float] | None = None
    eps: float = 1e-6
    clip_after: tuple[float, float] | None = None


@dataclass(frozen=True)
class Head:
    """What one more output of a network with several means; fields as those of :class:`Contract`.

    Attributes:
        name: Of the graph's output.
    """

    name: str
    task: Task | None = None
    output_is: OutputIs | None = None
    classes: tuple[str, ...] = ()
    threshold: tuple[float, ...] = ()


@dataclass(frozen=True)
class Contract:
    """What the network expects and returns. ``None`` (or an empty tuple) means: not declared.

    Attributes:
        axes: Axes of the graph input, e.g. ``"NCYX"``, ``"NYXC"``, ``"NCZYX"``.
        channels: Channel names in the network's order; their number is the number of input channels.
        value_range: (lowest, highest) raw pixel seen or expected, in grey levels.
        normalization: How raw pixels become the input.
        task: What the output means: the first one that is an image, where there are several. An engine that was built
            without samples may leave it open: its values are all there is.
        output_is: Whether the output has yet to pass a softmax or sigmoid.
        classes: Class names in channel order.
        threshold: One number in [0, 1], or one per channel, for binary and multilabel tasks.
        pixel_size_um: Pixel size the network was trained at, per spatial axis, in micrometres.
        trained_tile: Tile size in pixels, per spatial axis, that the network was trained with.
        border: How pixels beyond the image are made: ``mirror`` (the paper's, and the default), ``edge``, ``constant`` (0
            among the raw pixels) or ``zero`` (0 after normalisation, as convolutions pad).
        heads: What the other outputs mean, where there are several.
    """

    axes: str | None = None
    channels: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None
    normalization: Normalization | None = None
    task: Task | None = None
    output_is: OutputIs | None = None
    classes: tuple[str, ...] = ()
    threshold: tuple[float, ...] = ()
    pixel_size_um: tuple[float, ...] = ()
    trained_tile: tuple[int, ...] = ()
    border: Border | None = None
    heads: tuple[Head, ...] = ()

    @property
    def has_labels(self) -> bool:
        """Whether the task makes labels of values; not for a regression, nor while the task is open."""
        return self.task not in (None, "regression")

    def of_head(self, name: str) -> Contract:
        """The contract as that of the output ``name`` alone; what no head of that name declares stays as it is."""
        head = next((h for h in self.heads if h.name == name), None)
        if head is None:
            return replace(self, heads=())
        return replace(
            self, heads=(), task=head.task, output_is=head.output_is, classes=head.classes, threshold=head.threshold
        )

    def over(self, other: Contract) -> Contract:
        """This contract, with everything it does not declare taken from ``other``."""
        unset = Contract()
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(unset, f.name)}
        return replace(other, **given)

    def to_json(self) -> dict[str, Any]:
        given = _declared(asdict(self))
        if self.heads:
            given["heads"] = [_declared(asdict(head)) for head in self.heads]
        return given


def _declared(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value != ()}
