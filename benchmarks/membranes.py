"""The paper's first table on the slices that are public: U-Net, FCN-8s and SegNet on cell membranes in EM.

    python benchmarks/membranes.py train --data isbi2012 --out runs --network UNet --width 64 --minutes 4
    python benchmarks/membranes.py report --data isbi2012 --out runs

``--data`` holds ``image/*.png`` and ``label/*.png``: consecutive slices of the ISBI 2012 stack. Slices 00 to 17 are
trained on, 18 to 20 choose the best weights, 21 to 23 are reported on: blocks, because neighbours look alike. ``train``
writes a checkpoint, the curves and the probabilities of the test slices; ``report`` makes table and pictures from
whatever was trained, on any machine (scikit-image scores Rand errors).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unet_rt.training.trainer import Progress

TRAINING, TUNING, TEST = slice(0, 18), slice(18, 21), slice(21, 24)
PAPER = {"warping error": 0.000353, "Rand error": 0.0382, "pixel error": 0.0611}  # its table 1, hidden test slices


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("verb", choices=("train", "report", "plot"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="of the run; default: told by its options")
    parser.add_argument("--network", choices=("UNet", "FCN8s", "SegNet"), default="UNet")
    parser.add_argument("--preset", choices=("default", "paper"), default="paper")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--norm", choices=("batch", "none"))
    parser.add_argument("--slices", type=int, default=18, help="slices trained on, the last ones of 00 to 17")
    parser.add_argument("--no-augment", action="store_true")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tile", type=int, help="input size; default 572 unpadded, 384 padded")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--optimizer", choices=("adam", "sgd"))
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--balance", type=float)
    parser.add_argument("--w0", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
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

    from unet_rt.contract import Contract
    from unet_rt.models import network_of
    from unet_rt.training import save_checkpoint, train
    from unet_rt.training.curves import training_curves
    from unet_rt.training.fit import NORMALIZATION, Options, device_of, fitting_tile, planned
    from unet_rt.training.folder import read_folder

    torch.set_num_threads(args.threads)
    place = device_of(args.device)
    recipe_values: dict[str, Any] = {
        key: value
        for key in ("minutes", "steps", "batch", "optimizer", "learning_rate", "balance", "w0", "seed")
        if (value := getattr(args, key)) is not None
    }
    padded = args.network != "UNet" or args.preset == "default"
    recipe_values["tile_px"] = args.tile or (384 if padded else 572)
    architecture: dict[str, Any] = {"width": args.width}
    if args.norm:
        architecture["norm"] = args.norm
    options = Options(args.preset, args.network, architecture, recipe_values, augment=not args.no_augment)
    architecture, recipe = planned(options, place, 1, 2)
    w0 = recipe.w0 if args.preset == "paper" or args.w0 is not None else 0.0
    data = read_folder(args.data, NORMALIZATION, w0=w0)
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
    contract = Contract(
        axes="NCYX",
        channels=("electron microscopy",),
        normalization=NORMALIZATION,
        task="multiclass",
        output_is="logits",
        classes=("membrane", "cell"),
        trained_tile=(recipe.tile_px, recipe.tile_px),
        border="mirror",
    )
    record: dict[str, Any] = {
        "network": architecture,
        "parameters": sum(p.numel() for p in network.parameters()),
        "recipe": recipe.to_json(),
        "training": [s.name for s in training],
        "tuning": [s.name for s in tuning],
        "test": [s.name for s in test],
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {args.threads} threads",
        "torch": torch.__version__,
    }
    print(f"{name}: {record['parameters']:,} parameters on {record['device']}; {recipe}", flush=True)
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
            save_checkpoint(out, network, contract, record)

    begun = time.monotonic()
    state = out.with_suffix(".state.pt")
    train(network, training, tuning, recipe, device=place, state=state, resume=args.resume, report=keep)
    record["seconds"] = round(time.monotonic() - begun, 1)
    record["steps"] = history[-1].step
    record["tuning_iou"] = round(max(p.iou for p in history), 5)
    record["history"] = [[p.step, round(p.loss, 5), round(p.iou, 5), round(p.seconds, 1)] for p in history]
    save_checkpoint(out, network, contract, record)
    shown = {s.name: _probability(network, s.image) for s in (*tuning, *test)}
    np.savez_compressed(args.out / f"{name}.npz", **{k: v.astype(np.float16) for k, v in shown.items()})
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if place.type == "cuda" else ""
    print(f"{name}: {record['steps']} steps in {record['seconds']} s{peak}; tuning IoU {record['tuning_iou']}")


def _probability(network: Any, image: Any) -> Any:
    """Of being inside a cell: mean over the eight flips and turns of the slice, as the paper's test averaged seven."""
    from unet_rt.training import predict_whole

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
    """Of one slice."""
    from unet_rt.training import iou
    from unet_rt.training.metrics import dice, pixel_error, rand_error, warping_error

    mask = probability > 0.5
    return {
        "IoU": iou(mask, truth),
        "membrane IoU": iou(~mask, ~truth),
        "membrane Dice": dice(~mask, ~truth),
        "pixel error": pixel_error(mask, truth),
        "Rand error": rand_error(mask, truth),
        "warping error": warping_error(mask, truth),
    }


