"""Build, step 2: what the network's outputs mean, and what it makes of the first sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .baseline.results import tile_of
from .baseline.samples import Sample
from .build_job import Job, Remarks
from .build_samples import Samples
from .contract.contract import Contract
from .engine import parity as parity_module
from .engine.spec import EngineSpec
from .images.normalize import normalised
from .tiling.grid import square_tile

Array = npt.NDArray[Any]
LEAST_OF_RANGE = 0.02  # of the declared grey levels that samples should cover: 0 to 1 is not 0 to 255


def resolve_task(job: Job, spec: EngineSpec, samples: Samples) -> Contract:
    """The contract, complete: the task of every output by its last operator and by its values on a few samples.

    Raises:
        ContractError: The output can be read in several ways, and the samples are the user's.
    """
    from .contract.task import resolve_heads

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


def describe_first(sample: Sample, raw: Array, contract: Contract, remarks: Remarks) -> dict[str, Any]:
    """What the first sample looks like to the network, and what it makes of it: all of the sample.

    Args:
        sample: The window.
        raw: (K, *spatial), the baseline's first output on it.
        contract: Of that output.
        remarks: Receives warnings about an output that says nothing.
    """
    x = normalised(sample.pixels, sample.numbers)
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
    elif parity_module.saturated(raw, contract) > 0.999:
        remarks.warnings.append(
            f"the output of {sample.name} is saturated (nearly every probability is 0 or 1 to six digits): "
            "check --normalize first, then --output-is"
        )
    return first
