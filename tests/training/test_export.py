"""Modules become graphs that give what the modules give, at any size and batch, with the contract inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="export needs torch; pip install unet-rt[torch]")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime", reason="export checks with onnxruntime; pip install unet-rt[cpu]")

import unet_rt
from unet_rt.cli.main import main
from unet_rt.contract.contract import (
    Contract,
    Normalization,
)
from unet_rt.contract.json import contract_from_json
from unet_rt.contract.smp import contract_from_smp
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import (
    ContractError,
    GraphError,
)
from unet_rt.models.architecture import network_of
from unet_rt.models.checkpoint import save_checkpoint
from unet_rt.models.fcn import FCN8s
from unet_rt.models.segnet import SegNet
from unet_rt.models.stored import unet_from_onnx
from unet_rt.models.unet import UNet, UNetSpec
from unet_rt.training.export import (
    METADATA_KEY,
    export,
)

pytestmark = [pytest.mark.torch, pytest.mark.onnxruntime]

CONTRACT = Contract(
    axes="NCYX",
    channels=("nuclei",),
    normalization=Normalization("percentile", scope="image"),
    task="multiclass",
    output_is="logits",
    classes=("background", "nucleus"),
    trained_tile=(96, 96),
)


def pixels(size: int = 160) -> Any:
    image = microscopy((size, size), seed=1).image.astype(np.float32)
    return (image - image.min()) / (np.percentile(image, 99.8) - image.min())


def used(network: Any) -> Any:
    """Statistics and biases other than the initial ones, so that folding them wrongly shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
                m.running_mean.normal_(std=0.3)
                m.running_var.uniform_(0.5, 2)
                m.bias.normal_(std=0.2)
    return network


@pytest.mark.parametrize(
    "arguments",
    [
        {"width": 4, "depth": 2, "padding": "same", "norm": "batch", "up": "bilinear"},
        {"width": 4, "depth": 2},
        {"width": 4, "depth": 2, "padding": "same", "up": "nearest", "in_channels": 3, "classes": 1},
        {"width": 2, "depth": 1, "dims": 3, "padding": "same", "norm": "batch"},
        {"width": 2, "depth": 1, "dims": 3, "up": "bilinear"},
    ],
    ids=str,
)
def test_u_nets_of_all_kinds(tmp_path: Path, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = used(UNet(UNetSpec(**arguments)))
    done = export(network, tmp_path / "model.onnx", sizes=None if network.spec.dims == 2 else [20, 22])
    assert done.exporter == "trace"
    assert done.max_error <= done.tolerance
    assert done.sizes[0] != done.sizes[1]
    model = onnx.load(done.path)
    kinds = [n.op_type for n in model.graph.node]
    assert "BatchNormalization" not in kinds
    assert "Identity" not in kinds
    assert not {"Shape", "Gather", "Dropout", "If"} & set(kinds)
    # Free axes: batch and space are named, channels are numbers.
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [bool(d.dim_param) for d in shape] == [True, False, *[True] * network.spec.dims]
    # A third size, never shown to the exporter.
    third = network.spec.size_at_least(max(done.sizes[1]) + 1)
    tile = (third, *done.sizes[0][1:])
    x = np.random.default_rng(0).random((3, network.spec.in_channels, *tile), np.float32)
    session = ort.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = network.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run(None, {"input": x})[0], wanted, atol=4 * done.tolerance)


def test_the_contract_travels_in_the_metadata(tmp_path: Path) -> None:
    network = UNet(UNetSpec(width=4, depth=2, padding="same"))
    export(network, tmp_path / "model.onnx", contract=CONTRACT, pixels=pixels())
    props = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert list(props) == [METADATA_KEY]
    assert contract_from_json(json.loads(props[METADATA_KEY])) == CONTRACT


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    network = UNet(UNetSpec(width=2, depth=1, padding="same", norm="batch")).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    export(network, tmp_path / "model.onnx", sizes=[32, 40])
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


