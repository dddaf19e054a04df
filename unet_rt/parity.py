"""Agreement of two results of the same network: numbers, budgets, verdicts. A judge: it returns, it never prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .contract import Contract
from .errors import ContractError
from .stitch import decide

if TYPE_CHECKING:
    from .engine import EngineSpec

Array = npt.NDArray[Any]


LABEL_CHANGE = 1e-3  # share of labels that may change by default
LABEL_CHANGE_INT8 = 5e-3


@dataclass(frozen=True)
class Budget:
    """What the user allows an engine to differ from its FP32 baseline, judged on the worst image.

    Attributes:
        label_change: Share of pixels whose label changes. None: 5e-3 for INT8, 1e-3 for everything else.
        dice: Lowest Dice of any class against the baseline's mask, classes of at least ``class_px`` pixels there.
        error: For regression: largest error over the 1st to 99th percentile range of the baseline's output.
        seam: Share of labels that a measured halo may change (regression: the same ratio as ``error``).
        class_px: Classes smaller than this in the baseline's mask are not judged by Dice.
    """

    label_change: float | None = None
    dice: float = 0.99
    error: float = 1e-2
    seam: float = 1e-5
    class_px: int = 100

    def __post_init__(self) -> None:
        for name, low, high in (("label_change", 0, 1), ("dice", 0, 1), ("error", 0, float("inf")), ("seam", 0, 1)):
            value = getattr(self, name)
            if value is None and name == "label_change":
                continue
            if not low <= value <= high:
                raise ContractError(f"budget {name}={value} is outside {low} to {high}")

    def of(self, precision: str) -> Budget:
        """The budget with every default of ``precision`` written out."""
        if self.label_change is not None:
            return self
        return replace(self, label_change=LABEL_CHANGE_INT8 if precision == "int8" else LABEL_CHANGE)

    @property
    def labels(self) -> float:
        """``label_change`` with its default."""
        return LABEL_CHANGE if self.label_change is None else self.label_change


@dataclass(frozen=True)
class ImageParity:
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
        relative: ``max_abs`` over the 1st to 99th percentile range of the baseline's values, over all of their range
            where these percentiles are one value (a map that is 0 nearly everywhere).
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

    @property
    def changed(self) -> float:
        """What an image is judged by first: labels changed, or the error where there are none."""
        return self.relative if self.label_change is None else self.label_change

    @property
    def title(self) -> str:
        """Image and output, for messages."""
        return f"{self.name}, output {self.head}" if self.head else self.name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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


def compare_outputs(
    baseline: Sequence[Array], candidate: Sequence[Array], spec: EngineSpec, name: str
) -> list[ImageParity]:
    """Compares every output (K, *spatial) of one image, each by what the contract says that it means."""
    several, found = len(spec.outputs) > 1, list[ImageParity]()
    for k, (a, b) in enumerate(zip(baseline, candidate, strict=True)):
        contract = spec.contract_of(k)
        one = compare(a, b, contract, name)
        judged = k == 0 or contract.task is not None
        found.append(replace(one, head=spec.outputs[k].name if several else "", judged=judged))
    return found


def compare(baseline: Array, candidate: Array, contract: Contract, name: str = "") -> ImageParity:
    """Compares the network's own values (K, *spatial) of one image."""
    if baseline.shape != candidate.shape:
        raise ContractError(f"{name}: results of shapes {baseline.shape} and {candidate.shape} cannot be compared")
    with np.errstate(invalid="ignore"):  # infinity minus infinity: equal infinities differ by nothing
        error = np.abs(candidate.astype(np.float64) - baseline)
    error[candidate == baseline] = 0.0
    error[np.isnan(error)] = np.inf  # a NaN compares with nothing and would pass every bound
    finite = baseline[np.isfinite(baseline)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 0.0)
    if finite.size and low == high:
        low, high = float(finite.min()), float(finite.max())
    relative = float(error.max() / (high - low)) if high > low else float("inf" if error.max() else 0.0)
    change, scores, counts = None, dict[str, float](), dict[str, int]()
    if contract.has_labels:
        a, b = labels(baseline, contract), labels(candidate, contract)
        change = float(np.count_nonzero((a != b).any(axis=0)) / a[0].size)
        for (key, left), (_, right) in zip(
            class_masks(a, contract, len(baseline)), class_masks(b, contract, len(baseline)), strict=True
        ):
            if left.any() or right.any():
                scores[key], counts[key] = dice(left, right), int(np.count_nonzero(left))
    return ImageParity(
        name, int(baseline[0].size), change, scores, counts, float(error.max()), float(error.mean()), relative
    )


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