def _read(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture)


def best_threshold(stored: Any, names: list[str], labels: Path) -> float:
    """The probability above which a pixel is cell that gives the lowest Rand error on the tuning slices."""
    from unet_rt.training.metrics import rand_error

    choices = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    errors = [np.mean([rand_error(stored[n] > t, _read(labels / n) > 0) for n in names]) for t in choices]
    return choices[int(np.argmin(errors))]


def report(args: argparse.Namespace) -> None:
    from unet_rt.pictures import comparison, difference, grey
    from unet_rt.training.metrics import rand_error, warping_error

    rows: dict[str, Any] = {}
    panels = []
    crop = (slice(128, 384), slice(128, 384))
    for path in sorted(args.out.glob("*.npz")):
        record = json.loads(path.with_suffix(".json").read_text())
        with np.load(path) as stored:
            found = [figures(stored[n], _read(args.data / "label" / n) > 0) for n in record["test"]]
            mean = {key: round(float(np.mean([f[key] for f in found])), 6) for key in found[0]}
            # The challenge scored the best threshold of each submission; here the tuning slices choose it.
            threshold = best_threshold(stored, record["tuning"], args.data / "label")
            tuned = [(stored[n] > threshold, _read(args.data / "label" / n) > 0) for n in record["test"]]
            mean["threshold"] = threshold
            mean["Rand error, threshold"] = round(float(np.mean([rand_error(m, t) for m, t in tuned])), 6)
            mean["warping error, threshold"] = round(float(np.mean([warping_error(m, t) for m, t in tuned])), 6)
            first = record["test"][0]
            mask, truth = stored[first] > 0.5, _read(args.data / "label" / first) > 0
        if not panels:
            image = _read(args.data / "image" / first)
            panels += [("slice " + first, grey(image[None])[crop]), ("truth", _white(truth)[crop])]
        panels.append((path.stem[:40], _white(mask)[crop]))
        panels.append(("differs", difference(truth, mask)[crop]))
        keys = ("parameters", "steps", "seconds", "tuning_iou", "device")
        rows[path.stem] = {**mean, **{k: record[k] for k in keys}}
    if not rows:
        sys.exit(f"{args.out} holds no run; train one first")
    comparison(panels, args.out / "membranes.png")
    document = {"slices": "mean of 21 to 23", "runs": rows, "paper (other, hidden slices)": PAPER}
    (args.out / "membranes.json").write_text(json.dumps(document, indent=1) + "\n")
    columns = [k for k in next(iter(rows.values())) if k != "device"]
    print("| run | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.4g}" if isinstance(row[c], float) else f"{row[c]:,}" for c in columns)
              + " |")  # fmt: skip
    print(f"The paper, on the challenge's hidden slices: {PAPER}")


def _white(mask: Any) -> Any:
    return np.repeat((mask * np.uint8(255))[..., None], 3, axis=2)


def plot(args: argparse.Namespace) -> None:
    """IoU of the test slices against the number of training slices, with and without augmentation."""
    from unet_rt.charts import Panel, chart

    series: dict[str, list[tuple[float, float]]] = {"augmented": [], "plain": []}
    membrane: dict[str, list[tuple[float, float]]] = {"augmented": [], "plain": []}
    for path in sorted(args.out.glob("*.npz")):
        record = json.loads(path.with_suffix(".json").read_text())
        line = "plain" if path.stem.endswith("-plain") else "augmented"
        with np.load(path) as stored:
            found = [figures(stored[n], _read(args.data / "label" / n) > 0) for n in record["test"]]
        for target, key in ((series, "IoU"), (membrane, "membrane IoU")):
            target[line].append((len(record["training"]), float(np.mean([f[key] for f in found]))))
    panels = [
        Panel(title, "training slices", {k: sorted(v) for k, v in each.items() if v})
        for title, each in (("IoU of cells", series), ("IoU of membranes", membrane))
    ]
    chart(panels, args.out / "slices.png")
    document = {"cells": series, "membranes": membrane}
    (args.out / "slices.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    raise SystemExit(main())
