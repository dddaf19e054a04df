"""The trainer: weighted cross entropy, the paper's SGD or Adam, best weights by validation IoU, seeded and resumable."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from ..models.architecture import Network, architecture_of
from ..models.checkpoint import TrainingError, read_torch, write_torch
from ..models.segnet import SegNet
from ..system.json import Record, to_json
from .augment import Augmentation, Tiles
from .evaluate import evaluate, foreground_is_common
from .samples import Sample
from .weights import class_weights

STATE_FORMAT = 1
STATE_SECONDS = 60.0  # a kill costs at most so much work


@dataclass(frozen=True)
class Recipe(Record):
    """How to train; with a seed, all that the result depends on beside data and machine.

    Attributes:
        steps: Parameter updates; 0: as many as fit into ``minutes``.
        minutes: Training stops after that time, its learning rate having fallen to nothing. The result then depends on
            the speed of the machine.
        tile_px: Input size of a training tile (the network must accept it).
        batch: Tiles per step.
        optimizer: ``adam``, or ``sgd``: the paper's, momentum 0.99.
        learning_rate: At the start; it falls to nothing along a cosine, after a short warm-up.
        clip_norm: Longest gradient; longer ones are shortened to it. 0: none is.
        balance: Exponent of the class weights; 1 gives each class the same say (the paper's), 0 each pixel.
        w0, sigma_px: The border term of the weight map (already in the samples; kept for the record).
        augmentation: Random changes of a tile.
        freeze_norm: Share of training after which BatchNorm keeps its statistics. Until then they follow the tiles of a
            batch; from then on the network learns with the numbers that it will be used with. Without that, validation
            on few tiles of unlike images jumps.
        validate_every: Steps between validations; 0: twenty times in all.
        precision: ``fp32``, or ``bf16``: mixed precision, on CUDA devices.
        seed: Of initial weights, tiles, augmentation and dropout.
    """

    steps: int = 2000
    minutes: float | None = None
    tile_px: int = 256
    batch: int = 4
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 3e-3
    clip_norm: float = 0.0
    balance: float = 1.0
    w0: float = 10.0
    sigma_px: float = 5.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    freeze_norm: float = 0.5
    validate_every: int = 250
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 and self.minutes is None:
            raise ValueError(f"recipe has {self.steps} steps; use 1 or more, or minutes")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"recipe has {self.minutes} minutes; use more than 0")
        for name, least in (("tile_px", 1), ("batch", 1), ("validate_every", 0), ("steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"recipe {name} is {getattr(self, name)}; use {least} or more")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning rate is {self.learning_rate}; use more than 0, e.g. 1e-3")


@dataclass(frozen=True)
class Progress:
    """State after a validation: step, mean training loss since the last one, mean IoU over validation images.

    ``seconds`` are those of training so far, ``share`` is how much of it is done.
    """

    step: int
    loss: float
    iou: float
    best: bool
    seconds: float = 0.0
    share: float = 1.0


def train(
    network: Network,
    training: Sequence[Sample],
    validation: Sequence[Sample],
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    state: str | os.PathLike[str] | None = None,
    resume: bool = False,
    report: Callable[[Progress], None] | None = None,
    progress: Callable[[float, int, float], None] | None = None,
) -> list[Progress]:
    """Train ``network`` in place and leave it, in evaluation mode, with the weights of the best validation IoU.

    That is the mean over images of the IoU of the foreground (of several classes their mean), together with that of the
    background if :func:`foreground_is_common`.

    The initial weights are the network's own: seed torch before making it. On a CPU, the same seed gives the same
    weights, also if training was interrupted in between; on a CUDA device they agree to rounding.

    Args:
        network: Moved to ``device``.
        training, validation: From :func:`split_by_blocks`, say.
        recipe: How.
        device: ``cpu`` or ``cuda:N``.
        state: File that holds all that is needed to go on after a kill; replaced after each validation and every
            minute, removed at the end.
        resume: Go on from ``state``.
        report: Called after each validation, when the network holds the current weights.
        progress: Called after each step with the share of work that is done, the step and the last known loss.

    Raises:
        TrainingError: the network is not one for images; the loss became NaN or infinite (the network then holds the
            best weights so far), or ``state`` is of another training.
        OutputError: ``state`` cannot be written.
    """
    spec = network.spec
    if spec.dims != 2:
        raise TrainingError(
            f"the network has {spec.dims} spatial axes, and tiles are cut from images of 2; use dims=2 (stacks are trained "
            "on plane by plane), or train a volume's network by a loop of your own"
        )
    place = torch.device(device)
    layout = _place(network, place)
    tiles = Tiles(training, recipe.tile_px, spec.out_size(recipe.tile_px), recipe.augmentation, recipe.seed, place)
    common = foreground_is_common(training)
    share = torch.from_numpy(class_weights([s.target for s in training], spec.classes, balance=recipe.balance))
    run = _Run(network, _optimizer(network, recipe), recipe)
    if resume and state is not None:
        run.load(Path(state))
    share = share.to(place)
    clock = _Clock(run.seconds)
    last_saved = clock.seconds()
    try:
        finished = _done(recipe, run.step, run.seconds)
        # Time that passes while validating ends nothing: the last step is always validated.
        while finished < 1:
            done = finished
            network.train()
            run.step += 1
            _set_norms(network, run.step, frozen=done >= recipe.freeze_norm)
            for group in run.optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(_done(recipe, run.step, clock.seconds()))
            image, target, border = tiles.draw(recipe.batch, run.step)
            # Dropout draws from torch's own generators: one seed per step lets training go on anywhere.
            torch.manual_seed((recipe.seed << 32) + run.step)
            with _rounding(recipe, place):
                logits = network(image.contiguous(memory_format=layout))
            loss = weighted_cross_entropy(logits.float(), target, share[target] + border)
            run.differentiate(loss)
            # Asking a CUDA device for each loss would have it wait for the next step: there, ask every 20.
            run.pending.append(loss.detach())
            finished = _done(recipe, run.step, clock.seconds())
            due = _due(recipe, run.step, done, finished)
            if place.type != "cuda" or len(run.pending) >= 20 or due:
                run.collect()
            run.optimizer.step()
            if progress is not None:
                progress(finished, run.step, run.losses[-1] if run.losses else math.nan)
            if due:
                iou = float(np.mean(evaluate(network, validation, background=common)))
                run.validated(iou, clock.seconds(), finished)
                if report is not None:
                    report(run.history[-1])
            run.seconds = clock.seconds()
            if state is not None and finished < 1 and (due or run.seconds - last_saved > STATE_SECONDS):
                run.collect()
                run.save(Path(state))
                last_saved = run.seconds
    finally:
        network.load_state_dict(run.best)
        network.eval()
    if state is not None:
        Path(state).unlink(missing_ok=True)
    return run.history


def _place(network: Network, place: torch.device) -> torch.memory_format:
    """Moves the network to its device; the memory format of its tensors there."""
    network.to(place)
    # Tensor cores want channels last; max-unpooling is not fast in it.
    layout = (
        torch.channels_last if place.type == "cuda" and not isinstance(network, SegNet) else torch.contiguous_format
    )
    network.to(memory_format=layout)  # type: ignore[call-overload] # stubs miss it
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    return layout


def _rounding(recipe: Recipe, place: torch.device) -> contextlib.AbstractContextManager[Any]:
    if recipe.precision == "bf16":
        return torch.autocast(place.type, torch.bfloat16)
    return contextlib.nullcontext()


def _set_norms(network: Network, step: int, *, frozen: bool) -> None:
    """BatchNorm's running statistics: those of about 50 steps, of all of them at the beginning; or kept."""
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = max(0.02, 1 / step)
            if frozen:
                module.eval()


class _Clock:
    """Seconds of training, those of earlier runs included."""

    def __init__(self, before: float) -> None:
        self._begun = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._begun


class _Run:
    """All that changes while training: what is saved to go on after a kill."""

    def __init__(self, network: Network, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self.network, self.optimizer, self.recipe = network, optimizer, recipe
        self.step, self.seconds, self.best_iou = 0, 0.0, -1.0
        self.losses: list[float] = []
        self.pending: list[torch.Tensor] = []
        self.history: list[Progress] = []
        self.best: dict[str, torch.Tensor] = copy.deepcopy(network.state_dict())

    def differentiate(self, loss: torch.Tensor) -> None:
        """Takes the gradients of a loss, cut to the recipe's norm."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)

    def collect(self) -> None:
        """Losses of the last steps as numbers. TrainingError if one is not finite."""
        if not self.pending:
            return
        values = torch.stack(self.pending).tolist()
        first = self.step - len(values) + 1
        self.pending.clear()
        for k, value in enumerate(values):
            if not math.isfinite(value):
                kept = f"; the best weights so far (validation IoU {self.best_iou:.3f}) are kept"
                raise TrainingError(
                    f"loss is {value} at step {first + k}"
                    f"{kept if self.best_iou >= 0 else ', before the first validation, so that there is nothing to keep'}. "
                    f"Lower the learning rate from {self.recipe.learning_rate:g}, or look at the normalisation"
                )
        self.losses += values

    def validated(self, iou: float, seconds: float, share: float) -> None:
        better = iou > self.best_iou
        self.history.append(Progress(self.step, float(np.mean(self.losses)), iou, better, seconds, min(share, 1.0)))
        self.losses.clear()
        if better:
            self.best_iou, self.best = iou, copy.deepcopy(self.network.state_dict())

    def save(self, path: Path) -> None:
        content = {
            "format": STATE_FORMAT,
            "recipe": json.dumps(self.recipe.to_json()),
            "architecture": architecture_of(self.network),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "numbers": [self.step, self.seconds, self.best_iou],
            "losses": self.losses,
            "history": json.dumps(to_json(self.history)),
        }
        write_torch(path, content)

    def load(self, path: Path) -> None:
        content = read_torch(path)
        if content.get("format") != STATE_FORMAT or "optimizer" not in content:
            raise TrainingError(f"{path} is not the state of a training; train anew without resuming")
        then, now = json.loads(content["recipe"]), json.loads(json.dumps(self.recipe.to_json()))
        then["architecture"], now["architecture"] = content["architecture"], architecture_of(self.network)
        other = [f"{k} was {then.get(k)} and is {now[k]}" for k in now if then.get(k) != now[k]]
        if other:
            raise TrainingError(f"{path} is of another training: {'; '.join(other)}; repeat its options, or train anew")
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.best = content["best"]
        self.step, self.seconds, self.best_iou = int(content["numbers"][0]), *map(float, content["numbers"][1:])
        self.losses = list(content["losses"])
        self.history = [Progress(**p) for p in json.loads(content["history"])]


def _done(recipe: Recipe, step: int, seconds: float) -> float:
    """Share of the work that is done, by steps or by time, whichever is further."""
    by_steps = step / recipe.steps if recipe.steps else 0.0
    by_time = seconds / (60 * recipe.minutes) if recipe.minutes is not None else 0.0
    return max(by_steps, by_time)


def _due(recipe: Recipe, step: int, before: float, after: float) -> bool:
    """Whether to validate after ``step``, which took the share of work done from ``before`` to ``after``."""
    if after >= 1:
        return True
    if recipe.validate_every:
        return step % recipe.validate_every == 0
    return int(20 * after) > int(20 * before)


def weighted_cross_entropy(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over pixels of ``weight`` times the cross entropy, divided by the mean weight.

    logits (N, K, *S), target (N, *S) int64, weight (N, *S).
    """
    each = functional.cross_entropy(logits, target, reduction="none")
    return (weight * each).sum() / weight.sum()


def _schedule(done: float) -> float:
    """Warm-up over the first 3 %, then half a cosine."""
    warm = 0.03
    return done / warm if done < warm else 0.5 * (1 + math.cos(math.pi * (min(done, 1.0) - warm) / (1 - warm)))


def _optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    parameters: Iterator[torch.nn.Parameter] = network.parameters()
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.learning_rate)
    return torch.optim.SGD(parameters, lr=recipe.learning_rate, momentum=0.99)
