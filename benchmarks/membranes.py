"""The paper's first table on the slices that are public: U-Net, FCN-8s and SegNet on cell membranes in EM.

    python benchmarks/membranes.py train --data isbi2012 --out runs --network UNet --width 64 --minutes 4
    python benchmarks/membranes.py report --data isbi2012 --out runs
    python benchmarks/membranes.py plot --data isbi2012 --out few

``--data`` holds ``image/*.png`` and ``label/*.png``: consecutive slices of the ISBI 2012 stack. Slices 00 to 17 are
trained on, 18 to 20 choose the best weights, 21 to 23 are reported on: blocks, because neighbours look alike. ``train``
writes a checkpoint, the curves and the probabilities of the tuning and test slices. ``report`` makes table and picture of
whatever was trained, on any machine (scikit-image scores Rand errors); ``plot`` those of networks that saw different
numbers of slices. Both write records, from which ``tables.py`` draws what docs/explanation/membranes.md shows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import record

from unet_rt.training.trainer import Progress

NETWORKS = ("UNet", "FCN8s", "SegNet")
TRAINING, TUNING, TEST = slice(0, 18), slice(18, 21), slice(21, 24)
PAPER = {"warping error": 0.000353, "Rand error": 0.0382, "pixel error": 0.0611}  # its table 1, hidden test slices
BAND_PX = 2.0  # nearer to a border of the truth than this is "near"
SHOWN_FROM_PX, SHOWN_PX = 128, 240  # of the first test slice


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("verb", choices=("train", "report", "plot"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="of the run; default: told by its options")
    parser.add_argument("--network", choices=NETWORKS, default="UNet")
    parser.add_argument("--preset", choices=("default", "paper"), default="paper")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--norm", choices=("batch", "none"))
    parser.add_argument("--slices", type=int, default=18, help="slices trained on, the last ones of 00 to 17")
    parser.add_argument("--no-augment", action="store_true")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tile", type=int, help="input size; default 572 unpadded, 384 padded")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--validate-every", type=int, help="steps; default: twenty times in all")
    parser.add_argument("--optimizer", choices=("adam", "sgd"))
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--balance", type=float)
    parser.add_argument("--w0", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--record", type=Path, help="of report and plot; default: benchmarks/results/")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.verb == "train":
        train_one(args)
    elif args.verb == "report":
        report(args)
    else:
        plot(args)
    return 0


def train_one(args: argparse.Namespace) -> None:
    import torch
    from ship_membranes import CONTRACT

    from unet_rt.models.architecture import network_of
    from unet_rt.models.checkpoint import save_checkpoint
    from unet_rt.training.curves import training_curves
    from unet_rt.training.folder import read_data
    from unet_rt.training.options import NORMALIZATION, Options, device_of, fitting_tile, plan_training
    from unet_rt.training.trainer import train

    torch.set_num_threads(args.threads)
    place = device_of(args.device)
    recipe_values: dict[str, Any] = {
        key: value
        for key in (
            "minutes",
            "steps",
            "batch",
            "optimizer",
            "learning_rate",
            "balance",
            "w0",
            "seed",
            "validate_every",
        )
        if (value := getattr(args, key)) is not None
    }
    padded = args.network != "UNet" or args.preset == "default"
    recipe_values["tile_px"] = args.tile or (384 if padded else 572)
    architecture: dict[str, Any] = {"width": args.width}
    if args.norm:
        architecture["norm"] = args.norm
    options = Options(args.preset, args.network, architecture, recipe_values, augment=not args.no_augment)
    architecture, recipe = plan_training(options, place, 1, 2)
    w0 = recipe.w0 if args.preset == "paper" or args.w0 is not None else 0.0
    data = read_data(args.data, NORMALIZATION, w0=w0)
    if len(data.samples) != 24:
        sys.exit(f"{args.data} holds {len(data.samples)} slices, the split is of 24")
    training, tuning, test = (list(data.samples[part]) for part in (TRAINING, TUNING, TEST))
    training = training[-args.slices :]
    torch.manual_seed(recipe.seed)
    network = network_of(architecture)
    recipe = replace(recipe, w0=w0, tile_px=fitting_tile(network, recipe.tile_px, training))
    name = args.name or (
        f"{args.network}-w{args.width}-{args.preset}-{len(training)}{'-plain' if args.no_augment else ''}"
    )
    out = args.out / f"{name}.pt"
    contract = replace(CONTRACT, trained_tile=(recipe.tile_px, recipe.tile_px))
    document: dict[str, Any] = {
        "network": architecture,
        "parameters": sum(p.numel() for p in network.parameters()),
        "recipe": recipe.to_json(),
        "training": [s.name for s in training],
        "tuning": [s.name for s in tuning],
        "test": [s.name for s in test],
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {args.threads} threads",
        "torch": torch.__version__,
    }
    print(f"{name}: {document['parameters']:,} parameters on {document['device']}; {recipe}", flush=True)
    history: list[Progress] = []

    def keep(now: Progress) -> None:
        history.append(now)
        mark = ", best" if now.best else ""
        print(
            f"{now.seconds:6.0f} s  step {now.step} ({now.share:.0%})  loss {now.loss:.4f}  IoU {now.iou:.4f}{mark}",
            flush=True,
        )
        training_curves(history, out.with_suffix(".png"))
        if now.best:
            save_checkpoint(out, network, contract, document)

    begun = time.monotonic()
    state = out.with_suffix(".state.pt")
    train(network, training, tuning, recipe, device=place, state=state, resume=args.resume, report=keep)
    document["seconds"] = round(time.monotonic() - begun, 1)
    document["steps"] = history[-1].step
    document["tuning_iou"] = round(max(p.iou for p in history), 5)
    document["history"] = [[p.step, round(p.loss, 5), round(p.iou, 5), round(p.seconds, 1)] for p in history]
    save_checkpoint(out, network, contract, document)
    shown = {s.name: _probability(network, s.image) for s in (*tuning, *test)}
    np.savez_compressed(args.out / f"{name}.npz", **{k: v.astype(np.float16) for k, v in shown.items()})
    (args.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if place.type == "cuda" else ""
    print(f"{name}: {document['steps']} steps in {document['seconds']} s{peak}; tuning IoU {document['tuning_iou']}")


def _probability(network: Any, image: Any) -> Any:
    """Of being inside a cell: mean over the eight flips and turns of the slice, as the paper's test averaged seven."""
    from unet_rt.training.evaluate import predict_whole

    total = np.zeros(image.shape[1:], np.float64)
    for quarter in range(4):
        for flip in (False, True):
            turned = np.rot90(image, quarter, (1, 2))
            turned = turned[..., ::-1] if flip else turned
            logits = predict_whole(network, np.ascontiguousarray(turned)).astype(np.float64)
            probability = 1 / (1 + np.exp(logits[0] - logits[1]))
            probability = probability[:, ::-1] if flip else probability
            total += np.rot90(probability, -quarter)
    return total / 8


