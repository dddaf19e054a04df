"""Train the networks that ship with the package: ``python benchmarks/ship_nuclei.py``.

``nuclei`` is the embedded default: same padding, small and fast. ``paper_w8`` has the paper's architecture at an eighth
of its width; widened by 8 (:func:`unet_rt.models.widen`) it is a trained network of the paper's size.

Both learn from drawn microscopy and, where ``--data`` names a folder with ``image/*.png`` and ``label/*.png`` (instance
ids), from its grey images with bright nuclei.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from ship_record import record_of, write_onnx, write_record

from unet_rt.contract.contract import Contract
from unet_rt.drawing.microscopy import microscopy
from unet_rt.drawing.scene import random_scene
from unet_rt.errors import ImageError
from unet_rt.models.stored import save_half
from unet_rt.models.unet import UNet, UNetSpec
from unet_rt.training.augment import Augmentation
from unet_rt.training.evaluate import evaluate
from unet_rt.training.metrics import iou
from unet_rt.training.options import NORMALIZATION
from unet_rt.training.samples import Sample, prepare
from unet_rt.training.trainer import Progress, Recipe, train
from unet_rt.training.weights import F32

SYNTHETIC_PX = 384
# Drawn microscopy is varied enough: flips, quarter turns and grey values.
PLAIN = Augmentation(turn="quarter", scale=0.0, elastic_px=0.0, gamma=0.0, offset=0.03)
# Seeds of drawn images; the ranges do not meet.
TRAINING_SEEDS, VALIDATION_SEEDS, TEST_SEEDS = range(1000, 1048), range(2000, 2006), range(3000, 3012)


@dataclass(frozen=True)
class Shipped:
    spec: UNetSpec
    recipe: Recipe


# What both are trained by.
DRAWN = Recipe(balance=0.25, w0=5.0, sigma_px=3.0, augmentation=PLAIN, seed=7)

NETWORKS = {
    "nuclei": Shipped(
        UNetSpec(width=12, depth=3, padding="same", norm="batch", dropout=0.0, up="bilinear"),
        replace(
            DRAWN,
            steps=1300,
            tile_px=160,
            batch=3,
            learning_rate=3e-3,
        ),
    ),
    "paper_w8": Shipped(
        UNetSpec(width=8, dropout=0.1),
        replace(
            DRAWN,
            steps=800,
            tile_px=380,
            batch=2,
            learning_rate=2e-3,
        ),
    ),
}


def drawn(seeds: Sequence[int], recipe: Recipe) -> list[Sample]:
    """One random scene per seed."""
    found = []
    for seed in seeds:
        m = microscopy((SYNTHETIC_PX, SYNTHETIC_PX), seed=seed, scene=random_scene(seed))
        found.append(prepare(f"drawn {seed}", m.image, m.truth, NORMALIZATION, w0=recipe.w0, sigma_px=recipe.sigma_px))
    return found


def real(folder: Path, recipe: Recipe) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """(training, validation, test) from a folder; colour images and dark objects on white are left out.

    Images of one size come from one experiment: of each size with at least three images the last one is for the test,
    of those with at least five the one before it for validation.
    """
    groups: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    paths = sorted((folder / "image").glob("*.png"))
    if not paths:
        raise ImageError(f"{folder} holds no image/*.png; give a folder with image/ and label/")
    for path in paths:
        with Image.open(path) as opened:
            pixels = np.asarray(opened)
        with Image.open(folder / "label" / path.name) as opened:
            labels = np.asarray(opened).astype(np.int32)
        if pixels.ndim == 3:
            if not (pixels[..., :3] == pixels[..., :1]).all():
                continue
            pixels = pixels[..., 0]
        if pixels[labels > 0].mean() < pixels[labels == 0].mean():
            continue
        groups[pixels.shape].append(
            prepare(path.stem, pixels, labels, NORMALIZATION, w0=recipe.w0, sigma_px=recipe.sigma_px)
        )
    training, validation, test = list[Sample](), list[Sample](), list[Sample]()
    for _, group in sorted(groups.items()):
        if len(group) >= 3:
            test.append(group.pop())
        if len(group) >= 4:
            validation.append(group.pop())
        training.extend(group)
    return training, validation, test


def otsu(image: F32) -> float:
    """The threshold that separates two grey values best: what one gets without a network."""
    counts, edges = np.histogram(np.clip(image, -0.5, 1.5), 512)
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    mean_below = np.cumsum(counts * middle) / np.maximum(below, 1)
    mean_above = ((counts * middle).sum() - np.cumsum(counts * middle)) / np.maximum(above, 1)
    return float(middle[np.argmax(below * above * (mean_below - mean_above) ** 2)])


def figures(network: UNet, samples: Sequence[Sample]) -> dict[str, Any]:
    """IoU of the network and of Otsu's threshold over samples."""
    if not samples:
        return {"images": 0}
    target = evaluate(network, samples)
    truth = evaluate(network, samples, against="truth")
    threshold = [iou(s.image[0] > otsu(s.image), s.truth > 0) for s in samples]
    return {
        "images": len(samples),
        "iou_mean": round(float(np.mean(target)), 4),
        "iou_worst": round(float(np.min(target)), 4),
        "iou_annotated_mean": round(float(np.mean(truth)), 4),
        "iou_annotated_worst": round(float(np.min(truth)), 4),
        "iou_annotated_mean_of_otsu_threshold": round(float(np.mean(threshold)), 4),
        "iou_annotated_each": {s.name: round(v, 4) for s, v in zip(samples, truth, strict=True)},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/ship_nuclei.py", description=__doc__.split("\n")[0])
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.onnx or NAME.npz, NAME.json, NAME.pt")
    parser.add_argument("--data", type=Path, help="folder with image/*.png and label/*.png (instance ids)")
    parser.add_argument("--steps", type=int, help="instead of the recipe's; the schedule is stretched")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    shipped = NETWORKS[given.network]
    recipe = shipped.recipe
    if given.steps:
        recipe = Recipe(**{**vars(recipe), "steps": given.steps})
    begin = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - begin:6.0f} s  {text}\n")

    training, validation, drawn_test = (drawn(s, recipe) for s in (TRAINING_SEEDS, VALIDATION_SEEDS, TEST_SEEDS))
    real_test: list[Sample] = []
    counts = {"drawn": {"training": len(training), "validation": len(validation), "test": len(drawn_test)}}
    if given.data is not None:
        more, held, real_test = real(given.data, recipe)
        counts["real"] = {"training": len(more), "validation": len(held), "test": len(real_test)}
        training, validation = training + more, validation + held
    say(f"images {counts}")

    torch.manual_seed(recipe.seed)
    network = UNet(shipped.spec)

    def report(p: Progress) -> None:
        say(f"step {p.step}/{recipe.steps} loss {p.loss:.4f} validation IoU {p.iou:.4f}{' best' if p.best else ''}")

    history = train(network, training, validation, recipe, report=report)
    seconds = time.monotonic() - begin
    contract = Contract(
        axes="NCYX",
        channels=("nuclei",),
        normalization=NORMALIZATION,
        task="multiclass",
        output_is="logits",
        classes=("background", "nucleus"),
        trained_tile=(recipe.tile_px, recipe.tile_px),
    )
    given.out.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/ship_nuclei.py {given.network}{' --data dsb2018' if given.data else ''} --out ."
    task = "nuclei (bright on dark, fluorescence) against background"
    record = record_of(given.network, task, command, network, contract, recipe, history, seconds) | {
        "data": {
            "counts": counts,
            "drawn": f"unet_rt.synthetic.random_scene, {SYNTHETIC_PX} x {SYNTHETIC_PX} px, seeds "
            f"{TRAINING_SEEDS.start}-{TRAINING_SEEDS.stop - 1} training, {VALIDATION_SEEDS.start}-"
            f"{VALIDATION_SEEDS.stop - 1} validation, {TEST_SEEDS.start}-{TEST_SEEDS.stop - 1} test",
            "real": "2018 Data Science Bowl stage 1 with corrected masks (CC0), grey images with bright nuclei; split "
            "by image within each image size: test images come from experiments that training saw too"
            if given.data
            else "none",
        },
        "figures": {
            "iou_mean": "mean over images of foreground IoU against the target (with lines between touching nuclei)",
            "iou_annotated": "the same against the annotated foreground, where those lines count as errors",
            "chosen_by": "best iou_mean over the validation images; the test images were used once, for these figures",
            "validation": {"iou_mean": round(max(p.iou for p in history), 4), "images": len(validation)},
            "test_drawn": figures(network, drawn_test),
            "test_real": figures(network, real_test),
        },
    }
    if shipped.spec.norm == "none":
        # Stored as float16: the figures are measured again on the rounded weights, which are what ships.
        save_half(given.out / f"{given.network}.npz", network)
        for tensor in network.state_dict().values():
            tensor.copy_(tensor.half().float())
        record["stored"] = "weights rounded to float16; figures measured with the rounded weights"
        record["figures"]["test_drawn"] = figures(network, drawn_test)
        record["figures"]["test_real"] = figures(network, real_test)
    else:
        sample = microscopy((512, 512), seed=1)
        pixels = prepare("export", sample.image, sample.truth, NORMALIZATION).image
        record["export"] = write_onnx(given.out / f"{given.network}.onnx", network, contract, pixels)
    write_record(given.out, network, contract, record)
    say(f"test IoU: drawn {record['figures']['test_drawn']}, real {record['figures']['test_real']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
