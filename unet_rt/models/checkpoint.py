"""Checkpoints of training: weights, contract and record in one file."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ..contract.contract import Contract
from ..contract.json import contract_from_json
from ..errors import OutputError, UnetRtError, first_line
from ..system.durable import Disk
from .architecture import Network, architecture_of, network_of

CHECKPOINT_FORMAT = 1


class TrainingError(UnetRtError):
    """Training cannot go on: the loss is not finite, or a checkpoint cannot be read."""


def save_checkpoint(
    path: str | os.PathLike[str], network: Network, contract: Contract, record: dict[str, Any] | None = None
) -> None:
    """Architecture, weights, contract and a record, loadable with ``weights_only``. Written whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    content = {
        "format": CHECKPOINT_FORMAT,
        "architecture": architecture_of(network),
        "state": {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()},
        "contract": json.dumps(contract.to_json()),
        "record": json.dumps(record or {}),
    }
    write_torch(Path(path), content)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[Network, Contract, dict[str, Any]]:
    """Network (evaluation mode), contract and record of :func:`save_checkpoint`. Nothing in it is executed."""
    content = read_torch(Path(path))
    if not isinstance(content, dict) or "format" not in content or "architecture" not in content:
        raise TrainingError(f"{path} is not a checkpoint of unet-rt; export other modules from Python: urt.export(...)")
    if content["format"] > CHECKPOINT_FORMAT:
        raise TrainingError(
            f"{path} has checkpoint format {content['format']}, this version reads {CHECKPOINT_FORMAT}; update unet-rt"
        )
    network = network_of(content["architecture"])
    network.load_state_dict(content["state"])
    return network.eval(), contract_from_json(json.loads(content["contract"])), json.loads(content["record"])


def write_torch(path: Path, content: Any) -> None:
    """``torch.save``; whole or not at all. OutputError where it cannot be written."""
    try:
        # To a stream: torch writes the name of a file into it, and the name of this one is random.
        with Disk().writing(path) as part, part.open("wb") as stream:
            torch.save(content, stream)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise OutputError(f"{path} cannot be written ({first_line(error)}); free some space") from error


def read_torch(path: Path) -> Any:
    """``torch.load`` of tensors and plain values, to the CPU; TrainingError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    except pickle.UnpicklingError as error:  # whose advice is to execute it
        raise TrainingError(
            f"{path} holds more than weights (a whole module, or other objects of Python), and nothing in it is executed; "
            "where you trust it, save the weights alone: torch.save(torch.load(..., weights_only=False).state_dict(), ...)"
        ) from error
    except Exception as error:  # unpickling foreign bytes raises anything
        raise TrainingError(
            f"{path} cannot be loaded as weights alone ({first_line(error)}); nothing in it is executed. Save a state dict "
            "(torch.save(module.state_dict(), ...)), or export the module from Python: urt.export(...)"
        ) from error
