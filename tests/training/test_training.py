"""Weight maps against their slow twin, tiles, the loss, and that training learns, repeats itself and stops in time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="training needs torch; pip install unet-rt[train]")

import unet_rt
from unet_rt.contract.contract import (
    Contract,
    Normalization,
)
from unet_rt.drawing.microscopy import microscopy
from unet_rt.drawing.scene import Scene
from unet_rt.errors import ImageError
from unet_rt.models.checkpoint import TrainingError, load_checkpoint, save_checkpoint
from unet_rt.models.stored import load_half
from unet_rt.models.unet import UNet, UNetSpec
from unet_rt.training.augment import Augmentation, Tiles
from unet_rt.training.evaluate import evaluate, predict_whole
from unet_rt.training.metrics import iou
from unet_rt.training.samples import Sample, normalized, prepare, split_by_blocks
from unet_rt.training.trainer import Recipe, train, weighted_cross_entropy
from unet_rt.training.weights import border_weights, class_weights, separate

pytestmark = pytest.mark.torch

PERCENTILE = Normalization("percentile", scope="image")
DATA = Path(unet_rt.__file__).parent / "data"
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    scene = Scene(radius_px=9, cover=0.3)
    # One block of 512 px for four of them, another for the fifth, which validates.
    drawn = [microscopy((320, 320), seed=0, scene=scene), microscopy((160, 160), seed=4, scene=scene)]
    parts = [(drawn[0], y, x) for y in (0, 160) for x in (0, 160)] + [(drawn[1], 0, 0)]
    windows = [(m, (slice(y, y + 160), slice(x, x + 160))) for m, y, x in parts]
    return [prepare(f"drawn {k}", m.image[w], m.truth[w], PERCENTILE) for k, (m, w) in enumerate(windows)]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------ weights


def slow_border_weights(labels: Any, w0: float, sigma: float) -> Any:
    """The paper's formula, one distance transform per object."""
    from scipy.ndimage import distance_transform_edt

    ids = np.unique(labels[labels > 0])
    if len(ids) < 2:
        return np.zeros(labels.shape)
    near = np.sort([distance_transform_edt(labels != k) for k in ids], axis=0)[:2]
    weights = w0 * np.exp(-((near[0] + near[1]) ** 2) / (2 * sigma**2))
    weights[labels > 0] = 0
    return weights


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 1000), st.integers(1, 40), st.integers(1, 40), st.integers(0, 6), st.sampled_from([1.0, 2.5, 5.0])
)
def test_border_weights_equal_the_formula(seed: int, height: int, width: int, objects: int, sigma: float) -> None:
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.int32)
    for k in range(objects):
        y, x = rng.integers(height), rng.integers(width)
        labels[y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = 7 * k + 1
    # Cut off where d1 + d2 exceeds 5 sigma: 10 e^-12.5.
    np.testing.assert_allclose(
        border_weights(labels, sigma_px=sigma), slow_border_weights(labels, 10, sigma), atol=4e-5
    )


def test_border_weights_of_real_crowding() -> None:
    m = microscopy((256, 256), seed=4, scene=Scene(radius_px=10, cover=0.4))
    labels = m.truth * separate(m.truth)
    weights = border_weights(labels)
    np.testing.assert_allclose(weights, slow_border_weights(labels, 10, 5), atol=4e-5)
    assert weights.max() > 8  # between two nuclei one pixel apart: 10 exp(-(1 + 1)^2 / 50) = 9.2


def test_touching_objects_are_separated_and_single_ones_left_alone() -> None:
    labels = np.zeros((8, 9), np.int32)
    labels[1:7, 1:4], labels[1:7, 4:8] = 3, 5
    apart = separate(labels)
    from scipy.ndimage import label

    assert label(apart, np.ones((3, 3)))[1] == 2
    assert not apart[labels == 0].any()
    assert 6 <= ((labels > 0) & ~apart).sum() <= 12  # a line of one or two pixels
    np.testing.assert_array_equal(separate((labels == 3) * 3), labels == 3)


def test_diagonal_contact_is_contact() -> None:
    labels = np.array([[1, 0], [0, 2]], np.int32)
    assert separate(labels).sum() == 1
    assert separate(labels[:, ::-1]).sum() == 1


def test_class_weights_balance() -> None:
    target = np.zeros((10, 10), np.uint8)
    target[:2] = 1
    even = class_weights([target], 2)
    assert even[0] * 80 == pytest.approx(even[1] * 20)
    np.testing.assert_allclose(class_weights([target], 2, balance=0), 1)
    with pytest.raises(ValueError, match=r"no pixel of class \[2\]"):
        class_weights([target], 3)


# -------------------------------------------------------------------------------------------------------------- tiles


def test_normalisation_is_numpy_s(samples: list[Sample]) -> None:
    image = microscopy((160, 160), seed=4, scene=Scene(radius_px=9, cover=0.3)).image[None]
    low, high = np.percentile(image, [1.0, 99.8])
    expected = (image - low) / (high - low + 1e-6)
    np.testing.assert_allclose(normalized(image, PERCENTILE), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(samples[4].image, normalized(image, PERCENTILE))


@pytest.mark.parametrize("margin", [0, 94])
def test_tiles_without_augmentation_are_windows_of_the_mirrored_image(samples: list[Sample], margin: int) -> None:
    out = 68
    tiles = Tiles(samples[:1], out + 2 * margin, out, Augmentation.none(), seed=0)
    images, targets, weights = (t.numpy() for t in tiles.draw(3, step=1))
    mirrored = np.pad(samples[0].image[0], margin, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(mirrored, (out + 2 * margin,) * 2)
    for image, target, weight in zip(images, targets, weights, strict=True):
        found = np.argwhere((windows[:, :, 0, 0] == image[0, 0, 0]) & (windows[:, :, -1, -1] == image[0, -1, -1]))
        places = [(y, x) for y, x in found if np.array_equal(windows[y, x], image[0])]
        assert len(places) >= 1
        fits = [np.array_equal(samples[0].target[y : y + out, x : x + out], target) for y, x in places]
        assert any(fits)
        y, x = places[fits.index(True)]
        np.testing.assert_array_equal(samples[0].weight[y : y + out, x : x + out], weight)


@pytest.mark.parametrize("how", [Augmentation(), Augmentation(turn="quarter", scale=0, elastic_px=0)], ids=str)
def test_augmentation_moves_image_and_target_alike(samples: list[Sample], how: Augmentation) -> None:
    """The brightness gap between foreground and background survives every turn and deformation."""
    images, targets, weights = (t.numpy() for t in Tiles(samples, 96, 96, how, seed=1).draw(24, step=1))
    gaps = [i[0][t > 0].mean() - i[0][t == 0].mean() for i, t in zip(images, targets, strict=True) if t.any()]
    assert min(gaps) > 0.15
    assert len({i.tobytes() for i in images}) == 24
    # Weights lie where they were drawn: on background alone.
    assert not weights[targets > 0].any()
    assert weights.max() > 1


def ramps(size: int) -> Sample:
    """An image that says where its pixels come from: column in one channel, row in the other."""
    y, x = np.indices((size, size), np.float32)
    flat = np.zeros((size, size), np.uint8)
    return Sample("ramps", np.stack([y, x]), flat, flat.astype(np.float32), flat)


def test_the_deformation_is_the_paper_s() -> None:
    """Displacements on a coarse 3 x 3 grid, deviation 10 px, interpolated bicubically: smooth, and exact at its nodes."""
    how = replace(Augmentation.none(), elastic_px=10.0)
    size, tile = 600, 257
    images = Tiles([ramps(size)], tile, tile, how, seed=3).draw(40, step=5)[0].numpy()
    grid = np.stack(np.indices((tile, tile), np.float32))
    moved = images - grid
    moved -= np.rint(moved[:, :, ::128, ::128].mean((2, 3), keepdims=True))  # where the window lies: whole pixels
    inner = [m for m, i in zip(moved, images, strict=True) if i.min() > 1 and i.max() < size - 2]  # nothing mirrored
    assert len(inner) > 20
    nodes = np.array([m[:, ::128, ::128] for m in inner])
    assert 8.5 < nodes.std() < 11.5  # 360 samples: 10 +- 4 %, less the share of the mean
    steepest = max(np.abs(np.diff(m, axis=k)).max() for m in inner for k in (1, 2))
    assert steepest < 0.6  # below 1: no fold
    # Between its nodes it is torch's bicubic interpolation of them; reading pixels is off by up to 0.1 px itself, since
    # the kernel (a = -0.75) does not reproduce ramps.
    from torch.nn import functional

    exact = functional.interpolate(
        torch.from_numpy(nodes), size=(tile, tile), mode="bicubic", align_corners=True
    ).numpy()
    np.testing.assert_allclose(np.array(inner), exact, atol=0.25)


def test_a_turn_keeps_distances(samples: list[Sample]) -> None:
    """Rotation and shift alone: rows and columns of the tile are steps of one pixel, at right angles."""
    how = replace(Augmentation.none(), turn="any", flip=True)
    images = Tiles([ramps(500)], 65, 65, how, seed=0).draw(12, step=2)[0].numpy()
    images = images[(images.min((1, 2, 3)) > 1) & (images.max((1, 2, 3)) < 498)]  # nothing mirrored
    assert len(images) > 5
    determinants = set()
    for image in images:
        down, right = (image[:, 64, 32] - image[:, 0, 32]) / 64, (image[:, 32, 64] - image[:, 32, 0]) / 64
        assert np.hypot(*down) == pytest.approx(1, abs=4e-3)  # 0.1 px on either end
        assert np.hypot(*right) == pytest.approx(1, abs=4e-3)
        assert down @ right == pytest.approx(0, abs=4e-3)
        determinants.add(round(float(down[0] * right[1] - down[1] * right[0])))
    assert determinants == {1, -1}  # flipped and not


def test_grey_values_vary(samples: list[Sample]) -> None:
    how = replace(Augmentation.none(), gain=0.3, gamma=0.3, offset=0.1, noise=0.05)
    drawn = Tiles(samples[:1], 160, 160, how, seed=0).draw(6, step=1)[0].numpy()
    still = samples[0].image
    assert len({d.tobytes() for d in drawn}) == 6
    for image in drawn:
        correlation = np.corrcoef(image.ravel(), still.ravel())[0, 1]
        assert 0.9 < correlation < 0.99999


def test_a_tile_depends_on_seed_and_step_alone(samples: list[Sample]) -> None:
    draw = [
        Tiles(samples, 64, 64, Augmentation(), seed).draw(2, step) for seed, step in ((1, 5), (1, 5), (1, 6), (2, 5))
    ]
    assert all(torch.equal(a, b) for a, b in zip(draw[0], draw[1], strict=True))
    assert not torch.equal(draw[0][0], draw[2][0])
    assert not torch.equal(draw[0][0], draw[3][0])


@pytest.mark.parametrize("how", [Augmentation.none(), Augmentation()], ids=["plain", "augmented"])
def test_an_image_smaller_than_the_tile_is_mirrored(samples: list[Sample], how: Augmentation) -> None:
    small = replace(
        samples[0],
        image=samples[0].image[:, :40, :50],
        target=samples[0].target[:40, :50],
        weight=samples[0].weight[:40, :50],
    )
    images, targets, _ = Tiles([small], 140, 96, how, seed=1).draw(2, step=1)
    assert images.shape == (2, 1, 140, 140)
    assert targets.shape == (2, 96, 96)
    assert 0 < targets.float().mean() < 1


def test_validation_is_a_block(samples: list[Sample]) -> None:
    training, validation = split_by_blocks(samples, 0.2)
    assert [s.name for s in validation] == ["drawn 4"]
    assert len(training) == 4
    training, validation = split_by_blocks(samples[:1], 0.25)
    assert training[0].target.shape == (120, 160)
    assert validation[0].target.shape == (40, 160)
    np.testing.assert_array_equal(np.vstack([training[0].target, validation[0].target]), samples[0].target)
    with pytest.raises(ImageError, match="no images"):
        split_by_blocks([])


@pytest.mark.parametrize(("empty", "held"), [([3, 4], "drawn 2"), ([4], "drawn 3"), ([0, 1, 2, 3], "drawn 4")])
def test_validation_holds_every_class(samples: list[Sample], empty: list[int], held: str) -> None:
    """Where one image alone holds foreground no split serves, and the last one stands."""
    some = [replace(s, target=s.target * (k not in empty)) for k, s in enumerate(samples[:5])]
    training, validation = split_by_blocks(some, 0.2)
    assert len(training) == 4
    assert [s.name for s in validation] == [held]


def test_rows_that_validate_hold_every_class(samples: list[Sample]) -> None:
    target = samples[0].target.copy()
    target[100:] = 0
    training, validation = split_by_blocks([replace(samples[0], target=target)], 0.25)
    assert validation[0].name.endswith("(top)")
    np.testing.assert_array_equal(np.vstack([validation[0].target, training[0].target]), target)


def test_images_and_masks_that_do_not_match_are_refused() -> None:
    with pytest.raises(ImageError, match=r"a\.png: image \(4, 5\) and mask \(5, 4\)"):
        prepare("a.png", np.zeros((4, 5), np.uint8), np.zeros((5, 4), np.int32), PERCENTILE)
    with pytest.raises(ImageError):
        prepare("a.png", np.full((4, 5), np.nan, np.float32), np.zeros((4, 5), np.int32), PERCENTILE)


# ----------------------------------------------------------------------------------------------------------- training


def test_the_loss_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.standard_normal((2, 3, 4, 5)), rng.integers(0, 3, (2, 4, 5))
    weight = rng.random((2, 4, 5)) + 0.1
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.take_along_axis(p, target[:, None], 1)[:, 0]
    got = weighted_cross_entropy(*(torch.from_numpy(a) for a in (logits, target, weight)))
    assert got.item() == pytest.approx(-(weight * np.log(chosen)).sum() / weight.sum(), rel=1e-12)


def small_network(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(UNetSpec(width=6, depth=2, padding="same", norm="batch", up="bilinear", dropout=0.0))


SHORT = Recipe(steps=70, tile_px=64, batch=4, learning_rate=1e-2, validate_every=35, balance=0.5)


def test_training_learns(samples: list[Sample]) -> None:
    network = small_network()
    before = np.mean(evaluate(network, samples[4:]))
    history = train(network, samples[:4], samples[4:], SHORT)
    after = evaluate(network, samples[4:])[0]
    assert after == max(p.iou for p in history)  # the best weights are kept
    assert after > max(0.7, before + 0.1)
    assert not network.training


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_repeats_itself(samples: list[Sample], optimizer: Any) -> None:
    recipe = replace(SHORT, steps=4, validate_every=2, optimizer=optimizer, learning_rate=1e-3)
    states = []
    for _ in range(2):
        network = small_network()
        train(network, samples[:2], samples[4:], recipe)
        states.append(network.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_valid_network_trains_with_mirrored_borders(samples: list[Sample]) -> None:
    torch.manual_seed(0)
    network = UNet(UNetSpec(width=4, depth=2))
    history = train(network, samples[:2], samples[4:], replace(SHORT, steps=2, tile_px=108, batch=1))
    assert len(history) == 1
    assert predict_whole(network, samples[4].image).shape == (2, 160, 160)


def test_networks_for_volumes_are_refused(samples: list[Sample]) -> None:
    network = UNet(UNetSpec(width=2, depth=1, dims=3, padding="same"))
    with pytest.raises(TrainingError, match="3 spatial axes, and tiles are cut from images of 2"):
        train(network, samples[:1], samples[:1], Recipe(steps=1))


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_best(samples: list[Sample]) -> None:
    torch.manual_seed(0)
    network = UNet(UNetSpec(width=4, depth=2, padding="same"))
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        train(network, samples[:2], samples[4:], replace(SHORT, optimizer="sgd", learning_rate=1e25))
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_a_whole_image_is_predicted_as_its_parts_are(samples: list[Sample]) -> None:
    """The valid network's samples do not depend on the window they are computed in."""
    torch.manual_seed(0)
    network = UNet(UNetSpec(width=3, depth=2)).eval()
    image = samples[0].image
    whole = predict_whole(network, image)
    spec = network.spec
    size = spec.size_at_least(60)
    lost = (size - spec.out_size(size)) // 2
    with torch.no_grad():
        part = network(torch.from_numpy(image[None, :, 40 : 40 + size, 20 : 20 + size]))[0].numpy()
    # The mirrored margin is `lost` too, so that sample y of the whole is pixel y; phases agree modulo 4.
    n = part.shape[1]
    np.testing.assert_allclose(whole[:, 40 + lost : 40 + lost + n, 20 + lost : 20 + lost + n], part, atol=1e-5)


def test_checkpoints_carry_architecture_and_contract(tmp_path: Path) -> None:
    network = small_network().eval()
    contract = Contract(axes="NCYX", normalization=PERCENTILE, classes=("a", "b"))
    save_checkpoint(tmp_path / "model.pt", network, contract, {"seed": 1})
    back, its_contract, record = load_checkpoint(tmp_path / "model.pt")
    assert back.spec == network.spec
    assert its_contract == contract
    assert record == {"seed": 1}
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(back(x), network(x))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    save_checkpoint(tmp_path / "again.pt", network, contract, {"seed": 1})
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "model.pt").read_bytes()


def test_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(TrainingError, match="not a checkpoint of unet-rt"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save({"format": 99, "architecture": {}}, tmp_path / "newer.pt")
    with pytest.raises(TrainingError, match=r"format 99.*update unet-rt"):
        load_checkpoint(tmp_path / "newer.pt")


def test_iou() -> None:
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert iou(a, b) == pytest.approx(1 / 3)
    assert iou(a & False, b & False) == 1


# --------------------------------------------------------------------------------------------------- what is shipped


def test_the_small_valid_network_is_what_its_record_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from ship_nuclei import NETWORKS, TEST_SEEDS, drawn

    network = load_half(DATA / "paper_w8.npz")
    record = json.loads((DATA / "paper_w8.json").read_text())
    assert network.spec.to_json() == record["architecture"]
    some = drawn(TEST_SEEDS[:2], NETWORKS["paper_w8"].recipe)
    claimed = record["figures"]["test_drawn"]["iou_annotated_each"]
    for sample, value in zip(some, evaluate(network, some, against="truth"), strict=True):
        assert value == pytest.approx(claimed[sample.name], abs=2e-3)  # rounding on another machine flips few pixels


def test_the_shipped_network_is_what_its_record_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    ort = pytest.importorskip("onnxruntime", reason="runs the shipped graph; pip install unet-rt[cpu]")
    from ship_nuclei import NETWORKS, TEST_SEEDS, drawn

    record = json.loads((DATA / "nuclei.json").read_text())
    session = ort.InferenceSession(str(DATA / "nuclei.onnx"), providers=["CPUExecutionProvider"])
    some = drawn(TEST_SEEDS[:3], NETWORKS["nuclei"].recipe)
    claimed = record["figures"]["test_drawn"]["iou_annotated_each"]
    for sample in some:
        (logits,) = session.run(None, {session.get_inputs()[0].name: sample.image[None]})
        assert iou(logits[0].argmax(0) > 0, sample.truth) == pytest.approx(claimed[sample.name], abs=2e-3)
