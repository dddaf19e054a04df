"""What the graph was judged to be is held against the graph itself: by build, before anything is written, and by verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from drawn_networks import Drawing
from onnx import TensorProto, helper, numpy_helper

import unet_rt as urt
from unet_rt.building import tiling
from unet_rt.cli.main import main
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.engine.equality import Equality
from unet_rt.errors import ParityError, TileError
from unet_rt.graph import sizes
from unet_rt.judging.verify import verify

pytestmark = pytest.mark.onnxruntime
CONTRACT = Contract(task="regression", output_is="values", normalization=Normalization("none"))
QUICK: Any = {"tile": (64, 64), "threads": 1, "backend": "onnxruntime", "precision": "fp32", "contract": CONTRACT}


def network(path: Path, nodes: Any) -> Path:
    """x -> y of one channel; ``nodes`` draws what is between."""
    d = Drawing(np.random.default_rng(0))
    d.nodes.append(helper.make_node("Identity", [nodes(d)], ["y"]))
    graph = helper.make_graph(
        d.nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [numpy_helper.from_array(v, k) for k, v in d.constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), str(path))
    return path


def blurred(d: Drawing) -> str:
    w = d.const(np.full((1, 1, 3, 3), 1 / 9), np.float32)
    return d.node("Conv", "x", w, pads=[1, 1, 1, 1])


def padded_in_front(d: Drawing) -> str:
    """A pool by 2 within a pad of one side to a multiple of 16: another phase for every residue that is odd."""
    h = d.node("Shape", "x", start=2, end=3)
    m, zeros = d.const([16]), d.const([0, 0])
    pad = d.node("Mod", d.node("Sub", m, d.node("Mod", h, m)), m)
    inside = d.node(
        "Pad", blurred(d), d.node("Concat", zeros, pad, d.const([0]), d.const([0] * 4), axis=0), mode="edge"
    )
    pooled = d.node("MaxPool", inside, kernel_shape=[2, 2], strides=[2, 2])
    more = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    large = d.node("Resize", pooled, "", d.const([1, 1, 2, 2], np.float32), **more)
    return d.node("Slice", large, pad, d.const([2**31]), d.const([2]))


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An analysis that takes what it cannot follow for harmless: what a defect would do."""
    monkeypatch.setattr(sizes, "lengthened", lambda strides, bounds: tuple(strides))
    monkeypatch.setattr(sizes.Search, "_unheld", lambda self, bounds, states: [])
    monkeypatch.setattr(sizes.Search, "exact_up_to", lambda self: [None] * len(self.declared))


@pytest.fixture
def image() -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(206, 198))
    return (_blur(_blur(noise)) * 5 + 0.1 * noise).astype(np.float32)


def doubled(d: Drawing) -> str:
    """Twice the value in images of more than 100 px."""
    h = d.node("Shape", "x", start=2, end=3)
    above = d.node("Greater", h, d.const([100]))
    return d.node("Mul", blurred(d), d.node("Where", above, d.const([2], np.float32), d.const([1], np.float32)))


@pytest.mark.usefixtures("believed")
def test_build_and_verify_find_what_the_analysis_believed(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(tmp_path / "m.onnx", doubled)
    with pytest.raises(ParityError, match=r"was judged exact, and is not.*please report it"):
        urt.build(model, samples=[image], out=tmp_path / "m.urt", **QUICK)
    assert not (tmp_path / "m.urt").exists()
    monkeypatch.setattr(tiling, "_hold_promise", lambda job, spec, results: None)
    monkeypatch.setattr(Equality, "excess", lambda *_: "")  # which notices as well
    generous = urt.Budget(error=10.0)
    urt.build(model, samples=[image], out=tmp_path / "m.urt", budget=generous, **QUICK).close()
    by_images = verify(tmp_path / "m.urt", [image], budget=generous)
    by_exam = verify(tmp_path / "m.urt", budget=generous)
    for report in (by_images, by_exam):
        assert not report.accepted
        assert "please report it" in report.verdict.reasons[0]


def test_what_is_exact_passes(tmp_path: Path, image: np.ndarray) -> None:
    model = network(tmp_path / "m.onnx", padded_in_front)
    urt.build(model, samples=[image], out=tmp_path / "m.urt", **QUICK).close()
    assert verify(tmp_path / "m.urt", [image]).accepted
    assert verify(tmp_path / "m.urt").accepted


def small_seams(d: Drawing) -> str:
    """Values of some 1e-4, and a seam of a hundredth of that in images of more than 100 px."""
    h = d.node("Shape", "x", start=2, end=3)
    above = d.node("Greater", h, d.const([100]))
    factor = d.node("Where", above, d.const([1.01e-4], np.float32), d.const([1e-4], np.float32))
    return d.node("Mul", blurred(d), factor)


@pytest.mark.usefixtures("believed")
def test_outputs_of_a_small_range_are_held_to_their_own(tmp_path: Path, image: np.ndarray) -> None:
    model = network(tmp_path / "m.onnx", small_seams)
    with pytest.raises(ParityError, match="was judged exact, and is not"):
        urt.build(model, samples=[image], out=tmp_path / "m.urt", budget=urt.Budget(error=10.0), **QUICK)


def test_an_image_above_the_bound_is_refused(
    tmp_path: Path, image: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    model = network(tmp_path / "m.onnx", doubled)
    engine = urt.build(model, samples=[image[:96]], out=tmp_path / "m.urt", **{**QUICK, "tile": (48, 48)})
    with engine:
        assert engine.spec.exact_up_to == (100, None)
        assert np.abs(urt.predict(engine, image[:100], output="raw") - _blur(image[:100])).max() < 1e-5
        with pytest.raises(TileError, match="above 100 px the network computes something else"):
            urt.predict(engine, image, output="raw")
    np.save(tmp_path / "large.npy", image)
    capsys.readouterr()
    assert main(["inspect", str(model)]) == 0
    assert "only Y up to 100 px: above, Greater" in capsys.readouterr().out


def _blur(image: np.ndarray) -> np.ndarray:
    wide = np.pad(image, 1)
    return np.asarray(sum(wide[i : i + image.shape[0], j : j + image.shape[1]] for i in range(3) for j in range(3)) / 9)
