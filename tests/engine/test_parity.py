"""The judge: worst image, every class, and what proves nothing."""

from __future__ import annotations

import numpy as np
import pytest

from unet_rt.baseline.samples import constant_reason
from unet_rt.contract.contract import Contract
from unet_rt.drawing.microscopy import microscopy
from unet_rt.engine.budget import Budget
from unet_rt.engine.parity import ImageParity, budget_shares, compare, dice, judge, labels, saturated_share
from unet_rt.errors import ContractError

MULTI = Contract(task="multiclass", output_is="logits", classes=("background", "cell", "debris"))


def logits(mask: np.ndarray, classes: int = 3) -> np.ndarray:
    return np.stack([(mask == k) * 4.0 - 2.0 for k in range(classes)]).astype(np.float32)


def test_equal_results_are_inside_any_budget():
    raw = logits(np.random.default_rng(0).integers(0, 3, (40, 50)))
    found = compare(raw, raw.copy(), MULTI)
    assert (found.label_change, found.max_abs, set(found.dice.values())) == (0.0, 0.0, {1.0})
    assert judge([found], Budget(label_change=0, dice=1, error=0)).accepted


def test_the_worst_image_decides_not_the_mean():
    good = logits(np.zeros((100, 100), int))
    bad = good.copy()
    bad[:, :2, :10] = logits(np.ones((2, 10), int))  # 20 of 10,000 labels
    images = [compare(good, good, MULTI, f"good {k}") for k in range(9)] + [compare(good, bad, MULTI, "bad")]
    verdict = judge(images, Budget(label_change=1e-3))
    assert verdict.mean_label_change == pytest.approx(2e-4)
    assert verdict.label_change == pytest.approx(2e-3)
    assert not verdict.accepted
    assert verdict.reasons[0].startswith("bad: 0.200% of labels change")


def test_a_rare_class_cannot_hide():
    mask = np.zeros((1000, 1000), int)
    mask[:12, :10] = 2  # 120 px of 1,000,000
    lost = mask.copy()
    lost[:6, :10] = 0
    found = compare(logits(mask), logits(lost), MULTI)
    assert found.label_change == pytest.approx(6e-5)
    verdict = judge([found], Budget(label_change=1e-3))
    assert not verdict.accepted
    assert "class debris" in verdict.reasons[0]
    assert found.dice["debris"] == pytest.approx(2 * 60 / 180)
    assert judge([found], Budget(label_change=1e-3, class_px=121)).accepted


def test_a_class_that_is_made_up_is_judged_too():
    """One that the baseline's mask does not hold, or too little of: its labels alone may be inside the budget."""
    mask = np.zeros((1000, 1000), int)
    made_up = mask.copy()
    made_up[:40, :100] = 2  # 0.4 %
    found = compare(logits(mask), logits(made_up), MULTI, "whole")
    assert (found.class_px["debris"], found.candidate_px["debris"]) == (0, 4000)
    verdict = judge([found], Budget(label_change=5e-3))
    assert verdict.reasons == ("whole: Dice 0.0000 of class debris, budget 0.99",)
    assert judge([found], Budget(label_change=5e-3, class_px=4001)).accepted


def test_a_class_that_is_small_on_every_image_is_judged_on_all():
    """Twenty images with 40 px each, and half of them lost: no image shows it, all together do."""
    mask = np.zeros((200, 200), int)
    mask[:4, :10] = 2
    lost = mask.copy()
    lost[:2] = 0
    images = [compare(logits(mask), logits(m), MULTI, f"{k}") for k, m in enumerate([mask, lost] * 10)]
    assert images[1].label_change == pytest.approx(5e-4)
    verdict = judge(images, Budget(label_change=1e-3))
    both, all_px = 10 * 40 + 10 * 20, 20 * 40 + 10 * 40 + 10 * 20
    assert verdict.dice == pytest.approx(2 * both / all_px)
    (reason,) = verdict.reasons
    assert reason == f"20 images together: Dice {verdict.dice:.4f} of class debris, budget 0.99"
    assert judge(images[:2], Budget(label_change=1e-3)).accepted, "80 px are nothing to judge"
    assert judge(images, Budget(label_change=1e-3, class_px=801)).accepted
    large = np.zeros((200, 200), int)
    large[:50] = 2
    images.append(compare(logits(large), logits(large), MULTI, "large"))
    assert judge(images, Budget(label_change=1e-3)).reasons == (reason,), "an image full of it excuses nothing"


