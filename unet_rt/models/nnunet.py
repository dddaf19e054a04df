"""A trained nnU-Net (version 2) as a module with its contract, from its own ``plans.json`` and ``dataset.json``.

nnU-Net's package builds the network (deep supervision off); its weights are loaded as weights alone. The contract holds
what nnU-Net does to pixels before the network: normalisation, channels, labels, patch, spacing. What a contract has no
word for (resampling to that spacing, cropping to what is not zero, mirroring at test time) is written beside it under
``nnunet`` and said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..contract.contract import Contract, Normalization
from ..errors import BackendError, ContractError, GraphError
from .state import Opened, load_state

METADATA_KEY = "nnunet"


def open_nnunet(folder: Path) -> Opened:
    """The network of a folder ``fold_N`` (or of the one above it, if it has one fold).

    Raises:
        BackendError: nnunetv2 is not installed.
        GraphError: the folder is not one of nnU-Net's, or its weights do not fit its plans.
    """
    fold, weights = _fold(folder)
    plans, dataset = (_json(fold.parent / name) for name in ("plans.json", "dataset.json"))
    content = _content(weights)
    try:
        configuration, trainer = str(content["init_args"]["configuration"]), str(content["trainer_name"])
        state = content["network_weights"]
    except (KeyError, TypeError) as error:
        raise GraphError(f"{weights} is not a checkpoint of nnU-Net version 2 ({error!r} is missing)") from error
    network, manager, plan = _network(plans, dataset, configuration, trainer)
    load_state(network, state, weights.name)
    mirror = content.get("inference_allowed_mirroring_axes")
    contract, notes = _contract(manager, plan, dataset)
    record = {
        "configuration": configuration,
        "trainer": trainer,
        "fold": fold.name,
        "patch_size": [int(n) for n in plan.patch_size],
        "spacing_mm": [float(s) for s in plan.spacing],
        "transpose_forward": [int(k) for k in manager.transpose_forward],
        "normalization_schemes": [str(s) for s in plan.normalization_schemes],
        "mirroring_axes": None if mirror is None else [int(k) for k in mirror],
        "labels": dataset["labels"],
        "channel_names": dataset.get("channel_names", dataset.get("modality")),
    }
    return Opened(network.eval(), contract, {METADATA_KEY: json.dumps(record)}, tuple(notes))


def _fold(folder: Path) -> tuple[Path, Path]:
    """(fold folder, checkpoint)."""
    names = ("checkpoint_final.pth", "checkpoint_best.pth")
    for name in names:
        if (folder / name).is_file():
            return folder, folder / name
    folds = sorted(p for p in folder.glob("fold_*") if any((p / name).is_file() for name in names))
    if len(folds) == 1:
        return _fold(folds[0])
    if folds:
        raise GraphError(f"{folder} holds {len(folds)} folds; choose one, e.g. {folds[0]}")
    raise GraphError(f"{folder} holds no {names[0]}; give a folder fold_N of nnU-Net's results, or a checkpoint file")


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GraphError(
            f"{path} cannot be read ({error.strerror or error}); nnU-Net keeps it above fold_N: copy it along"
        ) from error
    except json.JSONDecodeError as error:
        raise GraphError(f"{path} is not JSON ({error}); copy it again from its source") from error
    return found


def _content(path: Path) -> dict[str, Any]:
    """nnU-Net's checkpoints log NumPy scalars beside their tensors; apart from these nothing but weights is loaded."""
    from .checkpoint import read_torch

    numpy_scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(code)) for code in "fdilqB?"]
    with torch.serialization.safe_globals([numpy_scalar, np.dtype, *kinds]):
        content: dict[str, Any] = read_torch(path)
    return content


