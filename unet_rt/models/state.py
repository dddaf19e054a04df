"""States of networks as people save them, opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..contract.contract import Contract
from ..errors import GraphError

# Where trainers keep the state dict inside what they save.
NESTED = ("state_dict", "model_state_dict", "model", "state", "network_weights", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")


@dataclass(frozen=True)
class Opened:
    """A module in evaluation mode with what is known of its contract.

    ``metadata`` is written into the ONNX file beside the contract; ``notes`` are for people.
    """

    module: nn.Module
    contract: Contract
    metadata: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


def load_state(module: nn.Module, content: Any, name: str) -> None:
    """Loads a state dict, wherever trainers put it and whatever they prefixed its names with.

    Raises GraphError with the first names that do not fit.
    """
    state = _state_of(content)
    if state is None:
        raise GraphError(f"{name} holds no state dict (tensors by name); save torch.save(module.state_dict(), ...)")
    wanted = set(module.state_dict())
    ways = [state] + [
        {k.removeprefix(prefix): v for k, v in state.items()}
        for prefix in PREFIXES
        if all(k.startswith(prefix) for k in state)
    ]
    best = max(ways, key=lambda s: len(wanted & set(s)))
    try:
        module.load_state_dict(best)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise GraphError(
            f"{name} does not fit the architecture: {' '.join(lines)[:300]}; name the one that it was trained with"
        ) from error


def _state_of(content: Any) -> dict[str, torch.Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if tensors and len(tensors) == len(content):
        return tensors
    for key in NESTED:
        if isinstance(content.get(key), Mapping) and (found := _state_of(content[key])) is not None:
            return found
    return None
