"""Build, steps 1 and 2: windows of the samples, some set aside to calibrate INT8 on; what the outputs mean on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import backends
from ..baseline.model import Model
from ..baseline.results import tile_of
from ..baseline.samples import ReadOptions, SampleWindow, draw, draw_generated, sample_images
from ..contract.contract import Contract, Normalization
from ..engine import parity as parity_module
from ..engine.spec import EngineSpec
from ..errors import ImageError
from ..graph.passes.qdq import FORMS
from ..images.normalize import normalize_pixels
from ..tiling.grid import square_tile
from .calibration import input_ranges, split
from .job import BuildJob, Remarks, Scope
from .report import Kind

Array = npt.NDArray[Any]
LEAST_OF_RANGE = 0.02  # of the declared grey levels that samples should cover: 0 to 1 is not 0 to 255


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
    judging: tuple[SampleWindow, ...]
    calibrating: tuple[SampleWindow, ...] = ()
    value_range: tuple[float, float] | None = None
    input_range: list[list[float]] | None = None


def read_samples(model: Model, samples: Any, read: ReadOptions, remarks: Remarks) -> tuple[Model, Samples]:
    """Windows of the user's images, or generated ones where there are none; and the model, its normalisation settled.

    Raises:
        ImageError: No image, none that proves anything, or NaN among the pixels.
    """
    if samples is None:
        return model, Samples("synthetic", tuple(draw_generated(model.contract, model.input_specs(), model.spatial)))
    images = sample_images(samples, remarks.notes.append)
    if model.contract.normalization is None:
        model = replace(model, contract=replace(model.contract, normalization=Normalization("none")))
        remarks.notes.append("no normalisation is declared and the samples are floating point: used as they are")
    windows = draw(
        images,
        model.contract,
        spatial=model.spatial,
        network_channels=model.channels,
        read=read,
        note=remarks.notes.append,
    )
    lows, highs = zip(*((float(s.pixels.min()), float(s.pixels.max())) for s in windows), strict=True)
    seen = np.stack([input_ranges(sample) for sample in windows])
    input_range = np.stack([seen[..., 0].min(axis=0), seen[..., 1].max(axis=0)], axis=1).tolist()
    if len(images) < 3:
        remarks.notes.append(f"parity rests on {len(images)} image(s); three or more prove more")
    remarks.say(f"samples: {len(windows)} windows; {windows[0].reading}")
    return model, Samples("samples", tuple(windows), (), (min(lows), max(highs)), input_range)


def set_aside(samples: Samples, scope: Scope, remarks: Remarks, *, explicit: bool) -> tuple[Samples, Scope]:
    """Windows set aside to calibrate INT8 on, if it is to be tried; and what can be tried with them.

    Raises:
        ImageError: The samples are too small to be cut in two, and the precision was asked for (``explicit``).
    """
    if scope.as_given:
        return samples, scope
    usable = any("int8" in backends.get(name).precisions(scope.device) and name in FORMS for name in scope.backends)
    without = replace(scope, precisions=tuple(p for p in scope.precisions if p != "int8"))
    if "int8" not in scope.precisions or (not usable and not explicit):
        return samples, without
    try:
        calibrating, judging, note = split(samples.judging)
    except ImageError as error:
        if explicit:
            raise
        remarks.notes.append(f"INT8 was not tried: {error}")
        return samples, without
    remarks.notes.append(note)
    return replace(samples, judging=tuple(judging), calibrating=tuple(calibrating)), scope


def settle_contract(job: BuildJob, spec: EngineSpec, samples: Samples) -> Contract:
    """The contract, complete: the task of every output by its last operator and by its values on a few samples.

    Raises:
        ContractError: The output can be read in several ways, and the samples are the user's.
    """
    from ..contract.task import resolve_heads

    model, remarks = job.model, job.remarks
    tile = square_tile(spec.sizes, spec.outputs, 256 * 256)
    values = [job.baseline.run(tile_of(s, spec, tile, job.threads)) for s in samples.judging[:4]]

    def leave_open(readings: str) -> None:
        remarks.warnings.append(
            f"{readings}; until then predict gives the values themselves (--output raw), and no mask"
        )

    contract = resolve_heads(
        model.contract,
        [(o.name, o.channels, final) for o, final in zip(model.report.outputs, model.report.final_ops, strict=True)],
        [np.concatenate(ys) for ys in zip(*values, strict=True)],
        # generated tiles tell nothing of what the values mean, and need not: parity of FP32 is held on the values
        left_open=leave_open if samples.kind == "synthetic" else None,
    )
    if samples.value_range is not None and contract.value_range is None:
        contract = replace(contract, value_range=samples.value_range)
    elif samples.value_range is not None and contract.value_range is not None:
        _compare_ranges(contract.value_range, samples.value_range, remarks)
    remarks.notes.extend(
        f"output {head.name} is not judged, only measured: neither heads of the contract nor its last operator say "
        "what it means"
        for head in contract.heads
        if head.task is None
    )
    return contract


def _compare_ranges(declared: tuple[float, float], seen: tuple[float, float], remarks: Remarks) -> None:
    """A warning where samples hold other grey levels than the model declares: most often another bit depth."""
    beyond = seen[0] < declared[0] or seen[1] > declared[1]
    if beyond or seen[1] - seen[0] < LEAST_OF_RANGE * (declared[1] - declared[0]):
        remarks.warnings.append(
            f"the samples run from {seen[0]:g} to {seen[1]:g}, and the model declares {declared[0]:g} to "
            f"{declared[1]:g}: look at their bit depth and --normalize first, results are proven for what was passed"
        )


def describe_first(sample: SampleWindow, raw: Array, contract: Contract, remarks: Remarks) -> dict[str, Any]:
    """What the first sample looks like to the network, and what it makes of it: all of the sample.

    Args:
        sample: The window.
        raw: (K, *spatial), the baseline's first output on it.
        contract: Of that output.
        remarks: Receives warnings about an output that says nothing.
    """
    x = normalize_pixels(sample.pixels, sample.numbers)
    first: dict[str, Any] = {
        "name": sample.name,
        "reading": sample.reading,
        "input_range": [float(x.min()), float(x.max())],
        "input_mean": float(x.mean()),
        "input_std": float(x.std()),
    }
    if not contract.has_labels:
        first["output_range"] = [float(raw.min()), float(raw.max())]
        if raw.max() == raw.min():
            remarks.warnings.append(f"the output is constant ({raw.max():g}): check --normalize first, then --channels")
        return first
    masks = parity_module.labels(raw, contract)
    first["class_share"] = {
        name: float(mask.mean()) for name, mask in parity_module.class_masks(masks, contract, len(raw))
    }
    if masks.min() == masks.max():
        remarks.warnings.append(
            f"the mask of {sample.name} is constant ({int(masks.max())} everywhere): most often the "
            "normalisation is not the one of the training; check --normalize first, then --channels, --task, --output-is"
        )
    elif parity_module.saturated_share(raw, contract) > 0.999:
        remarks.warnings.append(
            f"the output of {sample.name} is saturated (nearly every probability is 0 or 1 to six digits): "
            "check --normalize first, then --output-is"
        )
    return first