def saturated(raw: Array, contract: Contract) -> float:
    """Share of samples whose probabilities are 0 or 1 to six digits: next to none away from edges is sure that way."""
    if contract.output_is == "probabilities":
        return float(((raw < 1e-6) | (raw > 1 - 1e-6)).all(axis=0).mean())
    if contract.task == "multiclass":
        top = np.sort(raw, axis=0)[-2:]
        return float((top[1] - top[0] > log(1e6)).mean())
    return float((np.abs(raw) > log(1e6)).all(axis=0).mean())


@dataclass(frozen=True)
class Verdict:
    """Whether all images are inside the budget, and what is outside.

    Attributes:
        accepted: Yes or no.
        reasons: One sentence per bound that is missed (the worst image).
        label_change, dice, relative: The worst image's numbers (``None`` where they do not apply).
        mean_label_change: Over all images.
    """

    accepted: bool
    reasons: tuple[str, ...]
    label_change: float | None
    dice: float | None
    relative: float
    max_abs: float
    mean_label_change: float | None = None
    images: tuple[ImageParity, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        data = {key: value for key, value in asdict(self).items() if key != "images"}
        return {**data, "reasons": list(self.reasons), "images": [image.to_json() for image in self.images]}


@dataclass(frozen=True)
class BatchParity:
    """Agreement of one tile with the baseline when ``batch`` copies of it are run at once.

    Attributes:
        batch: Tiles per run.
        identical: Whether all copies gave the same bits.
        tile: Agreement of the first.
    """

    batch: int
    identical: bool
    tile: ImageParity

    def to_json(self) -> dict[str, Any]:
        one = self.tile
        change = one.label_change
        return {
            "batch": self.batch,
            "identical_rows": self.identical,
            "labels_changed_per_million": None if change is None else 1e6 * change,
            "dice": dict(one.dice),
            "max_abs": one.max_abs,
            "mean_abs": one.mean_abs,
            "relative": one.relative,
        }


def judge(images: Sequence[ImageParity], budget: Budget) -> Verdict:
    """Holds the worst image (of every output that is judged, where a network has several) against the budget."""
    every, images = images, [i for i in images if i.judged]
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
        judged = [
            (score, key, image)
            for image in images
            for key, score in image.dice.items()
            if image.class_px[key] >= budget.class_px
        ]
        if judged:
            worst_dice, key, image = min(judged, key=lambda entry: entry[0])
            if worst_dice < budget.dice:
                reasons.append(f"{image.title}: Dice {worst_dice:.4f} of class {key}, budget {budget.dice}")
    return Verdict(
        not reasons,
        tuple(reasons),
        max(changes) if changes else None,
        worst_dice,
        worst_relative.relative,
        max(i.max_abs for i in images),
        float(np.mean(changes)) if changes else None,
        tuple(every),
    )


def constant_reason(array: Array) -> str | None:
    """Why an array of pixels proves nothing about a trained network, or None where it may.

    Constants (zeros among them) and white noise, told by neighbours that have nothing to do with each other, exercise
    none of what a network was trained on. One plane with more than that is enough: stacks begin and end out of focus.
    """
    if array.size == 0:
        return "it is empty"
    low, high = float(array.min()), float(array.max())
    if low == high:
        return f"every pixel is {low:g}"
    if min(array.shape[-2:]) < 8:
        return None
    noise = None
    for plane in array.reshape(-1, *array.shape[-2:]):
        centred = plane - plane.mean(dtype=np.float64)
        power = float((centred**2).mean())
        if power == 0.0:
            continue
        along = float((centred[:, 1:] * centred[:, :-1]).mean()) / power
        down = float((centred[1:] * centred[:-1]).mean()) / power
        # the correlation of n independent pairs is 0 +- 1/sqrt(n); five of these deviations
        bound = 5 / np.sqrt(plane.size)
        if not (abs(along) < bound and abs(down) < bound):
            return None
        noise = noise or f"it is noise (neighbouring pixels correlate by {along:.3f} and {down:.3f})"
    return noise