class TwoHeads(torch.nn.Module):
    """Plain PyTorch: strided convolution, GroupNorm-free, two outputs at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(2, 6, 3, stride=2, padding=1), torch.nn.ReLU())
        self.coarse = torch.nn.Conv2d(6, 1, 1)
        self.fine = torch.nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1)

    def forward(self, x: Any) -> Any:
        x = self.body(x)
        return self.fine(x), torch.sigmoid(self.coarse(x))


def test_any_module_with_several_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    done = export(TwoHeads(), tmp_path / "two.onnx", sizes=[64, (64, 96)])
    graph = onnx.load(done.path).graph
    assert [o.name for o in graph.output] == ["output_0", "output_1"]


class ResizesToTheInput(torch.nn.Module):
    """What many networks do: odd sizes are padded and the answer is resized by the input's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.MaxPool2d(2))

    def forward(self, x: Any) -> Any:
        return torch.nn.functional.interpolate(self.net(x), size=x.shape[2:], mode="bilinear", align_corners=False)


def test_sizes_taken_from_tensors_stay_free(tmp_path: Path) -> None:
    torch.manual_seed(0)
    done = export(ResizesToTheInput(), tmp_path / "free.onnx", sizes=[64, (64, 96)])
    assert done.max_error <= done.tolerance


