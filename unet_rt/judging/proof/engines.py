"""Engines of every backend and precision: built, held against FP32, tiles against the whole, timed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ... import backends
from ...building.build import build
from ...building.report import BuildReport
from ...contract.contract import Contract, Normalization
from ...drawing.membranes import membranes
from ...drawing.microscopy import microscopy
from ...engine.budget import Budget
from ...engine.folder import EngineFolder, read_folder
from ...engine.load import load
from ...errors import UnetRtError
from ...system import timing
from ..verify import verify
from .section import Section

NETWORKS = ("nuclei", "paper", "membranes")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DATA = Path(__file__).resolve().parents[2] / "data"
TILES = {"nuclei": (256, 512), "membranes": (316, 572), "paper": (316, 572)}  # px: on a CPU, on a GPU
PAPER_WIDTH = (16, 64)  # channels of its first level; the paper's 64 take a CPU too long
SAMPLE_PX = 448
SEARCH_MINUTES = 0.25
ROUNDS = 5
SPEED_SECONDS = 25.0


def section_engines(section: Section, network: str, backend: str) -> None:
    """A row per precision: what the engine's parity is, what tiling alone changes, how long a tile takes; or why not."""
    module, device = backends.get(backend), section.device
    known = module.precisions(device)
    model, contract = _model(section, network)
    samples = _samples(network)
    for precision in PRECISIONS:
        title = f"{network} {backend} {precision}"
        if precision not in known:
            section.failed(title, f"{backend} has {', '.join(known)} on {device} here")
            continue
        if section.left < 8:
            section.failed(title, "no time was left")
            continue
        with section.part(title):
            reports: list[BuildReport] = []
            out = section.work / f"{network}-{backend}-{precision}.urt"
            side = TILES[network][device != "cpu"]
            try:
                build(
                    model,
                    samples=samples,
                    out=out,
                    contract=contract,
                    # Drawn weights decide nothing, so that their labels prove nothing: values are compared.
                    budget=Budget(error=0.05) if network == "paper" else None,
                    backend=backend,
                    device=device,
                    precision=precision,
                    tile=(side, side),
                    halo="exact",
                    search_minutes=min(SEARCH_MINUTES, max(0.05, (section.left - 8) / 60)),
                    overwrite=True,
                    say=section.say,
                    report=reports.append,
                ).close()
            except UnetRtError as error:
                section.failed(title, str(error))
                continue
            section.add("engines", **_row(section, network, out, reports[0], samples))


def _row(section: Section, network: str, out: Path, report: BuildReport, samples: list[Any]) -> dict[str, Any]:
    chosen = report.candidates[report.chosen]
    found = verify(out, samples[:1])
    folder = read_folder(out)
    row: dict[str, Any] = {
        "network": network,
        "backend": chosen.backend,
        "precision": chosen.precision,
        "tile": list(chosen.tile),
        "accepted": found.accepted,
        "label_change": found.verdict.label_change,
        "relative_error": found.verdict.relative,
        "tiles_differ_from_whole": None if found.seams is None else found.seams.max_abs,
        "ms_per_tile": chosen.latency_ms,
        "spread_ms": list(chosen.spread_ms or ()),
    }
    forms = _plan_forms(folder)
    return row if not forms else {**row, "plan_forms_ms": forms}


def _plan_forms(folder: EngineFolder) -> dict[str, float]:
    """Milliseconds of the forms that a plan was chosen from: Slice and Concat beside the crop-and-concat plugin."""
    if "engine" not in folder.files or not folder.spec.backend.startswith("tensorrt"):
        return {}
    from ...backends.tensorrt.plan import read_header

    return dict(read_header(folder.file("engine")).measured_ms)


def section_eager(section: Section) -> None:
    """Engines of the first network in turns with PyTorch: eager, channels_last, autocast, compiled; ratios to eager."""
    from ...backends import eager

    reason = eager.missing(section.device)
    if reason is not None:
        section.failed("speed against eager PyTorch", reason)
        return
    network = NETWORKS[0]
    side = TILES[network][section.device != "cpu"]
    x = np.random.default_rng(0).normal(size=(1, 1, side, side)).astype(np.float32)
    contenders: dict[str, Any] = dict(eager.variants(_module(network), x, section.device))
    engines = []
    for folder in sorted(section.work.glob(f"{network}-*.urt")):
        with section.part(f"loading {folder.name}"):
            engine = load(folder)
            engines.append(engine)
            contenders[f"unet-rt {engine.spec.backend} {engine.spec.precision}"] = _runner(engine, x)
    compiled = contenders.pop("torch.compile FP32")
    first = _add_speed(section, contenders)
    with section.part("torch.compile"):  # takes a compiler, and a while
        compiled()
        _add_speed(section, {first: contenders[first], "torch.compile FP32": compiled})
    for engine in engines:
        engine.close()


def _add_speed(section: Section, contenders: Mapping[str, Callable[[], Any]]) -> str:
    """Rows of times in turns, as ratios to the first contender, whose name is returned."""
    times = timing.interleave(list(contenders.values()), runs=ROUNDS, seconds=SPEED_SECONDS)
    for name, found in zip(contenders, times, strict=True):
        ratio = timing.ratio(found, times[0])
        interval = [ratio.low, ratio.high]
        section.add("speed", name=name, ms_per_tile=found.median_s * 1e3, times_eager=ratio.median, interval=interval)
    return next(iter(contenders))


def _runner(engine: Any, x: Any) -> Any:
    """One tile of an engine: where it runs on a GPU from arrays there, as PyTorch's tensors are."""
    if engine.device_session is None:
        return lambda: engine.run(x)
    from ...building.measure import DeviceRun

    return DeviceRun(engine, x)


def _module(network: str) -> Any:
    """The shipped network as a module of PyTorch."""
    from ...graph.file import load_model
    from ...models.stored import unet_from_onnx
    from ...models.unet import UNetSpec

    record = json.loads((DATA / f"{network}.json").read_text(encoding="utf-8"))
    return unet_from_onnx(load_model(DATA / f"{network}.onnx"), UNetSpec(**record["architecture"]))


def _model(section: Section, network: str) -> tuple[Path, Contract | None]:
    """A network's graph, and its contract where the graph does not say it."""
    if network != "paper":
        return DATA / f"{network}.onnx", None
    path = section.work / "paper.onnx"
    if not path.exists():
        from ...graph.paper import write_paper

        write_paper(path, PAPER_WIDTH[section.device != "cpu"])
    return path, Contract(task="regression", normalization=Normalization("zscore", scope="image"))


def _samples(network: str) -> list[Any]:
    """Drawn images like those the network was trained on."""
    shape = (SAMPLE_PX, SAMPLE_PX)
    if network == "membranes":
        return [membranes(shape, seed=seed).image for seed in range(3)]
    return [microscopy(shape, seed=seed).image for seed in range(3)]
