"""Function-preserving widening (Net2Net: Chen, Goodfellow, Shlens 2016) of a U-Net.

Every hidden channel becomes ``factor`` copies. Whoever reads a channel reads its copies with weights that add up to the
old one, so the wide network computes what the narrow one does; a little noise, which cancels over the copies, makes
the copies' readers differ, so that training could go on and no two weights are the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .unet import UNet


def widen(network: UNet, factor: int, *, noise: float = 0.1, seed: int = 0) -> UNet:
    """A U-Net ``factor`` times as wide that computes the same function, up to float32 rounding.

    Args:
        network: A 2-D or 3-D U-Net, with or without BatchNorm; left as it is.
        factor: How many copies each hidden channel becomes; input channels and classes stay.
        noise: Deviation of the readers' weights among copies, relative to the weight itself. It cancels in the sum.
        seed: Of the noise.
    """
    if factor < 1:
        raise ValueError(f"widening factor is {factor!r}; use a whole number from 1")
    if not 0 <= noise < 1:
        raise ValueError(f"noise is {noise}; use 0 to less than 1")
    random = torch.Generator().manual_seed(seed)
    wide = UNet(replace(network.spec, width=network.spec.width * factor))
    old = dict(network.named_modules())
    last = network.head
    first = network.down[0][0]  # type: ignore[index]
    with torch.no_grad():
        for name, module in wide.named_modules():
            source = old[name]
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                transposed = isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d)
                reads, writes = (0, 1) if transposed else (1, 0)
                weight: Tensor = source.weight.detach()
                if source is not last:
                    weight = weight.repeat_interleave(factor, writes)
                if source is not first:
                    weight = _share(weight, reads, factor, noise, random)
                module.weight.copy_(weight)
                if module.bias is not None:
                    bias: Tensor = source.bias.detach()
                    module.bias.copy_(bias if source is last else bias.repeat_interleave(factor))
            elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                for key, value in module.state_dict().items():
                    given: Tensor = source.state_dict()[key]
                    value.copy_(given.repeat_interleave(factor) if given.dim() else given)
    wide.train(network.training)
    return wide


def _share(weight: Tensor, axis: int, factor: int, noise: float, random: torch.Generator) -> Tensor:
    """Copies along ``axis`` whose sum over each group of ``factor`` is the old weight."""
    spread = weight.repeat_interleave(factor, axis).double() / factor
    shape = [*weight.shape[: axis + 1], factor, *weight.shape[axis + 1 :]]
    groups = torch.randn(shape, generator=random, dtype=torch.float64)
    groups -= groups.mean(axis + 1, keepdim=True)
    return (spread * (1 + noise * groups.flatten(axis, axis + 1))).to(weight.dtype)