def _network(
    plans: dict[str, Any], dataset: dict[str, Any], configuration: str, trainer: str
) -> tuple[nn.Module, Any, Any]:
    """(module, plans manager, configuration manager), all by nnU-Net's own code."""
    try:
        from nnunetv2.inference.predict_from_raw_data import recursive_find_trainer_class_by_name
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        manager = PlansManager(plans)
        plan = manager.get_configuration(configuration)
        kind = recursive_find_trainer_class_by_name(trainer)  # imports all trainers to find an unusual one
    except ModuleNotFoundError as error:
        raise BackendError(f"{error.name} is missing, which builds nnU-Net's networks; pip install nnunetv2") from error
    except RuntimeError as error:
        raise GraphError(f"nnU-Net does not know what the checkpoint asks for: {error}") from error
    if kind is None:  # older versions only say so
        raise GraphError(
            f"nnU-Net has no trainer {trainer}, which the checkpoint names; install it where nnU-Net looks"
        )
    channels = determine_num_input_channels(manager, plan, dataset)
    heads = manager.get_label_manager(dataset).num_segmentation_heads
    try:
        module: nn.Module = kind.build_network_architecture(
            manager, plan, channels, heads, enable_deep_supervision=False
        )
    except TypeError:  # before 2.6: the class's name and its arguments
        module = kind.build_network_architecture(
            plan.network_arch_class_name,
            plan.network_arch_init_kwargs,
            plan.network_arch_init_kwargs_req_import,
            channels,
            heads,
            enable_deep_supervision=False,
        )
    if getattr(plan, "previous_stage_name", None):
        raise GraphError(
            "the network takes the result of another one (a cascade) as channels; export the full-resolution one"
        )
    return module, manager, plan


def _contract(manager: Any, plan: Any, dataset: dict[str, Any]) -> tuple[Contract, list[str]]:
    """(contract, sentences about what it cannot say)."""
    notes: list[str] = []
    spatial = len(plan.patch_size)
    names = dataset.get("channel_names") or dataset.get("modality") or {}
    channels = tuple(str(names[key]) for key in sorted(names, key=int))
    labels = manager.get_label_manager(dataset)
    values = dataset["labels"]
    if labels.has_regions:
        order = [key for key in values if key not in ("background", "ignore")]
        task: dict[str, Any] = {"task": "multilabel", "classes": tuple(order), "threshold": (0.5,) * len(order)}
        notes.append("labels are regions that overlap: one sigmoid each, above 0.5")
    else:
        order = sorted((key for key in values if key != "ignore"), key=lambda key: int(values[key]))
        task = {"task": "multiclass", "classes": tuple(order)}
    spacing = [float(s) for s in plan.spacing][-spatial:]
    if any(abs(s - 1) > 1e-6 for s in spacing):
        notes.append(
            f"nnU-Net resamples images to {' x '.join(f'{s:g}' for s in spacing)} mm before the network: give it images of "
            "that spacing"
        )
    if list(manager.transpose_forward) != list(range(len(manager.transpose_forward))):
        notes.append(f"nnU-Net transposes the axes of images by {list(manager.transpose_forward)}: do so before")
    normalization, more = _normalization(
        [str(s) for s in plan.normalization_schemes],
        [bool(m) for m in plan.use_mask_for_norm],
        manager.foreground_intensity_properties_per_channel,
    )
    notes += more
    return (
        Contract(
            axes="NC" + "ZYX"[-spatial:],
            channels=channels,
            normalization=normalization,
            output_is="logits",
            pixel_size_um=tuple(1000 * s for s in spacing),
            trained_tile=tuple(int(n) for n in plan.patch_size),
            **task,
        ),
        notes,
    )


def _normalization(
    schemes: Sequence[str], masked: Sequence[bool], intensities: dict[str, Any]
) -> tuple[Normalization | None, list[str]]:
    kinds = set(schemes)
    if len(kinds) != 1:
        return None, [f"channels are normalised in different ways ({', '.join(schemes)}), which a contract cannot say"]
    kind = kinds.pop()
    if kind == "ZScoreNormalization":
        notes = ["nnU-Net takes mean and deviation of what is left after cropping to pixels that are not 0"]
        if any(masked):
            return None, ["mean and deviation are taken inside a mask of the image, which a contract cannot say"]
        return Normalization("zscore", scope="channel", eps=1e-8), notes
    if kind == "CTNormalization":
        values = [intensities[str(k)] for k in range(len(schemes))]
        clips = {(float(v["percentile_00_5"]), float(v["percentile_99_5"])) for v in values}
        if len(clips) != 1:
            return None, ["channels are clipped at different grey levels, which a contract cannot say"]
        return (
            Normalization(
                "fixed",
                mean=tuple(float(v["mean"]) for v in values),
                std=tuple(max(float(v["std"]), 1e-8) for v in values),
                clip=clips.pop(),
            ),
            [],
        )
    simple = {
        "NoNormalization": Normalization("none"),
        "RescaleTo01Normalization": Normalization("minmax", scope="channel", eps=1e-8),
        "RGBTo01Normalization": Normalization("scale", scale=255.0),
    }
    if kind not in simple:
        raise ContractError(f"nnU-Net's {kind} is not known here; export from Python with a contract of your own")
    return simple[kind], []
