"""Whole images end to end, against the engine's own time for the same tiles; and small ones again and again."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import paper_net
import torch

import unet_rt as urt
from unet_rt.contract.contract import Normalization
from unet_rt.images.normalize import normalize_pixels
from unet_rt.prediction.report import RunReport
from unet_rt.system import limits

from .built import DeviceRun, Made, made, open_made
from .pixels import batch_of, drawn, network, numbers_of
from .section import Section, synchronize
from .timing import Contender, interleave, wall


def section_predict(section: Section, name: str) -> None:
    """Host image to host mask, and a CUDA tensor to a CUDA tensor, against the engine's own time for the same tiles."""
    net = network(name, section.dry)
    best = [m for m in made(section, name) if m.kind == "engine"]
    order = {"fp16": 0, "int8": 1, "fp32": 2}
    best.sort(key=lambda m: order[m.precision])
    if not best:
        section.failed(f"{name} end to end", "no engine was built")
        return
    sides = (260, 320) if section.dry else (4096, 16384)
    for entry in best:
        if section.left < 20 and not section.dry:
            section.failed(f"{entry.name} end to end", "no time was left")
            continue
        with section.part(f"{entry.name} end to end"):
            engine, session = open_made(section, entry)
            spent = 0.0
            for side in sides:
                if side == sides[1] and not section.dry and 16 * spent > section.left - 10:
                    section.failed(f"{entry.name}, {side} x {side} px", f"{16 * spent:.0f} s would be needed")
                    continue
                begun = time.perf_counter()
                with section.part(f"{entry.name}, {side} x {side} px"):
                    end_to_end(section, net, entry, engine, session, side)
                spent = time.perf_counter() - begun
            engine.close()


@dataclass
class Trial:
    """One image size through one engine: what each way of predicting took, said and returned."""

    section: Section
    net: paper_net.Net
    entry: Made
    engine: Any
    pixels: np.ndarray
    numbers: Any
    times: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, list[RunReport]] = field(default_factory=lambda: {"own": [], "fixed": []})

    @property
    def what(self) -> str:
        return f"{self.entry.name}, {len(self.pixels)} x {len(self.pixels)} px"


def end_to_end(section: Section, net: paper_net.Net, entry: Made, engine: Any, session: Any, side: int) -> None:
    """One image size, in turns: normalised by its own statistics (as the network declares) or by declared numbers, which
    need no pass over the image before the first tile; and, with the latter, a CUDA tensor that stays on its device."""
    pixels = drawn(side)
    begun = time.perf_counter()
    numbers = numbers_of(net, pixels)
    statistics_s = time.perf_counter() - begun
    trial = Trial(section, net, entry, engine, pixels, numbers)
    take_turns(trial)
    report = (trial.reports["fixed"] or trial.reports["own"])[-1]
    engine_s = engine_seconds(trial, session, report)
    row: dict[str, Any] = {"engine": entry.name, "side": side, "engine_s": engine_s, "statistics_s": statistics_s}
    for name, found in trial.times.items():
        median = statistics.median(found)
        row[f"{name}_s"], row[f"{name}_low_s"], row[f"{name}_high_s"] = median, min(found), max(found)
        row[f"{name}_ratio"] = median / engine_s
        row[f"{name}_mpx_per_s"] = side * side / median / 1e6
    row |= {
        "tile": list(report.tile),
        "tiles": report.tiles,
        "batch": report.batch,
        "stages": report.stages,
        "notes": list(report.notes),
    }
    with section.part(f"labels of {trial.what}"):
        compare_results(trial, row)
    section.add("rows", **row)
    section.clocks(f"after {side} x {side} px")


def take_turns(trial: Trial) -> None:
    """Predicts in every way in turns, the first turn to warm up; one that fails is recorded, and the others go on."""
    section, engine, own = trial.section, trial.engine, trial.engine.spec
    mean, std = (tuple(float(n) for n in values) for values in (trial.numbers.offset, trial.numbers.divisor))
    fixed = replace(own, contract=replace(own.contract, normalization=Normalization("fixed", mean=mean, std=std)))
    tensor = None if section.dry else torch.from_numpy(trial.pixels).to(section.device)

    def host(name: str) -> None:
        engine.spec = own if name == "own" else fixed
        trial.last[name] = np.asarray(urt.predict(engine, trial.pixels, report=trial.reports[name].append))

    def stays() -> None:  # without a report: it would count labels on the host
        engine.spec = fixed
        trial.last["device"] = urt.predict(engine, tensor)
        synchronize(section.device)

    ways: dict[str, Callable[[], None]] = {k: functools.partial(host, k) for k in ("fixed", "own")}
    if tensor is not None:
        ways["device"] = stays
    for turn in range(2 if section.dry else 4):
        for name, work in list(ways.items()):
            try:
                spent = wall(work)
            except Exception as error:  # noqa: BLE001 - recorded; the others go on
                section.failed(f"{trial.what}, {name}", error)
                del ways[name]
                continue
            if turn:
                trial.times.setdefault(name, []).append(spent)
    engine.spec = own