def test_binary_and_multilabel_labels():
    raw = np.array([[[-1.0, 0.5]], [[2.0, -3.0]]], np.float32)
    assert labels(raw, Contract(task="multilabel", output_is="logits")).tolist() == [[[0, 1]], [[1, 0]]]
    high = Contract(task="binary", output_is="probabilities", threshold=(0.6,))
    assert labels(np.array([[[0.5, 0.7]]], np.float32), high).tolist() == [[[0, 1]]]


def test_regression_is_judged_over_the_outputs_range():
    rng = np.random.default_rng(3)
    base = rng.normal(10, 2, (1, 64, 64)).astype(np.float32)
    off = base.copy()
    off[0, 5, 5] += 0.5
    found = compare(base, off, Contract(task="regression"))
    low, high = np.percentile(base, (1, 99))
    assert found.label_change is None
    assert found.relative == pytest.approx(0.5 / (high - low), rel=1e-5)
    assert not judge([found], Budget(error=1e-2)).accepted
    assert judge([found], Budget(error=0.2)).accepted


def test_values_that_are_nearly_all_the_same():
    """A map of few peaks has no range between its percentiles, and an empty one has none at all."""
    contract = Contract(task="regression")
    peaks = np.zeros((1, 100, 100), np.float32)
    peaks[0, 10:90:20, 10:90:20] = 8
    off = peaks + np.float32(0.04)
    assert compare(peaks, off, contract).relative == pytest.approx(0.04 / 8)
    empty, noise = np.zeros_like(peaks), np.full_like(peaks, 0.04)
    alone = compare(empty, noise, contract, "empty")
    assert (alone.relative, [span for _, span in alone.channels]) == (float("inf"), [0.0])
    assert not judge([alone], Budget()).accepted, "there is nothing that the error is small against"
    assert judge([compare(empty, empty, contract)], Budget(error=0)).accepted
    verdict = judge([alone, compare(peaks, off, contract)], Budget(error=6e-3))
    assert verdict.accepted
    assert verdict.error == pytest.approx(0.04 / 8)
    assert not judge([alone, compare(peaks, off, contract)], Budget(error=4e-3)).accepted
    broken = compare(empty, np.full_like(empty, np.nan), contract)
    assert not judge([broken, compare(peaks, peaks, contract)], Budget()).accepted


def test_a_channel_of_small_values_cannot_hide():
    """A distance in pixels beside a probability: the second may be all wrong and change next to nothing of the first."""
    contract = Contract(task="regression")
    rng = np.random.default_rng(3)
    base = np.stack([rng.uniform(0, 100, (64, 64)), rng.uniform(0, 1, (64, 64))]).astype(np.float32)
    lost = base * np.float32([[[1]], [[0]]])
    found = compare(base, lost, contract, "a")
    assert found.relative == pytest.approx(base[1].max() / np.ptp(np.percentile(base[1], (1, 99))))
    assert not judge([found], Budget(error=0.5)).accepted
    empty = base * np.float32([[[1]], [[0]]])  # an image without any of it: its error counts over the range elsewhere
    spoilt = empty + np.float32([[[0]], [[0.05]]])
    verdict = judge([compare(base, base, contract), compare(empty, spoilt, contract, "b")], Budget(error=0.06))
    assert verdict.accepted
    assert verdict.error == pytest.approx(0.05 / np.ptp(np.percentile(base[1], (1, 99))))


def test_how_much_of_the_budget_is_used():
    """Per output that is judged, whatever it is judged by; finite where nothing is allowed."""
    images = [
        ImageParity("a", 100, 5e-4, {"x": 0.98, "y": 0.0}, {"x": 200, "y": 20}, 0.1, 0.1, 0.1, "mask"),
        ImageParity("a", 100, None, {}, {}, 0.1, 0.1, 0.02, "distance"),
        ImageParity("a", 100, None, {}, {}, 9.0, 9.0, 9.0, "unknown", judged=False),
    ]
    verdict = judge(images, Budget())
    assert budget_shares(verdict, Budget()) == pytest.approx({"mask": 2.0, "distance": 2.0})
    assert budget_shares(verdict, Budget(dice=0.9)) == pytest.approx({"mask": 0.5, "distance": 2.0})
    assert all(
        1 < share < float("inf") for share in budget_shares(verdict, Budget(label_change=0, dice=1, error=0)).values()
    )


