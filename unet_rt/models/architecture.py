"""Architectures as values: what a checkpoint holds of its network beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import GraphError
from .fcn import FCN8s, FCN8sSpec
from .segnet import SegNet, SegNetSpec
from .unet import UNet, UNetSpec

Network = UNet | FCN8s | SegNet
KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "UNet": (UNet, UNetSpec),
    "FCN8s": (FCN8s, FCN8sSpec),
    "SegNet": (SegNet, SegNetSpec),
}


def architecture_of(network: nn.Module) -> dict[str, Any]:
    """``{"network": "UNet", "width": 64, ...}``. GraphError for a module that is none of this package's."""
    name = type(network).__name__
    if name not in KINDS or not isinstance(network, KINDS[name][0]):
        raise GraphError(f"{name} is none of {', '.join(KINDS)}; export other modules from Python: urt.export(...)")
    return {"network": name, **network.spec.to_json()}


def network_of(architecture: Mapping[str, Any]) -> Network:
    """A network with initial weights (torch's global generator). GraphError for what no network has."""
    values = dict(architecture)
    name = values.pop("network", "UNet")
    if name not in KINDS:
        raise GraphError(f"the architecture names network {name!r}; known are {', '.join(KINDS)}")
    module, spec = KINDS[name]
    try:
        network: Network = module(spec(**values))
    except (TypeError, ValueError) as error:
        raise GraphError(f"the architecture is none of {name}'s: {error}; give the checkpoint's own") from error
    return network
