"""From a folder of images and masks to a checkpoint: ``unet-rt train``."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._version import __version__
from ..contract.contract import Contract, Normalization
from ..errors import ContractError, OutputError
from ..images.reading import Reading
from ..models.architecture import Network, network_of
from ..models.checkpoint import TrainingError, save_checkpoint
from ..system.json import Record
from .curves import training_curves
from .evaluate import evaluate, foreground_is_common
from .folder import DataSet, read_data
from .options import Options, device_of, fitting_tile, plan_training
from .samples import Sample, split_by_blocks
from .trainer import Progress, Recipe, train

VALIDATION_SHARE = 0.2
# Validated on while training: so many windows of so many pixels. 20 times 0.9 million pixels forward cost 5 % of the
# default training on a CPU; whole images of a million pixels each cost half of it.
WATCHED, WATCHED_PX = 6, 384


@dataclass(frozen=True)
class Fit(Record):
    """What came of a training.

    Attributes:
        path: The checkpoint.
        curves: Picture of loss and IoU.
        best: The validation that was kept.
        history: All validations.
        record: As stored in the checkpoint.
    """

    path: Path
    curves: Path
    best: Progress
    history: tuple[Progress, ...]
    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        record = super().to_json()
        return {"out": record.pop("path"), **record}


def fit(
    folder: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    report: Callable[[Progress], None] = lambda progress: None,
    progress: Callable[[float, int, float], None] | None = None,
) -> Fit:
    """A trained network in a checkpoint, from a folder of images and masks.

    The best network so far is in ``out`` from the first validation on.

    Args:
        folder: Images and masks; see :mod:`unet_rt.training.folder`.
        out: The checkpoint, e.g. ``model.pt``. Beside it: ``model.png`` (curves), and until the end ``model.state.pt``.
        options: What to choose other than the defaults.
        resume: Go on where a training that wrote ``out`` was interrupted.
        overwrite: Replace ``out``.
        say, report, progress: Told what is done.

    Raises:
        OutputError: ``out`` exists, or cannot be written.
        ImageError, ContractError: the data do not serve.
        TrainingError: the loss is not finite, or there is nothing to resume.
    """
    options = options or Options()
    out = Path(out)
    state, curves = out.with_name(f"{out.stem}.state.pt"), out.with_suffix(".png")
    _check_out(out, state, resume, overwrite)
    place = device_of(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    data = _read(Path(folder), options)
    for note in data.notes:
        say(note)
    training, validation = split_data(data, say)
    if options.limit is not None:
        training = training[: options.limit]
        _check_classes(training, data.classes)
    architecture, recipe = plan_training(options, place, len(data.channels), len(data.classes))
    torch.manual_seed(int(options.recipe.get("seed", 0)))
    try:
        network = network_of(architecture)
        recipe = replace(recipe, w0=data.w0, tile_px=fitting_tile(network, recipe.tile_px, training))
    except ValueError as error:
        raise ContractError(str(error)) from error
    parameters = sum(p.numel() for p in network.parameters())
    for line in _lines(data, training, validation, options, recipe):
        say(line)
    say(f"{architecture['network']} of {parameters:,} parameters on {_device_name(place)}, {_plan_text(recipe)}")
    contract = _contract(data, options.normalization, recipe.tile_px)
    record: dict[str, Any] = {
        "preset": options.preset,
        "parameters": parameters,
        "recipe": recipe.to_json(),
        "data": _data_record(data, training, validation),
        "device": _device_name(place),
        "versions": _versions(),
    }
    history: list[Progress] = []
    if resume:
        history += _history(state)
        say(f"going on after step {history[-1].step if history else 0}")

    def keep(now: Progress) -> None:
        history.append(now)
        if now.best:
            _save(out, network, contract, record, history)
        training_curves(history, curves)
        report(now)

    seen = watch_windows(validation)
    train(network, training, seen, recipe, device=place, state=state, resume=resume, report=keep, progress=progress)
    network.to("cpu")
    best = max(history, key=lambda p: p.iou)
    record["annotated_iou"] = {
        s.name: round(v, 4) for s, v in zip(validation, evaluate(network, validation, against="truth"), strict=True)
    }
    _save(out, network, contract, record, history)
    return Fit(out, curves, best, tuple(history), record)


def _read(folder: Path, options: Options) -> DataSet:
    sizes = {k: options.recipe[k] for k in ("w0", "sigma_px") if k in options.recipe}
    if options.preset == "paper":
        sizes = {"w0": 10.0, **sizes}
    return read_data(
        folder,
        options.normalization,
        images=options.images,
        masks=options.masks,
        masks_are=options.masks_are,
        reading=Reading(options.axes, options.channels),
        **sizes,
    )


def _lines(
    data: DataSet, training: Sequence[Sample], validation: Sequence[Sample], options: Options, recipe: Recipe
) -> Iterator[str]:
    """What the user is told of the data before training begins."""
    asked = options.recipe.get("tile_px")
    if asked is not None and asked != recipe.tile_px:
        yield f"tiles of {recipe.tile_px} px instead of {asked}: as large as the images ask for and the network accepts"
    yield (
        f"{len(training)} images to train on, {len(validation)} to validate ({_names(validation)}), "
        f"{len(data.channels)} channel{'s' if len(data.channels) > 1 else ''}, {len(data.classes)} classes"
    )
    if foreground_is_common(training):
        yield "most pixels are foreground: validation IoU is the mean of foreground's and background's"


def _plan_text(recipe: Recipe) -> str:
    long = f"{recipe.steps} steps" if recipe.steps else f"{recipe.minutes:g} minutes"
    tiles = f"{recipe.batch} tile{'s' if recipe.batch > 1 else ''} of {recipe.tile_px} px"
    return f"{recipe.precision}: {long} of {tiles}, {recipe.optimizer}"


def _contract(data: DataSet, normalization: Normalization, tile_px: int) -> Contract:
    return Contract(
        axes="NCYX",
        channels=data.channels,
        value_range=data.value_range,
        normalization=normalization,
        task="multiclass",
        output_is="logits",
        classes=data.classes,
        pixel_size_um=data.pixel_size_um,
        trained_tile=(tile_px, tile_px),
        border="mirror",
    )


def _data_record(data: DataSet, training: Sequence[Sample], validation: Sequence[Sample]) -> dict[str, Any]:
    return {
        "masks": data.masks,
        "iou_of": "all classes" if foreground_is_common(training) else "all classes but the background",
        "classes": list(data.classes),
        "training": [s.name for s in training],
        "validation": [s.name for s in validation],
        "notes": list(data.notes),
    }


def _versions() -> dict[str, str]:
    return {
        "unet_rt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def split_data(data: DataSet, say: Callable[[str], None] = lambda text: None) -> tuple[list[Sample], list[Sample]]:
    """(training, validation), by folders or by blocks; each holds every class, or the user is told."""
    if 0 < len(data.validation) < len(data.samples):
        training = [s for k, s in enumerate(data.samples) if k not in data.validation]
        validation = [data.samples[k] for k in data.validation]
    else:
        training, validation = split_by_blocks(data.samples, VALIDATION_SHARE)
    _check_classes(training, data.classes)
    there = {int(k) for s in validation for k in np.unique(s.target)}
    for k in sorted(set(range(1, len(data.classes))) - there):
        say(f"no pixel of {data.classes[k]} in the validation part: its IoU is not watched")
    return training, validation


def watch_windows(validation: Sequence[Sample]) -> list[Sample]:
    """What is validated on while training: of every k-th image the window that holds most foreground."""
    found = []
    for s in validation[:: -(-len(validation) // WATCHED)]:
        height, width = s.target.shape
        tops, lefts = (
            sorted({*range(0, max(1, n - WATCHED_PX + 1), 128), max(0, n - WATCHED_PX)}) for n in (height, width)
        )
        windows = [(slice(y, y + WATCHED_PX), slice(x, x + WATCHED_PX)) for y in tops for x in lefts]
        best = max(windows, key=lambda w: int((s.target[w] > 0).sum()))
        found.append(Sample(s.name, s.image[:, *best], s.target[best], s.weight[best], s.truth[best]))
    return found


def _check_classes(training: Sequence[Sample], classes: Sequence[str]) -> None:
    there = {int(k) for s in training for k in np.unique(s.target)}
    absent = [name for k, name in enumerate(classes) if k not in there]
    if absent:
        raise ContractError(
            f"the {len(training)} images to train on hold no pixel of {', '.join(absent)}, which a network cannot learn "
            "then; give more images that hold it (the last fifth by name validates, or folders named val)"
        )


def _check_out(out: Path, state: Path, resume: bool, overwrite: bool) -> None:
    if out.suffix not in (".pt", ".pth"):
        raise OutputError(f"{out} is no name for a checkpoint; use one that ends in .pt")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} is no folder; make it, or choose another --out")
    if out.is_dir():
        raise OutputError(f"{out} is a folder; choose a file name, e.g. {out / 'model.pt'}")
    if resume:
        if not state.exists():
            raise TrainingError(f"{state} does not exist, so that there is nothing to resume; train without --resume")
    elif state.exists() and not overwrite:
        raise OutputError(
            f"{state} is left from a training that was interrupted; pass --resume to go on, --overwrite to begin anew"
        )
    elif out.exists() and not overwrite:
        raise OutputError(f"{out} exists; pass --overwrite to replace it, or choose another --out")


def _history(state: Path) -> list[Progress]:
    from ..models.checkpoint import read_torch

    return [Progress(**p) for p in json.loads(read_torch(state)["history"])]


def _save(out: Path, network: Network, contract: Contract, record: dict[str, Any], history: Sequence[Progress]) -> None:
    best = max(history, key=lambda p: p.iou)
    figures = {
        "validation_iou": round(best.iou, 4),
        "best_step": best.step,
        "seconds": round(history[-1].seconds, 1),
        "history": [[p.step, round(p.loss, 5), round(p.iou, 5)] for p in history],
    }
    save_checkpoint(out, network, contract, {**record, **figures})


def _names(samples: Sequence[Sample]) -> str:
    shown = [s.name for s in samples[:3]]
    return ", ".join(shown) + (", ..." if len(samples) > 3 else "")


def _device_name(place: torch.device) -> str:
    return torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


__all__ = ["Fit", "fit", "split_data", "watch_windows"]
