"""The task of a network, and what its outputs mean, told from what is declared and from its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError
from .contract import Contract, Head, OutputIs, Task
from .words import numbers_text

Array = npt.NDArray[Any]

# Last operators that settle the reading of an output.
_SIGMOID = ("Sigmoid", "HardSigmoid")
_POSITIVE = ("Relu", "Softplus", "Exp", "Abs", "Sqrt")
TOLERANCE = 1e-3  # on probabilities and their sum: FP16 graphs round to 5e-4


class AmbiguousTaskError(ContractError):
    """An output can be read in two ways, which the message names."""


def undecided_task(contract: Contract, outputs: Sequence[tuple[str, int, str]]) -> str | None:
    """Why no values could tell what the first output of a network means; None where they tell, or it is declared.

    Args:
        contract: As declared.
        outputs: (name, channels, last operator) of every output.

    Raises:
        ContractError: What is declared contradicts the network, whatever its values.
    """
    first = first_contract(contract, [name for name, _, _ in outputs])
    name, channels, final_op = outputs[0]
    shares, logits = np.zeros((2, 1, channels, 1), np.float32)
    shares[:, 0], logits[:, 0] = 1, -5  # probabilities that add up to one; anything
    errors = list[ContractError]()
    for sample in (shares, np.full((1, channels, 1), 0.7, np.float32), logits):
        try:
            resolve_task(first, channels, final_op, sample)
        except ContractError as error:
            errors.append(error)
        else:
            return None
    if not isinstance(errors[0], AmbiguousTaskError):
        raise errors[0]
    try:
        resolve_task(first, channels, final_op)
    except AmbiguousTaskError as error:
        return f"output {name}: {error}" if len(outputs) > 1 else str(error)
    return str(errors[0])


def resolve_task(
    contract: Contract,
    channels: int,
    final_op: str,
    sample: Array | tuple[float, float] | None = None,
) -> Contract:
    """The contract with ``task``, ``output_is`` and ``threshold`` decided.

    What is declared holds, unless the network cannot mean it. What is not follows from the number of channels, the last
    operator and the values on samples:

    ========  ====================  ==================================  ===========================================
    channels  last operator         values on samples                   reading
    ========  ====================  ==================================  ===========================================
    1         Sigmoid, HardSigmoid  any                                 binary probabilities
    1         Relu, Softplus, ...   any                                 regression (logits are negative too)
    1         any other             any                                 error: binary or regression
    2 or more Softmax               any                                 multi-class probabilities
    2 or more LogSoftmax            any                                 multi-class logits (their softmax is the same)
    2 or more Sigmoid, HardSigmoid  any                                 multi-label probabilities
    2 or more any other             in 0..1, sum to 1 over channels     multi-class probabilities
    2 or more any other             in 0..1, do not                     error: multi-label or regression
    2 or more Relu, Softplus, ...   else                                error: multi-class or regression
    2 or more any other             else, or none                       multi-class logits
    ========  ====================  ==================================  ===========================================

    One channel is never an argmax. Networks for several classes whose loss takes logits end in a convolution; that is
    by far the usual meaning of several channels, so that it is not called ambiguous. A threshold not declared is 0.5.

    Args:
        channels: Of the output.
        final_op: Last operator of the graph that computes this output.
        sample: Raw outputs (N, K, *spatial), or their (lowest, highest) value; None where nothing was run.

    Raises:
        AmbiguousTaskError: Two readings are possible; both are named.
        ContractError: What is declared contradicts the network.
    """
    if final_op in ("ArgMax", "ArgMin"):
        raise ContractError(
            f"the network ends in {final_op}: its output are labels, which cannot be stitched from; export it without"
        )
    if final_op == "Softmax" and channels == 1:
        raise ContractError(
            "the network ends in a Softmax over one channel, which is 1 everywhere; export it with a Sigmoid, or raw"
        )
    task = contract.task or _task(contract, channels, final_op, sample)
    output_is = contract.output_is or _output_is(task, final_op, sample)
    _check_task(task, output_is, channels, final_op)
    check_classes(contract.classes, task, channels)
    return replace(contract, task=task, output_is=output_is, threshold=_threshold(contract.threshold, task, channels))


def _threshold(declared: tuple[float, ...], task: Task, channels: int) -> tuple[float, ...]:
    """The threshold of a task, by default one half; () where it has none."""
    if task not in ("binary", "multilabel"):
        if declared:
            raise ContractError(
                f"a threshold is declared ({numbers_text(declared)}), and a {task} output has none; leave it out, or "
                "declare --task binary or multilabel"
            )
        return ()
    threshold = declared or (0.5,)
    if len(threshold) not in (1, channels):
        many = "one threshold" if channels == 1 else f"one threshold, or {channels}"
        raise ContractError(f"{len(threshold)} thresholds for {channels} output channel(s); give {many}")
    if any(not 0 <= t <= 1 for t in threshold):
        raise ContractError(f"threshold {numbers_text(threshold)} must lie in 0 to 1; it is a probability, e.g. 0.5")
    return threshold


def check_classes(names: tuple[str, ...], task: Task | None, channels: int) -> None:
    """ContractError where names of classes do not fit the channels of an output, or one is there twice."""
    allowed = (1, 2) if task == "binary" else (channels,)
    if names and len(names) not in allowed:
        raise ContractError(
            f"{len(names)} classes are named ({', '.join(names)}) for {channels} output "
            f"channels; name {' or '.join(map(str, allowed))}"
        )
    twice = next((name for k, name in enumerate(names) if name in names[:k]), None)
    if twice is not None:  # figures are kept by name
        raise ContractError(f"two classes are named {twice!r} ({', '.join(names)}); give each a name of its own")


def first_contract(contract: Contract, names: Sequence[str]) -> Contract:
    """The contract as that of the first output alone: its own words, then those of a head of that output's name.

    Raises:
        ContractError: A head is declared that none of the outputs ``names`` is called.
    """
    unknown = [head.name for head in contract.heads if head.name not in names]
    if unknown:
        raise ContractError(f"the contract declares a head {unknown[0]!r}; the outputs are {', '.join(names)}")
    return replace(contract, heads=()).over(contract.of_head(names[0]))


def resolve_heads(
    contract: Contract,
    outputs: Sequence[tuple[str, int, str]],
    samples: Sequence[Array | None],
    *,
    left_open: Callable[[str], None] | None = None,
) -> Contract:
    """:func:`resolve_task` for every output of a network: the first is the contract's own, the others are its heads.

    Of the others, what is declared holds; a last operator that tells (Sigmoid, Softmax) is believed; the rest stay open,
    since nobody may ever ask for them, and neither an error about them nor a budget that they were never meant to hold
    should keep the first one from use.

    Args:
        contract: As declared. A head of the first output's name declares that one.
        outputs: (name, channels, last operator) of every output.
        samples: Its raw values, as for :func:`resolve_task`.
        left_open: Receives the two readings of the first output where there are two, and its task stays open; None: that
            is an error.

    Raises:
        ContractError: As for :func:`resolve_task`; a head that no output has the name of.
    """
    names = [name for name, _, _ in outputs]
    first = first_contract(contract, names)
    resolved, heads = first, list[Head]()
    for k, ((name, channels, final_op), sample) in enumerate(zip(outputs, samples, strict=True)):
        said = contract.of_head(name) if k else first
        if k and all(head.name != name for head in contract.heads):
            if final_op not in (*_SIGMOID, "Softmax", "LogSoftmax") or (final_op == "Softmax" and channels == 1):
                heads.append(Head(name))
                continue
            said = replace(said, task=None, output_is=None, classes=(), threshold=())
        try:
            found = resolve_task(said, channels, final_op, sample)
        except ContractError as error:
            text = f"output {name}: {error}" if len(names) > 1 else str(error)
            if k or left_open is None or not isinstance(error, AmbiguousTaskError):
                raise type(error)(text) from error
            left_open(text)
            found = said
        if k:
            heads.append(Head(name, found.task, found.output_is, found.classes, found.threshold))
        else:
            resolved = found
    return replace(resolved, heads=tuple(heads))


def _task(contract: Contract, channels: int, final_op: str, sample: Array | tuple[float, float] | None) -> Task:
    said, many = contract.output_is, channels > 1
    if said == "values":
        return "regression"
    if final_op in _SIGMOID:
        return "multilabel" if many else "binary"
    if final_op in ("Softmax", "LogSoftmax"):
        return "multiclass"
    if said is not None and not many:
        return "binary"  # logits or probabilities of one channel
    range_text = _range_text(sample)
    if not many:
        if final_op in _POSITIVE:
            return "regression"
        raise AmbiguousTaskError(
            f"the output has one channel, its last operator is {final_op}{range_text}: it can be the logit of a "
            "binary mask or the value of a regression; say which with --task binary or --task regression"
        )
    if said == "logits":
        return "multiclass"
    sums = _sums_to_one(sample)
    if _within_unit(sample):
        if sums:
            return "multiclass"
        if said == "probabilities" and sums is False:
            return "multilabel"
        raise AmbiguousTaskError(
            f"the output has {channels} channels in 0 to 1{'' if sums is None else ' that do not add up to one'}, its "
            "last "
            f"operator is {final_op}: it can be multi-label probabilities or the values of a regression; say which "
            "with --task multilabel or --task regression"
        )
    if said == "probabilities":
        raise AmbiguousTaskError(
            f"the output is declared probabilities, has {channels} channels, its last operator is "
            f"{final_op}{range_text}: "
            "it can be multi-class or multi-label; say which with --task multiclass or --task multilabel"
        )
    if final_op in _POSITIVE:
        raise AmbiguousTaskError(
            f"the output has {channels} channels, its last operator is {final_op}{range_text}: it can be multi-class "
            "logits or the values of a regression; say which with --task multiclass or --task regression"
        )
    return "multiclass"


def _output_is(task: Task, final_op: str, sample: Array | tuple[float, float] | None) -> OutputIs:
    if task == "regression":
        return "values"
    if final_op in (*_SIGMOID, "Softmax"):
        return "probabilities"
    if final_op == "LogSoftmax" or not _within_unit(sample):
        return "logits"
    if task == "multiclass":
        return "probabilities" if _sums_to_one(sample) else "logits"
    return "probabilities"


def _check_task(task: Task, output_is: OutputIs, channels: int, final_op: str) -> None:
    if task == "binary" and channels != 1:
        raise ContractError(
            f"a binary task has one output channel, this network {channels}; use --task multiclass (argmax) or "
            "multilabel"
        )
    if task in ("multiclass", "multilabel") and channels == 1:
        raise ContractError(
            f"a {task} task has several output channels, this network one; use --task binary or --task regression"
        )
    if (task == "regression") != (output_is == "values"):
        raise ContractError(
            f"task {task} and output {output_is} contradict each other; regression goes with values, the others with "
            "logits or probabilities"
        )
    if final_op in (*_SIGMOID, "Softmax") and output_is == "logits":
        raise ContractError(
            f"the output is declared logits, but the network ends in {final_op}; use --output-is probabilities"
        )
    if (task, final_op) in (("multilabel", "Softmax"), ("multilabel", "LogSoftmax")):
        raise ContractError(
            f"the task is declared multilabel, but the network ends in {final_op}; use --task multiclass"
        )


def _range(sample: Array | tuple[float, float] | None) -> tuple[float, float] | None:
    if sample is None:
        return None
    if isinstance(sample, tuple):
        return float(sample[0]), float(sample[1])
    return (float(np.min(sample)), float(np.max(sample))) if sample.size else None


def _range_text(sample: Array | tuple[float, float] | None) -> str:
    limits = _range(sample)
    return "" if limits is None else f", its values on samples {limits[0]:.4g} to {limits[1]:.4g}"


def _within_unit(sample: Array | tuple[float, float] | None) -> bool:
    limits = _range(sample)
    return limits is not None and limits[0] >= -TOLERANCE and limits[1] <= 1 + TOLERANCE


def _sums_to_one(sample: Array | tuple[float, float] | None) -> bool | None:
    """Whether channels add up to one; None where only a range is known."""
    if sample is None or isinstance(sample, tuple) or sample.ndim < 2 or not sample.size:
        return None
    return bool(np.abs(sample.sum(axis=1, dtype=np.float64) - 1).max() <= TOLERANCE * sample.shape[1])
