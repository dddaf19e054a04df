"""The same answer as MONAI's sliding window and nnU-Net's predictor, each installed beside it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="both libraries run on torch")

import placements

import unet_rt as urt
from unet_rt.engine.engine import Engine

Array = np.ndarray[Any, np.dtype[Any]]

# The libraries' own: deprecations, environment variables that are not set.
pytestmark = [pytest.mark.torch, pytest.mark.onnxruntime, pytest.mark.filterwarnings("ignore")]

SHARES = [Fraction(1, 4), Fraction(1, 2), Fraction(5, 8)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Engine]:
    """By the number of axes."""
    folder = tmp_path_factory.mktemp("instance")
    return {dims: placements.engine_of(placements.export(dims, folder), folder / str(dims)) for dims in (2, 3)}


class Run(torch.nn.Module):
    """An engine as a module: the libraries then place the same numbers that unet-rt places."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, x: Any) -> Any:
        return torch.from_numpy(self.engine.run(x.numpy())[0])


def monai(
    network: Any, x: Array, window: tuple[int, ...], share: Fraction, mode: str = "gaussian", **more: Any
) -> Array:
    from monai.inferers.utils import sliding_window_inference

    with torch.inference_mode():
        found = sliding_window_inference(
            torch.from_numpy(x[None]), window, 1, network, overlap=float(share), mode=mode, **more
        )
    return found[0].numpy()


def nnunet(network: Any, x: Array, window: tuple[int, ...], share: Fraction, classes: int = 3, **more: Any) -> Array:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=float(1 - share),
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
        **{"use_mirroring": False, **more},
    )
    predictor.network = network
    predictor.configuration_manager = SimpleNamespace(patch_size=window)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=classes)
    predictor.allowed_mirroring_axes = tuple(range(len(window)))
    flat = x.ndim == 3
    found = predictor.predict_sliding_window_return_logits(torch.from_numpy(x[:, None] if flat else x))
    return (found[:, 0] if flat else found).float().numpy()


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net keeps its sums in float16, and says "half" where it makes them (not where it makes the weights)."""
    monkeypatch.setattr(torch, "half", torch.float32)


def check(got: Array, expected: Array, bound: float) -> None:
    """Values within the bound, and labels that differ only where it says they may."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
    runner_up, first = np.sort(expected, axis=0)[-2:]
    different = got.argmax(axis=0) != expected.argmax(axis=0)
    assert (first - runner_up)[different].max(initial=0) <= 2 * bound
    assert different.mean() <= 1e-6


@pytest.mark.monai
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("shape", "window"), placements.SHAPES)
def test_monai(engines: dict[int, Engine], mode: Any, share: Fraction, shape: Any, window: Any) -> None:
    overlap = [w - int(w * (1 - share)) for w in window]
    engine = placements.placed(engines[len(shape)], "monai", window, overlap, blend=mode)
    pixels, x = placements.pictures(shape)
    expected = monai(Run(engine), x, window, share, mode)
    starts, _ = placements.windows_of("monai", shape, window, share)
    got = urt.predict(engine, pixels, axes="C" + "ZYX"[-len(shape) :], output="raw")
    check(got, expected, placements.rounding(expected, window, starts))


@pytest.mark.monai
def test_monai_as_it_is(engines: dict[int, Engine]) -> None:
    """Nothing but the window is said on either side: a quarter of overlap."""
    engine = placements.placed(engines[2], "monai", (96, 64))
    pixels, x = placements.pictures((201, 317))
    expected = monai(Run(engine), x, (96, 64), Fraction(1, 4))
    starts, _ = placements.windows_of("monai", (201, 317), (96, 64), Fraction(1, 4))
    got = urt.predict(engine, pixels, axes="CYX", output="raw")
    check(got, expected, placements.rounding(expected, (96, 64), starts))


@pytest.mark.monai
@pytest.mark.parametrize(("border", "padding"), [("mirror", "reflect"), ("edge", "replicate"), ("zero", "constant")])
def test_monai_pads_otherwise(tmp_path: Path, engines: dict[int, Engine], border: Any, padding: str) -> None:
    from dataclasses import replace

    from unet_rt.engine.engine import EngineView

    spec = engines[2].spec
    given = EngineView(engines[2], replace(spec, contract=replace(spec.contract, border=border)))
    engine = placements.placed(given, "monai", (96, 64))
    pixels, x = placements.pictures((61, 50))
    expected = monai(Run(engine), x, (96, 64), Fraction(1, 4), padding_mode=padding)
    got = urt.predict(engine, pixels, axes="CYX", output="raw")
    check(got, expected, placements.rounding(expected, (96, 64), [[0], [0]]))


