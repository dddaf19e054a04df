"""A training step against a bare loop of the same network: what augmentation, weights and book-keeping cost.

    python benchmarks/bench_train.py [--width 16] [--tile 256] [--batch 2] [--steps 12] [--threads 1]

Bare: forward, cross entropy, backward, Adam on one fixed batch. Recipe: :func:`unet_rt.training.train` with everything on
(elastic deformation, weight map, learning rate, losses collected), between two validations. Steps alternate in blocks, so
that a machine that grows slower does so for both; medians are compared. Also: the border weight map of 512 x 512 px.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import record
import torch

from unet_rt.drawing.microscopy import microscopy
from unet_rt.drawing.scene import Scene
from unet_rt.models.unet import UNet, UNetSpec
from unet_rt.training.augment import Augmentation, Tiles
from unet_rt.training.options import NORMALIZATION
from unet_rt.training.samples import prepare
from unet_rt.training.trainer import Recipe, train
from unet_rt.training.weights import border_weights


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=60)
    for name, value in (("width", 16), ("tile", 256), ("batch", 2), ("steps", 12), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(argv)
    if args.quick:
        args.width, args.tile, args.batch, args.steps = 4, 64, 1, 4
    torch.set_num_threads(args.threads)
    m = microscopy((128, 128) if args.quick else (512, 512), seed=1, scene=Scene(radius_px=11, cover=0.3))
    sample = prepare("drawn", m.image, m.truth, NORMALIZATION)
    bare, recipe = [], []
    for _ in range(1 if args.quick else 3):
        bare += bare_steps(args, sample)
        recipe += recipe_steps(args, sample)
    crowd = microscopy((512, 512), seed=1, scene=Scene(radius_px=18, cover=0.35)).truth  # a good hundred objects
    seconds = []
    for _ in range(1 if args.quick else 5):
        begun = time.perf_counter()
        border_weights(crowd)
        seconds.append(time.perf_counter() - begun)
    figures = {
        "settings": {name: getattr(args, name) for name in ("width", "tile", "batch", "steps", "threads")},
        "bare_ms": spread(bare),
        "recipe_ms": spread(recipe),
        "ratio": round(statistics.median(recipe) / statistics.median(bare), 3),
        "border_weights_ms": spread(seconds),
        "objects": len(np.unique(crowd)) - 1,
    }
    path = record.write("train", figures, args.out, quick=args.quick)
    print(path.read_text(encoding="utf-8"))
    return 0


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, fastest and slowest in milliseconds."""
    values = {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
    return {name: round(1e3 * value, 1) for name, value in values.items()}


def network_of(args: argparse.Namespace) -> UNet:
    torch.manual_seed(0)
    return UNet(UNetSpec(width=args.width, padding="same", norm="batch", dropout=0.2))


def bare_steps(args: argparse.Namespace, sample: object) -> list[float]:
    network = network_of(args).train()
    image, target, _ = Tiles([sample], args.tile, args.tile, Augmentation.none(), 0).draw(args.batch, 0)  # type: ignore[list-item]
    optimizer = torch.optim.Adam(network.parameters())
    times = []
    for _ in range(args.steps):
        begun = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(network(image), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - begun)
    return times[2:]


def recipe_steps(args: argparse.Namespace, sample: object) -> list[float]:
    stamps = []
    recipe = Recipe(steps=args.steps, tile_px=args.tile, batch=args.batch, validate_every=args.steps, freeze_norm=1.0)

    def stamp(share: float, step: int, loss: float) -> None:
        stamps.append(time.perf_counter())

    train(network_of(args), [sample], [sample], recipe, progress=stamp)  # type: ignore[list-item]
    return list(np.diff(stamps)[1:])


if __name__ == "__main__":
    raise SystemExit(main())