def figures(probability: Any, truth: Any) -> dict[str, float]:
    """Of one slice: probability of being inside a cell, and the truth, both (Y, X)."""
    from unet_rt.training.metrics import dice, iou, pixel_error, rand_error, warping_error

    mask = probability > 0.5
    near = border_band(truth)
    return {
        "IoU": iou(mask, truth),
        "membrane IoU": iou(~mask, ~truth),
        "membrane Dice": dice(~mask, ~truth),
        "pixel error": pixel_error(mask, truth),
        "pixel error near": pixel_error(mask[near], truth[near]),
        "pixel error far": pixel_error(mask[~near], truth[~near]),
        "unsure": float(np.mean((probability > 0.1) & (probability < 0.9))),
        "Rand error": rand_error(mask, truth),
        "warping error": warping_error(mask, truth),
    }


def border_band(truth: Any, reach_px: float = BAND_PX) -> Any:
    """Pixels within ``reach_px`` of a border of the truth, the trimap of Kohli et al. (2009): where edges are judged."""
    from scipy.ndimage import distance_transform_edt

    # The distance to the nearest pixel of the other class is 1 at a border.
    return np.where(truth, distance_transform_edt(truth), distance_transform_edt(~truth)) <= reach_px


def _read(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture)


def _mean(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([f[key] for f in found])), 6) for key in found[0]}


