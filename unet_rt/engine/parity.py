"""Agreement of two results of the same network: numbers, budgets, verdicts. A judge: it returns, it never prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..contract.contract import Contract
from ..errors import ContractError
from ..system.json import Record
from ..tiling.decision import decide
from .budget import Budget

if TYPE_CHECKING:
    from .spec import EngineSpec


Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ImageParity(Record):
    """Agreement on one image.

    Attributes:
        name: Of the image.
        head: The network's output, where it has several, else "".
        judged: Whether it has a say; numbers of a further output that nothing says the meaning of are reported alone.
        pixels: Samples compared (per channel).
        label_change: Share of pixels whose label differs (in any channel, for multilabel); None where there are none.
        dice: Per class name, of the classes present in either mask.
        class_px: Per class name, pixels in the baseline's mask.
        max_abs, mean_abs: Error of the network's own values.
        relative: The largest error over the range of the baseline's values (:func:`value_span`); of an output without
            labels channel by channel, the worst one: a channel of small values must not hide beside one of large ones.
        candidate_px: Per class name, pixels in the other mask.
        channels: (largest error, range of the baseline's values) that ``relative`` is made of.
    """

    name: str
    pixels: int
    label_change: float | None
    dice: Mapping[str, float]
    class_px: Mapping[str, int]
    max_abs: float
    mean_abs: float
    relative: float
    head: str = ""
    judged: bool = True
    candidate_px: Mapping[str, int] = field(default_factory=dict)
    channels: tuple[tuple[float, float], ...] = ()

    @property
    def changed(self) -> float:
        """What an image is judged by first: labels changed, or the error where there are none."""
        return self.relative if self.label_change is None else self.label_change

    @property
    def title(self) -> str:
        """Image and output, for messages."""
        return f"{self.name}, output {self.head}" if self.head else self.name

    def largest_px(self, name: str) -> int:
        """Pixels of a class in whichever mask it has more of."""
        return max(self.class_px[name], self.candidate_px.get(name, 0))


def labels(raw: Array, contract: Contract) -> Array:
    """Labels (uint8) of the network's own values ``raw`` (K, *spatial): (1 or K, *spatial). NumPy, for judging only."""
    decision = decide(contract, len(raw), "mask")
    if decision.op == "argmax":
        winner: Array = np.argmax(raw, axis=0).astype(np.uint8)[None]
        return winner
    limits = np.array(decision.threshold, dtype=np.float32).reshape(-1, *[1] * (raw.ndim - 1))
    above: Array = (raw > limits).astype(np.uint8)
    return above


def dice(a: Array, b: Array) -> float:
    """Dice (1945) coefficient of two boolean masks; 1 where both are empty."""
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 1.0 if total == 0 else 2.0 * int(np.count_nonzero(a & b)) / total


def judged_outputs(spec: EngineSpec) -> list[int]:
    """The outputs that have a say: the first, and further ones whose meaning is known."""
    return [k for k in range(len(spec.outputs)) if k == 0 or spec.contract_of(k).task is not None]


def compare_outputs(
    baseline: Sequence[Array], candidate: Sequence[Array], spec: EngineSpec, name: str
) -> list[ImageParity]:
    """Compares every output (K, *spatial) of one image, each by what the contract says that it means."""
    return [compare_output(a, b, spec, k, name) for k, (a, b) in enumerate(zip(baseline, candidate, strict=True))]


def compare_output(baseline: Array, candidate: Array, spec: EngineSpec, output: int, name: str) -> ImageParity:
    """Compares output number ``output`` (K, *spatial) of one image by what the contract says that it means."""
    head = spec.outputs[output].name if len(spec.outputs) > 1 else ""
    one = compare(baseline, candidate, spec.contract_of(output), name)
    return replace(one, head=head, judged=output in judged_outputs(spec))


def compare(baseline: Array, candidate: Array, contract: Contract, name: str = "") -> ImageParity:
    """Compares the network's own values (K, *spatial) of one image."""
    if baseline.shape != candidate.shape:
        raise ContractError(f"{name}: results of shapes {baseline.shape} and {candidate.shape} cannot be compared")
    with np.errstate(invalid="ignore"):  # infinity minus infinity: equal infinities differ by nothing
        error = np.abs(candidate.astype(np.float64) - baseline)
    error[candidate == baseline] = 0.0
    error[np.isnan(error)] = np.inf  # a NaN compares with nothing and would pass every bound
    parts = [(error, baseline)] if contract.has_labels else zip(error, baseline, strict=True)
    channels = tuple((float(part.max()), value_span(values)) for part, values in parts)
    change, scores, counts, others = None, dict[str, float](), dict[str, int](), dict[str, int]()
    if contract.has_labels:
        a, b = labels(baseline, contract), labels(candidate, contract)
        change = float(np.count_nonzero((a != b).any(axis=0)) / a[0].size)
        for (key, left), (_, right) in zip(
            class_masks(a, contract, len(baseline)), class_masks(b, contract, len(baseline)), strict=True
        ):
            if left.any() or right.any():
                scores[key] = dice(left, right)
                counts[key], others[key] = int(np.count_nonzero(left)), int(np.count_nonzero(right))
    return ImageParity(
        name, int(baseline[0].size), change, scores, counts, float(error.max()), float(error.mean()),
        _relative(channels), candidate_px=others, channels=channels,
    )  # fmt: skip


def _relative(channels: Iterable[tuple[float, float]]) -> float:
    """The largest of errors over ranges; any error is too large for a range that is empty."""
    return max(error / span if span else float("inf" if error else 0.0) for error, span in channels)


def value_span(values: Array) -> float:
    """The 1st to 99th percentile range of values, finite ones; all of their range where that is empty, as for maps that
    are 0 nearly everywhere. 0 for a constant."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0
    low, high = np.percentile(finite, (1, 99))
    return float(high - low) or float(finite.max()) - float(finite.min())


def class_masks(labels: Array, contract: Contract, channels: int) -> list[tuple[str, Array]]:
    """(class name, boolean mask) of labels as :func:`labels` returns them."""
    if contract.task == "multiclass":
        return [(class_name(contract, k), labels[0] == k) for k in range(channels)]
    offset = max(0, len(contract.classes) - channels)  # ("background", "nucleus") may name a binary network's channel
    if contract.task == "binary" and not contract.classes:
        return [("foreground", labels[0] > 0)]
    return [(class_name(contract, k + offset), labels[k] > 0) for k in range(channels)]


def class_name(contract: Contract, k: int) -> str:
    """Name of class ``k``, its number where it has none."""
    return contract.classes[k] if k < len(contract.classes) else str(k)


def saturated_share(raw: Array, contract: Contract) -> float:
    """Share of samples whose probabilities are 0 or 1 to six digits: next to none away from edges is sure that way."""
    if contract.output_is == "probabilities":
        return float(((raw < 1e-6) | (raw > 1 - 1e-6)).all(axis=0).mean())
    if contract.task == "multiclass":
        top = np.sort(raw, axis=0)[-2:]
        return float((top[1] - top[0] > log(1e6)).mean())
    return float((np.abs(raw) > log(1e6)).all(axis=0).mean())


@dataclass(frozen=True)
class Verdict(Record):
    """Whether all images are inside the budget, and what is outside.

    Attributes:
        accepted: Yes or no.
        reasons: One sentence per bound that is missed (the worst image).
        label_change, dice, relative: The worst image's numbers (``None`` where they do not apply).
        mean_label_change: Over all images.
        error: ``relative`` of the outputs without labels alone; None where all have labels.
    """

    accepted: bool
    reasons: tuple[str, ...]
    label_change: float | None
    dice: float | None
    relative: float
    max_abs: float
    mean_label_change: float | None = None
    error: float | None = None
    images: tuple[ImageParity, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class BatchParity(Record):
    """Agreement of one tile with the baseline when ``batch`` copies of it are run at once.

    Attributes:
        batch: Tiles per run.
        identical: Whether all copies gave the same bits, in every output.
        tile: Agreement of the first copy, in one output.
    """

    batch: int
    identical: bool
    tile: ImageParity

    def to_json(self) -> dict[str, Any]:
        one = self.tile
        change = one.label_change
        return {
            "batch": self.batch,
            "output": one.head,
            "identical_rows": self.identical,
            "labels_changed_per_million": None if change is None else 1e6 * change,
            "dice": dict(one.dice),
            "max_abs": one.max_abs,
            "mean_abs": one.mean_abs,
            "relative": one.relative,
        }


def judge(images: Sequence[ImageParity], budget: Budget) -> Verdict:
    """Holds the worst image (of every output that is judged, where a network has several) against the budget."""
    every = _on_a_range(images)
    images = [i for i in every if i.judged]
    if not images:
        raise ContractError("no image to judge parity on; pass --images or --samples")
    reasons = []
    worst_relative = max(images, key=lambda i: i.relative)
    changes = [i.label_change for i in images if i.label_change is not None]
    worst_dice = None
    broken = next((i for i in images if not np.isfinite(i.max_abs)), None)
    if broken is not None:
        reasons.append(f"{broken.title}: NaN, or infinite values that are not the baseline's")
    values = [i for i in images if i.label_change is None]
    if values:
        worst = max(values, key=lambda i: i.relative)
        if worst.relative > budget.error:
            reasons.append(
                f"{worst.title}: largest error {worst.relative:.2e} of the output's range, budget {budget.error:.2e}"
            )
    if changes:
        worst = max((i for i in images if i.label_change is not None), key=lambda i: i.label_change or 0.0)
        if (worst.label_change or 0.0) > budget.labels:
            reasons.append(f"{worst.title}: {worst.label_change:.3%} of labels change, budget {budget.labels:.3%}")
        scores = _scores(images, budget)
        if scores:
            worst_dice, text = min(scores)
            if worst_dice < budget.dice:
                reasons.append(f"{text}, budget {budget.dice}")
    return Verdict(
        not reasons,
        tuple(reasons),
        max(changes) if changes else None,
        worst_dice,
        worst_relative.relative,
        max(i.max_abs for i in images),
        float(np.mean(changes)) if changes else None,
        max(i.relative for i in values) if values else None,
        tuple(every),
    )


def _scores(images: Sequence[ImageParity], budget: Budget) -> list[tuple[float, str]]:
    """Dice, with a sentence, of classes that are large enough: on an image, or together on those where they are small."""
    scores, small = list[tuple[float, str]](), dict[tuple[str, str], list[ImageParity]]()
    for image in images:
        for key, score in image.dice.items():
            if image.largest_px(key) >= budget.class_px:
                scores.append((score, f"{image.title}: Dice {score:.4f} of class {key}"))
            else:
                small.setdefault((image.head, key), []).append(image)
    for (head, key), found in small.items():
        before = sum(i.class_px[key] for i in found)
        after = sum(i.candidate_px.get(key, 0) for i in found)
        if max(before, after) >= budget.class_px:
            common = sum(i.dice[key] * (i.class_px[key] + i.candidate_px.get(key, 0)) / 2 for i in found)
            score = 2 * common / (before + after)
            where = f"{len(found)} images together" + (f", output {head}" if head else "")
            scores.append((score, f"{where}: Dice {score:.4f} of class {key}"))
    return scores


def _on_a_range(images: Sequence[ImageParity]) -> list[ImageParity]:
    """Where the baseline is constant in a channel of an image, the error is over the widest range that it has elsewhere."""
    widest: dict[tuple[str, int], float] = {}
    for image in images:
        for k, (_, span) in enumerate(image.channels):
            widest[image.head, k] = max(widest.get((image.head, k), 0.0), span)

    def judged(image: ImageParity) -> ImageParity:
        if all(span for _, span in image.channels):
            return image
        return replace(
            image,
            relative=_relative(
                (error, span or widest[image.head, k]) for k, (error, span) in enumerate(image.channels)
            ),
        )

    return [judged(image) for image in images]


def budget_shares(verdict: Verdict, budget: Budget) -> dict[str, float]:
    """Share of the budget that each judged output uses, by name: of labels, Dice and values the most; above 1: missed."""
    found: dict[str, float] = {}
    for head in dict.fromkeys(i.head for i in verdict.images if i.judged):
        images = [i for i in verdict.images if i.judged and i.head == head]
        shares = [budget_share(i, budget) for i in images]
        shares += [_share(1 - score, 1 - budget.dice) for score, _ in _scores(images, budget)]
        found[head] = max(shares)
    return found


def budget_share(image: ImageParity, budget: Budget) -> float:
    """Of the budget that an image uses by its labels, by its values where it has none: what unlike outputs compare by."""
    return _share(image.changed, budget.error if image.label_change is None else budget.labels)


def _share(value: float, allowed: float) -> float:
    """Of what is allowed; finite also where nothing is allowed, or the value is not finite."""
    return min(value / max(allowed, 1e-9), 1e9)