class BakesItsSize(torch.nn.Module):
    """A size as a Python number: the tracer bakes it, and only a second size shows that."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Any) -> Any:
        height, width = (int(n) for n in x.shape[2:])
        y = torch.nn.functional.avg_pool2d(self.net(x), 2)
        return torch.nn.functional.interpolate(y, size=(height, width), mode="nearest")


def test_a_baked_size_is_found_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="trace: at 64x96 px"):
        export(BakesItsSize(), tmp_path / "baked.onnx", sizes=[64, (64, 96)], exporter="trace")
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_that_fails_without_a_word_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bytes:
        raise AssertionError

    monkeypatch.setattr(sys.modules["unet_rt.training.export"], "trace", fail)
    with pytest.raises(GraphError, match="trace: AssertionError: AssertionError"):
        export(
            UNet(UNetSpec(width=2, depth=1, padding="same")), tmp_path / "model.onnx", sizes=[32, 40], exporter="trace"
        )
    assert list(tmp_path.iterdir()) == []


def test_the_other_exporter_is_taken_where_tracing_bakes_a_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the dynamo exporter needs onnxscript; pip install unet-rt[torch]")
    torch.manual_seed(0)
    done = export(BakesItsSize(), tmp_path / "free.onnx", sizes=[64, (64, 96)])
    assert done.exporter == "dynamo"
    assert any("64x96" in note for note in done.notes)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    network = UNet(UNetSpec(width=2, depth=1, padding="same"))
    with pytest.raises(ContractError, match=r"names 2 channels .* the module takes 1"):
        export(network, out, contract=Contract(channels=("a", "b")))
    with pytest.raises(ContractError, match="channels first"):
        export(network, out, contract=Contract(axes="NYXC"))
    with pytest.raises(ContractError, match="no convolution"):
        export(torch.nn.ReLU(), out)
    with pytest.raises(GraphError, match="two sizes"):
        export(network, out, sizes=[32])
    with pytest.raises(GraphError, match=r"not a|takes a torch\.nn\.Module"):
        export(lambda x: x, out)  # type: ignore[arg-type]
    broken = UNet(UNetSpec(width=2, depth=1, padding="same"))
    with torch.no_grad():
        broken.head.bias.fill_(float("nan"))
    with pytest.raises(GraphError, match="not finite"):
        export(broken, out)
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_network_has_its_contract_and_is_free() -> None:
    path = Path(unet_rt.__file__).parent / "data" / "nuclei.onnx"
    assert path.stat().st_size < 1.5e6
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    contract = contract_from_json(json.loads(next(p.value for p in model.metadata_props if p.key == METADATA_KEY)))
    assert contract.axes == "NCYX"
    assert contract.classes == ("background", "nucleus")
    assert contract.output_is == "logits"
    assert contract.normalization == Normalization("percentile", scope="image")
    assert [bool(d.dim_param) for d in model.graph.input[0].type.tensor_type.shape.dim] == [True, False, True, True]


def test_the_shipped_network_finds_nuclei_in_drawn_microscopy() -> None:
    session = ort.InferenceSession(
        str(Path(unet_rt.__file__).parent / "data" / "nuclei.onnx"), providers=["CPUExecutionProvider"]
    )
    m = microscopy((256, 256), seed=77)
    low, high = np.percentile(m.image, [1, 99.8])
    x = ((m.image - low) / (high - low + 1e-6)).astype(np.float32)[None, None]
    mask = session.run(None, {session.get_inputs()[0].name: x})[0][0].argmax(0) > 0
    truth = m.truth > 0
    assert (mask & truth).sum() / (mask | truth).sum() > 0.75


def test_a_module_comes_back_from_its_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = used(UNet(UNetSpec(width=3, depth=2, padding="same", norm="batch", up="bilinear")))
    done = export(network, tmp_path / "model.onnx", sizes=[32, (32, 40)])
    model = onnx.load(done.path)
    back = unet_from_onnx(model, network.spec)
    assert back.spec.norm == "none"
    x = torch.from_numpy(pixels(160)[None, None])
    with torch.no_grad():
        torch.testing.assert_close(back(x), network.eval()(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(GraphError, match="convolutions, the architecture has"):
        unet_from_onnx(model, UNet(UNetSpec(width=3, depth=3)).spec)
    with pytest.raises(GraphError, match="the architecture has"):
        unet_from_onnx(model, UNet(UNetSpec(width=4, depth=2, up="bilinear")).spec)


# --------------------------------------------------------------------------------------------------- the other networks


@pytest.mark.parametrize("kind", [FCN8s, SegNet])
def test_predecessors_are_exact_in_tiles(tmp_path: Path, kind: Any) -> None:
    """Their graphs are plain operators that the analysis knows; OpenVINO gives what ONNX Runtime gives."""
    torch.manual_seed(0)
    done = export(
        used(network_of({"network": kind.__name__, "width": 3, "depth": 3, "norm": "batch"})),
        tmp_path / "model.onnx",
        sizes=[48, (48, 64)],
    )
    assert done.exporter == "trace"
    kinds = {n.op_type for n in onnx.load(done.path).graph.node}
    assert not {"MaxUnpool", "ScatterND", "Shape", "Reshape"} & kinds
    (output,) = unet_rt.inspect(done.path).outputs
    assert output.exact
    assert [axis.stride for axis in output.field] == [8, 8]
    session = ort.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((1, 1, 160, 160), np.float32)
    whole = session.run(None, {"input": x})[0]
    part = session.run(None, {"input": x[:, :, 8:152, 16:160]})[0]
    halo = max(max(axis.halo) for axis in output.field)
    inner = slice(halo, 144 - halo)
    np.testing.assert_allclose(
        part[:, :, inner, inner], whole[:, :, 8:152, 16:160][:, :, inner, inner], atol=64 * done.tolerance
    )


def test_crop_concat_is_slice_and_concat_in_both_exporters(tmp_path: Path) -> None:
    for exporter in ("trace", "dynamo"):
        done = export(UNet(UNetSpec(width=2, depth=1)), tmp_path / "m.onnx", sizes=[44, (44, 48)], exporter=exporter)  # type: ignore[arg-type]
        kinds = [n.op_type for n in onnx.load(done.path).graph.node if n.op_type != "Constant"]
        assert kinds.count("Concat") == 1
        assert kinds.count("Slice") in (1, 2)  # both axes at once, or one after the other
        assert {n.domain for n in onnx.load(done.path).graph.node} == {""}


class Jumps(torch.nn.Module):
    """Rounds its features: the last bit of a number decides."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return torch.round(200 * self.net(x)) / 10


def test_a_network_that_jumps_is_compared_by_the_share_that_jumped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    done = export(Jumps(), tmp_path / "jumps.onnx", sizes=[96, (96, 128)])
    assert done.tolerance < 0.01
    assert done.max_error <= done.tolerance or any("last bit" in note for note in done.notes)