@pytest.mark.nnunet
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("shape", "window"), placements.SHAPES)
def test_nnunet(engines: dict[int, Engine], blend: Any, share: Fraction, shape: Any, window: Any) -> None:
    engine = placements.placed(engines[len(shape)], "nnunet", window, [int(w * share) for w in window], blend=blend)
    pixels, x = placements.pictures(shape)
    expected = nnunet(Run(engine), x, window, share, use_gaussian=blend == "gaussian")
    starts, _ = placements.windows_of("nnunet", shape, window, share)
    got = urt.predict(engine, pixels, axes="C" + "ZYX"[-len(shape) :], output="raw")
    check(got, expected, placements.rounding(expected, window, starts))


@pytest.mark.nnunet
@pytest.mark.parametrize(("shape", "window"), [((201, 317), (96, 64)), ((21, 50, 37), (16, 32, 32))])
def test_nnunet_in_half_precision(engines: dict[int, Engine], shape: Any, window: Any) -> None:
    """As it is: its sums are float16, so they are off by their own rounding, most where weights are small."""
    engine = placements.placed(engines[len(shape)], "nnunet", window)
    pixels, x = placements.pictures(shape)
    expected = nnunet(Run(engine), x, window, Fraction(1, 2))
    starts, weight = placements.windows_of("nnunet", shape, window, Fraction(1, 2))
    got = urt.predict(engine, pixels, axes="C" + "ZYX"[-len(shape) :], output="raw")
    largest, n = float(np.abs(got).max()), placements.covering(window, starts)
    # n roundings of both sums and one of their ratio, by half a unit: 2^-11 of a number, or 2^-25 where it is subnormal
    bound = (2 * n + 1) * largest * 2.0**-11
    bound = bound + n * (1 + largest) * 2.0**-25 / placements.weight_sums(shape, window, starts, weight)
    assert (np.abs(got - expected) <= 1.01 * bound).all()  # and the product of such errors
    runner_up, first = np.sort(got, axis=0)[-2:]
    different = got.argmax(axis=0) != expected.argmax(axis=0)
    assert ((first - runner_up) <= 2.02 * bound)[different].all()


@pytest.mark.nnunet
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(("shape", "window"), [((130, 101), (96, 64)), ((21, 40, 37), (16, 32, 32))])
def test_nnunet_mirrors(engines: dict[int, Engine], shape: Any, window: Any) -> None:
    engine = placements.placed(engines[len(shape)], "nnunet", window)
    pixels, x = placements.pictures(shape)
    expected = nnunet(Run(engine), x, window, Fraction(1, 2), use_mirroring=True)
    starts, _ = placements.windows_of("nnunet", shape, window, Fraction(1, 2))
    got = urt.predict(engine, pixels, axes="C" + "ZYX"[-len(shape) :], output="raw", tta="flip")
    mean = 2 ** len(shape) * float(np.finfo(np.float32).eps * np.abs(expected).max())  # of the positions, both sides
    check(got, expected, placements.rounding(expected, window, starts) + mean)
    labels = urt.predict(engine, pixels, axes="C" + "ZYX"[-len(shape) :], tta="flip")
    np.testing.assert_array_equal(labels, got.argmax(axis=0))


@pytest.mark.nnunet
@pytest.mark.parametrize("window", [(13, 10), (5, 16), (96, 64), (2, 2)])
def test_windows_of_nnunet(window: tuple[int, ...]) -> None:
    """Its own functions, at half a window and every size: odd windows step by half pixels."""
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

    from unet_rt.tiling.field import TileSizes
    from unet_rt.tiling.placement import blend_weight, blended_tiles, usual_overlap

    for n in range(max(window), 600):
        expected = compute_steps_for_sliding_window((n, n), window, 0.5)
        found = [blended_tiles(n, w, usual_overlap(w, "nnunet"), TileSizes(1, 0, 1), [], "nnunet") for w in window]
        assert [list(axis.starts) for axis in found] == expected
    weight = compute_gaussian(window, value_scaling_factor=10, device=torch.device("cpu"))
    np.testing.assert_array_equal(blend_weight(window, "gaussian", "nnunet"), weight.float().numpy())


@pytest.mark.monai
@pytest.mark.nnunet
@pytest.mark.parametrize(("rule", "library"), [("monai", monai), ("nnunet", nnunet)])
@pytest.mark.usefixtures("in_float32")
def test_the_module_itself(engines: dict[int, Engine], rule: str, library: Callable[..., Array]) -> None:
    """PyTorch's arithmetic there, ONNX Runtime's here: sums in another order, and the same labels."""
    engine = placements.placed(engines[2], rule, (96, 64), (48, 32))
    pixels, x = placements.pictures((201, 117))
    expected = library(placements.module(2), x, (96, 64), Fraction(1, 2))
    # what two libraries' convolutions may differ by: 20 layers of float32 sums of some hundred numbers
    check(urt.predict(engine, pixels, axes="CYX", output="raw"), expected, 1e-5 * float(np.abs(expected).max()))