def engine_seconds(trial: Trial, session: Any, report: RunReport) -> float:
    """What the engine alone takes for the same number of tiles, in the batches of the run; NaN where it fails."""
    section, batch = trial.section, report.batch
    x = batch_of(trial.net, batch, max(report.tile), section.device)[:, :, : report.tile[0], : report.tile[1]]
    run = DeviceRun(section, session, x.contiguous())
    alone, failed = interleave(
        [Contender("engine", run.call, run.result, trial.entry.precision)],
        section.device,
        rounds=5,
        seconds=10,
        sample_s=0.001 if section.dry else 0.1,
    )
    run.free()
    if failed:
        section.failed(f"{trial.entry.name}: engine alone", failed["engine"])
    return statistics.median(alone["engine"]) / batch * report.tiles if alone else math.nan


def compare_results(trial: Trial, row: dict[str, Any]) -> None:
    """Adds to a row what the labels are held against eager FP32, and whether all ways return the same."""
    last, device = trial.last, trial.section.device
    mask = last["own"]
    row["changed_labels"], row["labels_compared"] = changed_labels(trial.net, trial.pixels, trial.numbers, mask, device)
    row["foreground"] = float((mask != 0).mean())
    row["fixed_equal"] = bool(np.array_equal(last["fixed"], mask))
    if "device" in last:
        row["device_result"] = type(last["device"]).__name__
        back = torch.as_tensor(last["device"], device=device).cpu().numpy()
        row["device_equal"] = bool(np.array_equal(back, last["fixed"]))


def changed_labels(
    net: paper_net.Net, pixels: np.ndarray, numbers: Any, mask: np.ndarray, device: str
) -> tuple[float, int]:
    """Share of labels that eager FP32 on one large window changes; and how many were compared.

    The window begins at a multiple of the network's stride on the canvas (the canvas of an unpadded network begins
    ``margin`` pixels outside the image), lies inside the image, and of a padded network only what is further than its
    reach from the window's edge is compared.
    """
    module = net.module().to(device)
    spec = module.spec
    valid = spec.padding == "valid"
    side = len(pixels)
    stride = 2**spec.depth
    if valid:
        size = spec.size_at_least(min(1536, side - 2 * stride) - 40)
        while size > side:
            size = spec.size_at_least(size - 2 * stride)
        margin = (size - spec.out_size(size)) // 2
        # On the canvas the image begins at `margin`, so that a tile from image pixel y has origin y + margin.
        first = (side - size) // 2
        first -= (first + margin) % stride
        first += stride if first < 0 else 0
    else:
        margin = 128 if side > 512 else 64
        size = min(1536, side) // stride * stride
        first = (side - size) // 2 // stride * stride
    window = normalize_pixels(pixels[None, first : first + size, first : first + size], numbers)[None]
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        truth = module(torch.from_numpy(window).to(device))[0].argmax(0).to(torch.uint8).cpu().numpy()
    inner = slice(None) if valid else slice(margin, size - margin)
    start = first + margin
    truth = truth[inner, inner]
    found = mask[start : start + len(truth), start : start + len(truth)]
    return float((found != truth).mean()), truth.size


def section_repeat(section: Section) -> None:
    """Small predictions, many times: device memory and resident memory before and after."""
    count, name = (4, "nuclei") if section.dry else (1000, "nuclei")
    entries = [m for m in made(section, name) if m.kind == "engine"]
    pixels = drawn(256 if section.dry else 1024)[:256, :256]
    for entry in entries:
        if section.left < 8:
            section.failed(f"{entry.name}, repeated", "no time was left")
            continue
        with section.part(f"{entry.name}, repeated"):
            engine, _ = open_made(section, entry)
            for _ in range(2 if section.dry else 20):
                first = np.asarray(urt.predict(engine, pixels))
            synchronize(section.device)
            free, rss = _free_bytes(section), limits.rss_bytes()
            begun, done = time.perf_counter(), 0
            for _ in range(count):
                last = np.asarray(urt.predict(engine, pixels))
                done += 1
                if section.left < 5:
                    break
            spent = time.perf_counter() - begun
            section.add(
                "rows",
                engine=entry.name,
                runs=done,
                ms=spent / done * 1e3,
                device_grown_bytes=free - _free_bytes(section),
                resident_grown_bytes=limits.rss_bytes() - rss,
                same=bool(np.array_equal(first, last)),
            )
            engine.close()


def _free_bytes(section: Section) -> int:
    return 0 if section.dry else int(torch.cuda.mem_get_info()[0])
