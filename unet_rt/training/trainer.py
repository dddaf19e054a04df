"""A minimal trainer: weighted cross entropy, Adam or the paper's SGD, best weights by validation IoU, seeded."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from unet_rt.contract import Contract
from unet_rt.errors import UnetRtError
from unet_rt.models import UNet, UNetSpec

from .samples import Augmentation, Sample, Tiles, padded
from .weights import F32, class_weights

CHECKPOINT_FORMAT = 1


class TrainingError(UnetRtError):
    """Training cannot go on: the loss is not finite, or a checkpoint cannot be read."""


@dataclass(frozen=True)
class Recipe:
    """How to train; with a seed, all that the result depends on beside data and machine.

    Attributes:
        steps: Parameter updates.
        tile_px: Input size of a training tile (the network must accept it).
        batch: Tiles per step.
        optimizer: ``adam``, or ``sgd``: the paper's, momentum 0.99.
        learning_rate: At the start; it falls to nothing along a cosine, after a short warm-up.
        balance: Exponent of the class weights; 1 gives each class the same say (the paper's), 0 each pixel.
        w0, sigma_px: The border term of the weight map (already in the samples; kept for the record).
        augmentation: Random changes of a tile.
        validate_every: Steps between validations.
        seed: Of initial weights, tiles, augmentation and dropout.
    """

    steps: int = 2000
    tile_px: int = 256
    batch: int = 4
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 3e-3
    balance: float = 1.0
    w0: float = 10.0
    sigma_px: float = 5.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    validate_every: int = 250
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """State after a validation: step, mean training loss since the last one, mean IoU over validation images."""

    step: int
    loss: float
    iou: float
    best: bool


def train(
    network: UNet,
    training: Sequence[Sample],
    validation: Sequence[Sample],
    recipe: Recipe,
    *,
    report: Callable[[Progress], None] | None = None,
) -> list[Progress]:
    """Train ``network`` in place and leave it, in evaluation mode, with the weights of the best validation IoU.

    The initial weights are the network's own: seed torch before making it.

    Raises:
        TrainingError: the loss became NaN or infinite. The network then holds the best weights so far.
    """
    rng = np.random.default_rng(recipe.seed)
    torch.manual_seed(recipe.seed)
    tiles = Tiles(training, recipe.tile_px, network.spec.out_size(recipe.tile_px), recipe.augmentation, rng)
    share = torch.from_numpy(class_weights([s.target for s in training], network.spec.classes, balance=recipe.balance))
    optimizer = _optimizer(network, recipe)
    history: list[Progress] = []
    best: dict[str, torch.Tensor] = copy.deepcopy(network.state_dict())
    best_iou, losses = -1.0, list[float]()
    try:
        for step in range(1, recipe.steps + 1):
            network.train()
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step / recipe.steps)
            image, target, border = map(torch.from_numpy, tiles.draw(recipe.batch))
            loss = weighted_cross_entropy(network(image), target, share[target] + border)
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"loss is {loss.item()} at step {step}; the best weights so far (validation IoU {best_iou:.3f}) "
                    f"are kept. Lower the learning rate from {recipe.learning_rate:g}, or look at the normalisation"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            if step % recipe.validate_every == 0 or step == recipe.steps:
                iou = float(np.mean(evaluate(network, validation)))
                history.append(Progress(step, float(np.mean(losses)), iou, iou > best_iou))
                losses.clear()
                if iou > best_iou:
                    best_iou, best = iou, copy.deepcopy(network.state_dict())
                if report is not None:
                    report(history[-1])
    finally:
        network.load_state_dict(best)
        network.eval()
    return history


def weighted_cross_entropy(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over pixels of ``weight`` times the cross entropy, divided by the mean weight.

    logits (N, K, *S), target (N, *S) int64, weight (N, *S).
    """
    each = functional.cross_entropy(logits, target, reduction="none")
    return (weight * each).sum() / weight.sum()


def predict_whole(network: UNet, image: F32) -> F32:
    """Logits (K, Y, X) of a normalised image (C, Y, X), computed at once with mirrored borders."""
    spec = network.spec
    shape = image.shape[1:]
    margin = 0
    if spec.padding == "valid":
        size = spec.size_at_least(1)
        margin = (size - spec.out_size(size)) // 2
    wanted = [spec.size_at_least(n + 2 * margin) for n in shape]
    grown = padded(image, margin, [w - n - margin for w, n in zip(wanted, shape, strict=True)])
    with torch.no_grad():
        logits: F32 = network(torch.from_numpy(grown[None]))[0].numpy()
    return logits[:, : shape[0], : shape[1]]


def evaluate(
    network: UNet, samples: Sequence[Sample], *, against: Literal["target", "truth"] = "target"
) -> list[float]:
    """Foreground IoU of every sample.

    ``target`` has background lines between touching objects, as the network was asked to draw them; ``truth`` is the
    annotated foreground, where each such line counts as an error.
    """
    was_training = network.training
    network.eval()
    found = [iou(predict_whole(network, s.image).argmax(0) > 0, getattr(s, against) > 0) for s in samples]
    network.train(was_training)
    return found


def iou(mask: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """Intersection over union; 1 where both are empty."""
    union = int((mask | truth).sum())
    return int((mask & truth).sum()) / union if union else 1.0


def save_checkpoint(
    path: str | os.PathLike[str], network: UNet, contract: Contract, record: dict[str, Any] | None = None
) -> None:
    """Architecture, weights, contract and a record, loadable with ``weights_only``. Written whole or not at all."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "architecture": network.spec.to_json(),
        "state": network.state_dict(),
        "contract": json.dumps(contract.to_json()),
        "record": json.dumps(record or {}),
    }
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[UNet, Contract, dict[str, Any]]:
    """Network (evaluation mode), contract and record of :func:`save_checkpoint`. Nothing in it is executed."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or "format" not in content or "architecture" not in content:
        raise TrainingError(f"{path} is not a checkpoint of unet-rt; export other modules from Python: urt.export(...)")
    if content["format"] > CHECKPOINT_FORMAT:
        raise TrainingError(
            f"{path} has checkpoint format {content['format']}, this version reads {CHECKPOINT_FORMAT}; update unet-rt"
        )
    network = UNet.from_spec(UNetSpec(**content["architecture"]))
    network.load_state_dict(content["state"])
    return network.eval(), Contract.from_json(json.loads(content["contract"])), json.loads(content["record"])


def _schedule(done: float) -> float:
    """Warm-up over the first 3 %, then half a cosine."""
    warm = 0.03
    return done / warm if done < warm else 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))


def _optimizer(network: UNet, recipe: Recipe) -> torch.optim.Optimizer:
    parameters: Iterator[torch.nn.Parameter] = network.parameters()
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.learning_rate)
    return torch.optim.SGD(parameters, lr=recipe.learning_rate, momentum=0.99)
