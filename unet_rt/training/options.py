"""What a user may choose of a training, and the architecture and recipe that follow for data and device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from ..contract.contract import Normalization
from ..errors import BackendError, ContractError
from ..models.architecture import Network
from .augment import Augmentation
from .samples import MaskKind, Sample
from .trainer import Recipe

NORMALIZATION = Normalization("percentile", scope="image", percentiles=(1.0, 99.8))


FIELDS = {f.name for f in fields(Recipe)}


@dataclass(frozen=True)
class Options:
    """What a user may choose; None: chosen for the data and the device.

    Attributes:
        preset: ``default`` serves data sets that nobody has seen: same padding, BatchNorm, Adam, small enough for the
            device. ``paper`` is the recipe of the paper: unpadded convolutions, tiles of 572 px one at a time, SGD with
            momentum 0.99, dropout, no BatchNorm, classes balanced.
        network: ``UNet``, ``FCN8s`` or ``SegNet``.
        architecture: Values over the preset's, e.g. ``{"width": 32}``.
        recipe: Values over the preset's, e.g. ``{"steps": 500}``.
        normalization: Of the images.
        masks_are: What the numbers of the masks mean.
        images, masks: Sub-folders.
        axes, channels: How images are read.
        augment: False: tiles are windows of the images as they are.
        limit: At most so many images are trained on, the first ones.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        threads: Of torch on the CPU; 0: as many as this process may use.
    """

    preset: Literal["default", "paper"] = "default"
    network: str = "UNet"
    architecture: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    normalization: Normalization = NORMALIZATION
    masks_are: MaskKind | None = None
    images: str | None = None
    masks: str | None = None
    axes: str | None = None
    channels: Sequence[int] | str | None = None
    augment: bool = True
    limit: int | None = None
    device: str = "auto"
    threads: int = 0


def device_of(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda[:N]`` as torch's device. BackendError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    head, _, number = name.partition(":")
    if head != "cuda" or (number and not number.isdecimal()):
        raise BackendError(f"device {name!r} is not known; use auto, cpu or cuda[:N]")
    if not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} sees no CUDA device; install a CUDA build, or use --device cpu")
    if int(number or 0) >= torch.cuda.device_count():
        raise BackendError(f"there is no device {name}; torch sees {torch.cuda.device_count()}, counted from 0")
    return torch.device(name)


def plan_training(options: Options, place: torch.device, channels: int, classes: int) -> tuple[dict[str, Any], Recipe]:
    """(architecture, recipe) of the preset for a device, with the user's values over it."""
    cuda = place.type == "cuda"
    architecture: dict[str, Any] = {"network": options.network, "in_channels": channels, "classes": classes}
    values: dict[str, Any]
    if options.preset == "paper":
        architecture |= {"width": 64, "depth": 4, "norm": "none", "dropout": 0.5}
        values = {"steps": 20000, "tile_px": 572, "batch": 1, "optimizer": "sgd", "learning_rate": 1e-3}
        values |= {"balance": 1.0, "clip_norm": 1.0, "validate_every": 0}
        if options.network == "UNet":
            architecture |= {"padding": "valid", "up": "transposed"}
    else:
        architecture |= {"width": 32 if cuda else 16, "depth": 4, "norm": "batch", "dropout": 0.2}
        values = {"steps": 4000, "batch": 8} if cuda else {"steps": 1000, "batch": 2}
        values |= {"tile_px": 256, "learning_rate": 2e-3, "balance": 0.5, "validate_every": 0}
        if options.network == "UNet":
            architecture |= {"padding": "same", "up": "transposed"}
    values["precision"] = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    values["augmentation"] = Augmentation() if options.augment else Augmentation.none()
    if unknown := set(options.recipe) - FIELDS:
        raise ContractError(f"a recipe has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(FIELDS))}")
    if options.recipe.get("minutes") is not None and "steps" not in options.recipe:
        values["steps"] = 0
    try:
        recipe = Recipe(**{**values, **options.recipe})
    except ValueError as error:
        raise ContractError(str(error)) from error
    if recipe.precision == "bf16" and not cuda:
        raise BackendError("mixed precision trains on CUDA devices only; use precision fp32 on a CPU")
    return architecture | options.architecture, recipe


def fitting_tile(network: Network, tile_px: int, samples: Sequence[Sample]) -> int:
    """A tile that the network accepts and that is not larger than the images ask for."""
    spec = network.spec
    margin = 2 * ((spec.size_at_least(1) - spec.out_size(spec.size_at_least(1))) // 2)
    typical = int(statistics.median(max(s.target.shape) for s in samples))
    return spec.size_at_least(min(tile_px, spec.size_at_least(typical + margin)))