def test_dice_of_empty_masks_is_one():
    empty = np.zeros((4, 4), bool)
    assert dice(empty, empty) == 1.0
    assert dice(empty, ~empty) == 0.0


@pytest.mark.parametrize(
    "values",
    [
        {"label_change": -1},
        {"label_change": float("nan")},
        {"dice": 1.5},
        {"error": -0.1},
        {"seam": 2},
        {"truth": 1.1},
        {"class_px": -5},
    ],
)
def test_budgets_that_cannot_be(values):
    with pytest.raises(ContractError, match=r"budget .* is outside 0 to .*; pass e\.g\. "):
        Budget(**values)


def test_nothing_to_judge():
    with pytest.raises(ContractError, match="no image"):
        judge([], Budget())


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((1, 64, 64)), "every pixel is 0"),
        (np.full((1, 64, 64), 7.0), "every pixel is 7"),
        (np.random.default_rng(0).normal(size=(1, 128, 128)), "noise"),
        (np.random.default_rng(1).integers(0, 65535, (3, 64, 200)), "noise"),
        (np.zeros((1, 0, 5)), "empty"),
    ],
)
def test_what_proves_nothing(pixels, reason):
    assert reason in str(constant_reason(pixels))


def test_a_stack_that_begins_in_noise_proves_something():
    stack = np.random.default_rng(3).integers(90, 110, (1, 6, 200, 200)).astype(np.uint16)
    assert "noise" in str(constant_reason(stack))
    stack[0, 2:4] = microscopy((200, 200), seed=3).image
    assert constant_reason(stack) is None


@pytest.mark.parametrize("seed", range(5))
def test_microscopy_proves_something(seed):
    assert constant_reason(microscopy((200, 200), seed=seed).image[None]) is None


def test_nan_is_outside_every_budget():
    value = np.random.default_rng(0).normal(size=(1, 40, 50)).astype(np.float32)
    regression = Contract(task="regression", output_is="values")
    binary = Contract(task="binary", output_is="logits", threshold=(0.5,))
    broken = value.copy()
    broken[0, 3, 4] = np.nan  # in a mask it reads as background, and no bound is above it
    quiet = np.full_like(value, -5.0)
    gone = np.where(np.isnan(broken), broken, quiet)
    loose = Budget(label_change=1, dice=0, error=1e9)
    for found in (compare(value, broken, regression, "a"), compare(quiet, gone, binary, "a")):
        verdict = judge([found], loose)
        assert not verdict.accepted
        assert "NaN" in verdict.reasons[0]


def test_a_map_that_is_zero_nearly_everywhere_has_a_range():
    """Distances inside of few objects: both percentiles are 0, and rounding is no infinite error."""
    distance = np.zeros((1, 100, 100), np.float32)
    distance[0, 40:48, 40:48] = np.linspace(1, 5, 64).reshape(8, 8)
    regression = Contract(task="regression", output_is="values")
    rounded = np.nextafter(distance, np.float32(9))
    assert judge([compare(distance, rounded, regression)], Budget()).accepted
    found = compare(distance, distance * 1.1, regression)
    assert found.relative == pytest.approx(0.1, rel=1e-5)  # 0.5 of a range of 5
    assert not judge([found], Budget()).accepted


def test_equal_infinities_agree():
    raw = logits(np.zeros((20, 30), int))
    raw[1:] = -np.inf  # the logarithm of a probability that is 0
    assert judge([compare(raw, raw.copy(), MULTI)], Budget()).accepted


@pytest.mark.parametrize(
    ("task", "output_is", "sure", "unsure"),
    [
        ("binary", "probabilities", 1e-7, 0.01),
        ("binary", "logits", 20.0, 5.0),
        ("multilabel", "logits", -20.0, 5.0),
        ("multiclass", "logits", 20.0, 5.0),
    ],
)
def test_saturated_outputs_are_told(task, output_is, sure, unsure):
    contract = Contract(task=task, output_is=output_is)
    raw = np.zeros((2 if task in ("multiclass", "multilabel") else 1, 10, 10), np.float32)
    raw[0] = sure
    raw[-1] = sure if task != "multiclass" else 0.0
    assert saturated_share(raw, contract) == 1.0
    raw[0, :5] = unsure
    assert saturated_share(raw, contract) == pytest.approx(0.5)