@dataclass(frozen=True)
class Run:
    """A training of the folder ``--out``: its record, and probability and truth of the slices by name."""

    name: str
    record: dict[str, Any]
    probability: dict[str, Any]
    truth: dict[str, Any]

    def mean(self, names: Sequence[str]) -> dict[str, float]:
        return _mean([figures(self.probability[n], self.truth[n]) for n in names])

    def everything_cell(self) -> dict[str, float]:
        """What "cell everywhere" would score, which finds no membrane."""
        return _mean([figures(np.ones(t.shape), t) for t in (self.truth[n] for n in self.record["test"])])

    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        recipe, network = self.record["recipe"], self.record["network"]
        keys = ("batch", "tile_px", "optimizer", "learning_rate", "balance", "seed")
        return {
            "name": self.name,
            "network": network["network"],
            "width": network["width"],
            "parameters": self.record["parameters"],
            "training_slices": len(self.record["training"]),
            "augmented": recipe["augmentation"]["elastic_px"] > 0,
            "steps": self.record["steps"],
            **{key: recipe[key] for key in keys},
            "best_step": max(self.record["history"], key=lambda row: row[2])[0],
            "tuning_iou": self.record["tuning_iou"],
            "trained_on": {"device": self.record["device"], "torch": self.record["torch"]},
        }


def runs(out: Path, data: Path) -> list[Run]:
    found = []
    for path in sorted(out.glob("*.npz")):
        with np.load(path) as stored:
            probability = {n: stored[n].astype(np.float32) for n in stored.files}
        truth = {n: _read(data / "label" / n) > 0 for n in probability}
        found.append(Run(path.stem, json.loads(path.with_suffix(".json").read_text()), probability, truth))
    if not found:
        sys.exit(f"{out} holds no run; train one first")
    return found


def best_threshold(run: Run) -> float:
    """The probability above which a pixel is cell that gives the lowest Rand error on the tuning slices."""
    from unet_rt.training.metrics import rand_error

    choices = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    errors = [
        np.mean([rand_error(run.probability[n] > t, run.truth[n]) for n in run.record["tuning"]]) for t in choices
    ]
    return choices[int(np.argmin(errors))]


def report(args: argparse.Namespace) -> None:
    """Table and picture of the networks in ``--out``."""
    from unet_rt.outputs.pictures import comparison
    from unet_rt.training.metrics import rand_error, warping_error

    found = sorted(
        runs(args.out, args.data), key=lambda run: (NETWORKS.index(run.record["network"]["network"]), run.name)
    )
    rows = []
    for run in found:
        test = run.record["test"]
        row = {**run.settings(), "figures": run.mean(test)}
        # The challenge scored the best threshold of each submission; here the tuning slices choose it.
        threshold = best_threshold(run)
        tuned = [(run.probability[n] > threshold, run.truth[n]) for n in test]
        row["at_threshold"] = {
            "threshold": threshold,
            "Rand error": round(float(np.mean([rand_error(m, t) for m, t in tuned])), 6),
            "warping error": round(float(np.mean([warping_error(m, t) for m, t in tuned])), 6),
        }
        rows.append(row)
    first = found[0].record["test"][0]
    truth = found[0].truth[first]
    panels = []  # of what the networks say; the slice itself is the challenge's to show
    for run, row in zip(found, rows, strict=True):
        if row["seed"] == rows[0]["seed"]:
            probability = run.probability[first]
            wrong = _shade(truth != (probability > 0.5))
            panels.append((f"{row['network']}: probability; below: wrong", _stacked(_shade(probability), wrong)))
    path = record.write(
        "membranes",
        {
            "slices": {key: found[0].record[key] for key in ("training", "tuning", "test")},
            "figures_are": "means over the test slices, of the mask of probability above one half",
            "band_px": BAND_PX,
            "rows": rows,
            "all_cell": found[0].everything_cell(),
            "paper_other_hidden_slices": PAPER,
        },
        args.record,
    )
    comparison(panels, path.with_suffix(".png"))
    print(path.read_text())


def plot(args: argparse.Namespace) -> None:
    """Figures of the test slices against the number of training slices, with and without augmentation."""
    found = sorted(runs(args.out, args.data), key=lambda run: (len(run.record["training"]), run.name))
    rows = [{**run.settings(), "figures": run.mean(run.record["test"])} for run in found]
    figures_ = {"rows": rows, "all_cell": found[0].everything_cell()}
    print(record.write("membranes-slices", figures_, args.record).read_text())


def _stacked(above: Any, below: Any) -> Any:
    """The shown part of two pictures (Y, X, 3), one above the other."""
    part = slice(SHOWN_FROM_PX, SHOWN_FROM_PX + SHOWN_PX)
    gap = np.full((8, SHOWN_PX, 3), 255, np.uint8)
    return np.vstack([above[part, part], gap, below[part, part]])


def _shade(values: Any) -> Any:
    """(Y, X) from 0 to 1 as grey."""
    return np.repeat((values * 255).astype(np.uint8)[..., None], 3, axis=2)


if __name__ == "__main__":
    raise SystemExit(main())