# ----------------------------------------------------------------------------------------------------- the command line


def test_checkpoints_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = UNet(UNetSpec(width=3, depth=2, padding="same"))
    save_checkpoint(tmp_path / "model.pt", network, CONTRACT)
    out = tmp_path / "model.onnx"
    assert main(["export", str(tmp_path / "model.pt"), "--out", str(out), "--classes", "a,b", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["contract"]["classes"] == ["a", "b"]  # options win over the checkpoint
    props = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert contract_from_json(json.loads(props[METADATA_KEY])).normalization == CONTRACT.normalization
    assert main(["export", str(tmp_path / "model.pt"), "--out", str(out)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err


def make_net(channels: int = 4) -> Any:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(channels, 2, 1)
    )


def test_state_dicts_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "model.onnx")
    torch.manual_seed(0)
    unet = UNet(UNetSpec(width=3, depth=1, padding="same"))
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in unet.state_dict().items()}}, tmp_path / "u.pt")
    assert main(["export", str(tmp_path / "u.pt"), "--out", out]) == 2
    assert "without their architecture" in capsys.readouterr().err
    which = ["--architecture", "network=UNet,width=3,depth=1,padding=same"]
    assert main(["export", str(tmp_path / "u.pt"), "--out", out, *which, "--normalize", "scale=255"]) == 0
    assert main(["export", str(tmp_path / "u.pt"), "--out", out, "--overwrite", *which[:1], "network=UNet"]) == 2
    assert "does not fit the architecture" in capsys.readouterr().err
    torch.save(make_net(6).state_dict(), tmp_path / "own.pt")
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n\ndef make_net(channels):\n"
        "    return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 2, 1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["--module", "my_networks:make_net", "--arguments", '{"channels": 6}', "--overwrite"]
    assert main(["export", str(tmp_path / "own.pt"), "--out", out, *own]) == 0
    assert "pass --normalize" in capsys.readouterr().out
    assert (
        main(["export", str(tmp_path / "own.pt"), "--out", out, "--module", "my_networks:nothing", "--overwrite"]) == 2
    )
    assert "has no nothing; check the name" in capsys.readouterr().err


def test_whole_modules_are_not_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(make_net(), tmp_path / "pickled.pt")
    assert main(["export", str(tmp_path / "pickled.pt"), "--out", str(tmp_path / "m.onnx")]) == 2
    assert "nothing in it is executed" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- other people's nets


def test_contracts_of_encoders() -> None:
    imagenet = Normalization("fixed", scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert contract_from_smp("resnet34").normalization == imagenet
    assert contract_from_smp("timm-efficientnet-b3", weights="noisy-student").normalization == imagenet
    half = Normalization("fixed", scale=255.0, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert contract_from_smp("inceptionv4").normalization == half
    assert contract_from_smp("timm-efficientnet-b3", weights="advprop").normalization == half
    with pytest.raises(ContractError, match="'my-own' is not known"):
        contract_from_smp("my-own")


def test_segmentation_models_pytorch(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install segmentation-models-pytorch")
    torch.manual_seed(0)
    contract = contract_from_smp("resnet18", classes=("background", "road"))
    network = smp.Unet("resnet18", encoder_weights=None, classes=2)
    done = export(network, tmp_path / "smp.onnx", contract=contract, sizes=[64, (64, 96)])
    assert done.max_error <= done.tolerance
    assert [p.key for p in onnx.load(done.path).metadata_props] == [METADATA_KEY]


@pytest.mark.monai
@pytest.mark.filterwarnings("ignore")  # MONAI's own deprecations
@pytest.mark.parametrize("name", ["UNet", "BasicUNet"])
def test_monai(tmp_path: Path, name: str) -> None:
    from monai.networks import nets

    torch.manual_seed(0)
    if name == "UNet":
        network = nets.UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2))
    else:
        network = nets.BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4, 4, 8, 8, 16, 4))
    done = export(network, tmp_path / "monai.onnx", sizes=[64, (64, 96)])
    assert done.max_error <= done.tolerance
