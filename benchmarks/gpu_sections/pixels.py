"""Networks that are measured, and drawn pixels as they take them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import paper_net
import torch
from torch import Tensor

from unet_rt.drawing.microscopy import microscopy
from unet_rt.images.normalize import affine, normalize_pixels
from unet_rt.images.open import open_image


@functools.cache
def network(name: str, dry: bool) -> paper_net.Net:
    """The paper's U-Net (trained weights, widened to 31.03 M parameters) or the small one that ships."""
    if name == "nuclei":
        return paper_net.nuclei()
    return paper_net.paper(widen=1) if dry else paper_net.paper()


def tile_px(name: str, dry: bool) -> int:
    if name == "paper":
        return 252 if dry else 572
    return 160 if dry else 512


@functools.cache
def drawn(side: int) -> np.ndarray:
    """(side, side) uint8: drawn microscopy; sides beyond 2048 px repeat a block of 2048, mirrored so that it joins."""
    block = microscopy((min(side, 2048),) * 2, seed=4242, dtype=np.uint8).image
    if side <= 2048:
        return block
    times = -(-side // 2048)
    row = np.concatenate([block[:, :: (-1) ** k] for k in range(times)], axis=1)[:, :side]
    return np.ascontiguousarray(np.concatenate([row[:: (-1) ** k] for k in range(times)], axis=0)[:side])


def numbers_of(net: paper_net.Net, pixels: np.ndarray) -> Any:
    """The whole image's normalisation in numbers."""
    assert net.contract.normalization is not None
    with open_image(pixels, net.contract, spatial=2) as source:
        return affine(net.contract.normalization, source).plane(0)


def batch_of(net: paper_net.Net, count: int, tile: int, device: str) -> Tensor:
    """(count, 1, tile, tile) float32, contiguous: different windows of one drawn image, normalised by its statistics."""
    pixels = drawn(max(tile + 64, min(2048, 2 * tile)))
    numbers = numbers_of(net, pixels)
    room = len(pixels) - tile
    corners = np.random.default_rng(7).integers(0, room + 1, (count, 2))
    windows = [normalize_pixels(pixels[None, y : y + tile, x : x + tile], numbers) for y, x in corners]
    return torch.from_numpy(np.stack(windows)).contiguous().to(device)


@functools.cache
def flops_of(checkpoint: Path, tile: int) -> int:
    """Operations of one tile, a multiply-add counted as two: counted by torch on tensors without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    module = paper_net.load_checkpoint(checkpoint)[0].to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(1, 1, tile, tile, device="meta"))
    return int(counter.get_total_flops())
