"""Weights of U-Nets in files that hold arrays and nothing that could be executed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import GraphError
from ..system.durable import Disk
from .unet import UNet, UNetSpec


def save_half(path: str | os.PathLike[str], network: UNet) -> None:
    """Weights as float16 arrays in an ``.npz``, the architecture beside them."""
    arrays: dict[str, npt.NDArray[Any]] = {
        name: tensor.detach().numpy().astype(np.float16) for name, tensor in network.state_dict().items()
    }
    architecture = np.frombuffer(json.dumps(network.spec.to_json()).encode(), np.uint8)
    with Disk().writing(Path(path)) as part, part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays, architecture=architecture)


def load_half(path: str | os.PathLike[str]) -> UNet:
    """Inverse of :func:`save_half`; float32, evaluation mode."""
    with np.load(path, allow_pickle=False) as stored:
        spec = UNetSpec(**json.loads(stored["architecture"].tobytes()))
        state = {k: torch.from_numpy(stored[k].astype(np.float32)) for k in stored.files if k != "architecture"}
    network = UNet(spec)
    network.load_state_dict(state)
    return network.eval()


def unet_from_onnx(model: Any, spec: UNetSpec) -> UNet:
    """The module of a U-Net that ``unet_rt.export`` wrote: BatchNorm is folded, so it has none. Evaluation mode.

    Args:
        model: An ``onnx.ModelProto``.
        spec: Its architecture.

    Raises:
        GraphError: the graph's convolutions are not those of ``spec``.
    """
    network = UNet(replace(spec, norm="none"))
    arrays = {
        t.name: np.frombuffer(t.raw_data, "<f4").reshape(t.dims) for t in model.graph.initializer if t.data_type == 1
    }
    found = [n for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose")]
    wanted = _in_order(network)
    if len(found) != len(wanted):
        raise GraphError(f"the graph holds {len(found)} convolutions, the architecture has {len(wanted)}; give its own")
    with torch.no_grad():
        for node, module in zip(found, wanted, strict=True):
            for name, parameter in zip(node.input[1:], (module.weight, module.bias), strict=True):
                array = arrays[name]
                if parameter is None or array.shape != tuple(parameter.shape):
                    shape = None if parameter is None else tuple(parameter.shape)
                    raise GraphError(f"{name} is {array.shape}, the architecture has {shape}; give its own")
                parameter.copy_(torch.from_numpy(array.copy()))
    return network.eval()


def _in_order(network: UNet) -> list[nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d]:
    """Convolutions in the order in which they are computed."""
    parts: list[nn.Module] = [*network.down]
    for up, merge in zip(network.up, network.merge, strict=True):
        parts += [up, merge]
    parts.append(network.head)
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return [m for part in parts for m in part.modules() if isinstance(m, kinds)]
