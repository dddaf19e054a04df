"""What the trainings of the networks that ship with the package have in common: a record, and an exported file."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unet_rt.contract.contract import Contract
from unet_rt.models.checkpoint import save_checkpoint
from unet_rt.models.unet import UNet
from unet_rt.training.export import export
from unet_rt.training.trainer import Progress, Recipe
from unet_rt.training.weights import F32


def record_of(
    name: str,
    task: str,
    command: str,
    network: UNet,
    contract: Contract,
    recipe: Recipe,
    history: Sequence[Progress],
    seconds: float,
) -> dict[str, Any]:
    """Recipe, seed, history and versions, as JSON values; data and figures are the caller's to add."""
    return {
        "network": name,
        "task": task,
        "architecture": network.spec.to_json(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "command": command,
        "contract": contract.to_json(),
        "recipe": recipe.to_json(),
        "history": [[p.step, round(p.loss, 4), round(p.iou, 4)] for p in history],
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def write_onnx(out: Path, network: UNet, contract: Contract, pixels: F32) -> dict[str, Any]:
    """Exports the network; what the record says of that. ``pixels`` (C, Y, X) are normalised, for the check."""
    done = export(network, out, contract=contract, pixels=pixels)
    return {"exporter": done.exporter, "opset": done.opset, "max_error_to_torch": done.max_error}


def write_record(folder: Path, network: UNet, contract: Contract, record: dict[str, Any]) -> None:
    """``NAME.json``, and a checkpoint ``NAME.pt`` that carries it."""
    name = record["network"]
    save_checkpoint(folder / f"{name}.pt", network, contract, record)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
