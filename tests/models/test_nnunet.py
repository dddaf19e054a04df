"""A trained nnU-Net becomes an ONNX graph with its contract, and predicts what nnU-Net predicts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nnU-Net runs on torch")
pytest.importorskip("onnxruntime", reason="export checks with onnxruntime; pip install unet-rt[cpu]")

import unet_rt as urt
from unet_rt.cli.main import main
from unet_rt.contract.contract import Normalization
from unet_rt.contract.json import contract_from_json
from unet_rt.drawing.microscopy import microscopy
from unet_rt.drawing.scene import Scene
from unet_rt.errors import GraphError
from unet_rt.models.nnunet import open_nnunet
from unet_rt.training.augment import Augmentation, Tiles
from unet_rt.training.export import METADATA_KEY
from unet_rt.training.samples import prepare

pytestmark = [
    pytest.mark.torch,
    pytest.mark.onnxruntime,
    pytest.mark.nnunet,
    # nnU-Net's own: environment variables that are not set, deprecations.
    pytest.mark.filterwarnings("ignore"),
]
ZSCORE = Normalization("zscore", scope="channel", eps=1e-8)


def plans(scheme: str) -> dict[str, Any]:
    kernels, strides = [[3, 3]] * 3, [[1, 1], [2, 2], [2, 2]]
    network = {
        "n_stages": 3, "features_per_stage": [8, 16, 32], "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": kernels, "strides": strides, "n_conv_per_stage": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2],
        "conv_bias": True, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_2d", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [96, 96], "median_image_size_in_voxels": [200.0, 200.0], "spacing": [1.0, 1.0],
        "normalization_schemes": [scheme], "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling, "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape", "resampling_fn_probabilities_kwargs": resampling,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": network, "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": True,
    }  # fmt: skip
    intensities = {"max": 2000.0, "mean": 900.0, "median": 850.0, "min": 100.0, "percentile_00_5": 200.0,
                   "percentile_99_5": 1800.0, "std": 300.0}  # fmt: skip
    return {
        "dataset_name": "Dataset999_Drawn", "plans_name": "nnUNetPlans", "image_reader_writer": "NaturalImage2DIO",
        "original_median_spacing_after_transp": [999.0, 1.0, 1.0],
        "original_median_shape_after_transp": [1, 200, 200], "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2], "configurations": {"2d": configuration},
        "experiment_planner_used": "ExperimentPlanner", "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``fold_0`` of a small nnU-Net that has learnt to find nuclei."""
    home = tmp_path_factory.mktemp("nnUNet_results") / "nnUNetTrainer__nnUNetPlans__2d"
    fold = home / "fold_0"
    fold.mkdir(parents=True)
    (home / "plans.json").write_text(json.dumps(plans("ZScoreNormalization")))
    dataset = {"channel_names": {"0": "DAPI"}, "labels": {"background": 0, "nucleus": 1}, "numTraining": 1,
               "file_ending": ".png"}  # fmt: skip
    (home / "dataset.json").write_text(json.dumps(dataset))
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans("ZScoreNormalization"))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("2d"), 1, 2, True)
    m = microscopy((256, 256), seed=1, scene=Scene(radius_px=9, cover=0.3))
    tiles = Tiles([prepare("drawn", m.image, m.truth, ZSCORE)], 96, 96, Augmentation(), 0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    torch.set_num_threads(1)
    for step in range(80):
        image, target, _ = tiles.draw(2, step)
        loss = torch.nn.functional.cross_entropy(network(image)[0], target)  # the finest of its outputs
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4
    checkpoint = {
        "network_weights": network.state_dict(), "optimizer_state": optimizer.state_dict(), "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.6)]}, "_best_ema": np.float64(0.6),
        "current_epoch": 1, "init_args": {"configuration": "2d", "fold": 0}, "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }  # fmt: skip
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    return fold


def test_the_contract_is_that_of_its_plans(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    out = tmp_path / "nn.onnx"
    assert main(["export", str(trained), "--out", str(out)]) == 0
    assert "equals the module" in capsys.readouterr().out
    model = onnx.load(out)
    metadata = {p.key: p.value for p in model.metadata_props}
    contract = contract_from_json(json.loads(metadata[METADATA_KEY]))
    assert contract.axes == "NCYX"
    assert contract.channels == ("DAPI",)
    assert contract.normalization == ZSCORE
    assert (contract.task, contract.classes, contract.output_is) == ("multiclass", ("background", "nucleus"), "logits")
    assert contract.trained_tile == (96, 96)
    assert json.loads(metadata["nnunet"])["mirroring_axes"] == [0, 1]
    assert len(model.graph.output) == 1  # deep supervision is off


def test_it_predicts_what_nnunet_predicts(trained: Path, tmp_path: Path) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    m = microscopy((200, 230), seed=2, scene=Scene(radius_px=9, cover=0.3))
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), perform_everything_on_device=False,
                                allow_tqdm=False)  # fmt: skip
    predictor.initialize_from_trained_model_folder(str(trained.parent), (0,))
    image = m.image[None, None].astype(np.float32)
    out = tmp_path / "nn.onnx"
    assert main(["export", str(trained), "--out", str(out)]) == 0
    with urt.build(
        out, samples=[m.image], out=tmp_path / "nn.urt", backend="onnxruntime", precision="fp32", placement="nnunet"
    ) as engine:
        for mirrored in (False, True):
            predictor.use_mirroring = mirrored
            [theirs] = predictor.predict_single_npy_array(image, {"spacing": [999.0, 1.0, 1.0]}, None, None, False)
            ours = urt.predict(engine, m.image, tta="flip" if mirrored else "none")
            assert 0.05 < np.mean(theirs) < 0.6
            # Labels may turn where both classes are equal to rounding: nnU-Net adds windows up in float16.
            assert np.mean(ours != theirs) <= 2 / m.image.size
            assert (ours[m.truth > 0] == 1).mean() > 0.8


def test_what_is_no_nnunet_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"holds no checkpoint_final\.pth"):
        open_nnunet(tmp_path)
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint_final.pth").write_bytes((trained / "checkpoint_final.pth").read_bytes())
    with pytest.raises(GraphError, match=r"plans\.json cannot be read"):
        open_nnunet(tmp_path / "fold_0")


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"trainer_name": "MyTrainer"}, "MyTrainer"), ({"init_args": {"configuration": "3d_fullres"}}, "3d_fullres")],
)
def test_what_nnunet_does_not_know_is_named(trained: Path, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    (tmp_path / "fold_0").mkdir()
    for name in ("plans.json", "dataset.json"):
        (tmp_path / name).write_bytes((trained.parent / name).read_bytes())
    checkpoint = torch.load(trained / "checkpoint_final.pth", weights_only=False)
    torch.save({**checkpoint, **changed}, tmp_path / "fold_0" / "checkpoint_final.pth")
    if "trainer_name" in changed:
        try:
            import torchvision  # noqa: F401 - nnU-Net looks for it in all its trainers, and one of them imports this
        except RuntimeError as error:
            pytest.skip(f"torchvision is built for another torch: {error}")
    with pytest.raises(GraphError, match=said):
        open_nnunet(tmp_path)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("NoNormalization", Normalization("none")),
        ("RGBTo01Normalization", Normalization("scale", scale=255.0)),
        ("CTNormalization", Normalization("fixed", mean=(900.0,), std=(300.0,), clip=(200.0, 1800.0))),
    ],
)
def test_normalisations(trained: Path, tmp_path: Path, scheme: str, expected: Normalization) -> None:
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "plans.json").write_text(json.dumps(plans(scheme)))
    (tmp_path / "dataset.json").write_bytes((trained.parent / "dataset.json").read_bytes())
    (tmp_path / "fold_0" / "checkpoint_final.pth").write_bytes((trained / "checkpoint_final.pth").read_bytes())
    assert open_nnunet(tmp_path).contract.normalization == expected
