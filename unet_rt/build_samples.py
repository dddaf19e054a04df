"""Build, step 1: windows of the samples are drawn, and some are set aside to calibrate INT8 on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import backends
from .baseline.model import Model
from .baseline.samples import Sample, draw, sample_images, synthetic
from .build_job import Remarks
from .build_report import Kind
from .calibration import input_ranges, split
from .engine.spec import Precision
from .errors import ImageError
from .graph.passes.qdq import FORMS


@dataclass(frozen=True)
class Samples:
    """The windows that a build measures on.

    Attributes:
        kind: The user's, or generated ones.
        judging: Windows that parity is judged on; at least one.
        calibrating: Windows that INT8 is calibrated on; no pixel of them judges.
        value_range: Lowest and highest pixel of all windows, raw; None for generated ones.
        input_range: [lowest, highest] value of each channel as the network gets it; None for generated ones.
    """

    kind: Kind
    judging: tuple[Sample, ...]
    calibrating: tuple[Sample, ...] = ()
    value_range: tuple[float, float] | None = None
    input_range: list[list[float]] | None = None


def read_samples(
    model: Model, samples: Any, axes: str | None, channels: Sequence[int] | None, remarks: Remarks
) -> tuple[Model, Samples]:
    """Windows of the user's images, or generated ones where there are none; and the model, its normalisation settled.

    Raises:
        ContractError: Integer pixels, and nothing says how they are normalised.
        ImageError: No image, none that proves anything, or NaN among the pixels.
    """
    if samples is None:
        return model, Samples("synthetic", tuple(synthetic(model.contract, model.channels, model.spatial)))
    images = sample_images(samples)
    if model.contract.normalization is None:
        model = _without_normalization(model, images[0], axes, channels)
        remarks.notes.append("no normalisation is declared and the samples are floating point: used as they are")
    windows = draw(
        images,
        model.contract,
        spatial=model.spatial,
        network_channels=model.channels,
        axes=axes,
        channels=channels,
        note=remarks.notes.append,
    )
    lows, highs = zip(*((float(s.pixels.min()), float(s.pixels.max())) for s in windows), strict=True)
    seen = np.stack([input_ranges(sample) for sample in windows])
    input_range = np.stack([seen[..., 0].min(axis=0), seen[..., 1].max(axis=0)], axis=1).tolist()
    if len(images) < 3:
        remarks.notes.append(f"parity rests on {len(images)} image(s); three or more prove more")
    remarks.say(f"samples: {len(windows)} windows; {windows[0].reading}")
    return model, Samples("samples", tuple(windows), (), (min(lows), max(highs)), input_range)


def _without_normalization(model: Model, image: Any, axes: str | None, channels: Sequence[int] | None) -> Model:
    """The model for pixels as they are, which only floating point ones can be taken for."""
    from .contract.contract import Normalization
    from .images.normalize import missing_normalization
    from .images.open import open_image

    with open_image(
        image,
        model.contract,
        axes=axes,
        channels=channels,
        spatial=model.spatial,
        network_channels=model.channels,
    ) as source:
        if source.dtype.kind in "iu":
            raise missing_normalization(source)
    return replace(model, contract=replace(model.contract, normalization=Normalization("none")))


def set_aside(
    samples: Samples,
    names: Sequence[str],
    precisions: Sequence[Precision],
    device: str,
    remarks: Remarks,
    *,
    explicit: bool,
) -> tuple[Samples, tuple[Precision, ...]]:
    """Windows set aside to calibrate INT8 on, if it is to be tried; and the precisions that can be.

    Raises:
        ImageError: The samples are too small to be cut in two, and the precision was asked for (``explicit``).
    """
    usable = any("int8" in backends.get(name).precisions(device) and name in FORMS for name in names)
    without = tuple(p for p in precisions if p != "int8")
    if "int8" not in precisions or (not usable and not explicit):
        return samples, without
    try:
        calibrating, judging, note = split(samples.judging)
    except ImageError as error:
        if explicit:
            raise
        remarks.notes.append(f"INT8 was not tried: {error}")
        return samples, without
    remarks.notes.append(note)
    return replace(samples, judging=tuple(judging), calibrating=tuple(calibrating)), tuple(precisions)
