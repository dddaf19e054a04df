"""What becomes of a network's numbers: labels, probabilities or values."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any, Literal

import numpy as np

from ..contract.contract import Contract
from ..errors import ContractError
from ..kernels.request import Op, Operation

OutputKind = Literal["mask", "probability", "raw"]


@dataclass(frozen=True)
class Decision:
    """What becomes of the network's numbers.

    Attributes:
        op: The kernel's operation.
        channels: Channels of the result; 0 where it has no channel axis.
        dtype: Of the result.
        threshold: Per channel, on the network's own values (a probability of 0.5 is the logit 0).
        values: uint8 value of every class in a mask.
    """

    op: Op
    channels: int
    dtype: np.dtype[Any]
    threshold: tuple[float, ...] = ()
    values: tuple[int, ...] = ()


def default_output(contract: Contract) -> OutputKind:
    """Masks for classes, the values themselves for regression."""
    return "raw" if contract.task == "regression" else "mask"


def decide(
    contract: Contract, channels: int, output: OutputKind | None = None, mask_values: tuple[int, ...] = ()
) -> Decision:
    """The decision for an output of ``channels`` channels.

    Args:
        contract: Its task, output_is and threshold must be declared, but for ``raw``.
        channels: Channels of the network's output.
        output: ``mask`` (uint8), ``probability`` (float32) or ``raw`` (float32). None: by the task.
        mask_values: Value per class (multiclass), or (off, on); empty: 0, 1, 2, ...

    Raises:
        ContractError: A mask or probability of a regression, a mask of more than 256 classes, or the wrong number of
            mask values or thresholds.
    """
    task, kind = contract.task, output or default_output(contract)
    if kind == "raw":
        return Decision("copy", channels, np.dtype(np.float32))
    if task is None:
        raise ContractError(
            f"what the network's values mean was left open, so that they make no {kind}; use --output raw, or build again "
            "with --task binary, multiclass, multilabel or regression (for a further output: heads of the contract)"
        )
    if contract.output_is is None and task != "regression":
        raise ContractError(f"nothing says whether the {task} output is logits or probabilities; pass --output-is")
    if task == "regression":
        raise ContractError(f"a regression has no {kind}; use --output raw")
    logits = contract.output_is == "logits"
    if kind == "probability":
        op: Op = "copy" if not logits else "softmax" if task == "multiclass" else "sigmoid"
        return Decision(op, channels, np.dtype(np.float32))
    labels = channels if task == "multiclass" else 2
    if labels > 256:
        raise ContractError(f"{labels} classes do not fit a uint8 mask; use --output raw and take the argmax yourself")
    values = mask_values or tuple(range(labels))
    if len(values) != labels or not all(0 <= v <= 255 and v == int(v) for v in values):
        raise ContractError(
            f"--mask-values {','.join(map(str, values))} must be {labels} numbers of 0 to 255, one per label"
        )
    if labels > 1 and len(set(values)) == 1:
        raise ContractError(
            f"--mask-values {','.join(map(str, values))} gives every label the same value; use e.g. 0,255"
        )
    values = tuple(int(v) for v in values)
    if task == "multiclass":
        return Decision("argmax", 0, np.dtype(np.uint8), values=values)
    threshold = contract.threshold or (0.5,)
    threshold = threshold * channels if len(threshold) == 1 else threshold
    if len(threshold) != channels:
        raise ContractError(f"{len(threshold)} thresholds for {channels} channels; pass one, or one per channel")
    raw = tuple(_logit(t) if logits else float(t) for t in threshold)
    return Decision("threshold", channels if task == "multilabel" else 0, np.dtype(np.uint8), raw, values)


def _logit(p: float) -> float:
    if not 0 < p < 1:
        raise ContractError(f"threshold {p} is not between 0 and 1 (exclusive), as probabilities are")
    return log(p / (1 - p))


def decision_operation(decision: Decision) -> Operation:
    """What the kernels are asked to do for a decision."""
    return Operation(
        decision.op,
        np.array(decision.threshold, dtype=np.float32) if decision.threshold else None,
        np.array(decision.values, dtype=np.uint8) if decision.values else None,
    )
