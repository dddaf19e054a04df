"""Build, step 6: what travels with the engine: its spec, the record of its parity, its calibration and its exam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..baseline.results import tile_of
from ..baseline.runner import baseline_name
from ..baseline.samples import Sample
from ..engine import exam
from ..engine import parity as parity_module
from ..engine.engine import Engine
from ..engine.folder import FileKind, sha256
from ..engine.parity import ImageParity
from ..engine.spec import EngineSpec
from ..errors import ParityError
from ..system import facts, json
from ..tiling.grid import square_tile
from .cache import Asked
from .candidates import Measured
from .choice import Choice
from .engines import Engines
from .job import Job
from .measure import Judge
from .quantiser import LayerCost, Quantiser
from .report import BuildReport
from .samples import Samples
from .tiling import Tiling

Array = npt.NDArray[Any]
EXAM_TILES = 8


@dataclass(frozen=True)
class Outcome:
    """What the steps before the folder came to, the engines still open; ``first`` describes the first sample."""

    job: Job
    samples: Samples
    first: dict[str, Any]
    tiling: Tiling
    measured: Measured
    choice: Choice
    judge: Judge
    engines: Engines

    @property
    def windows(self) -> tuple[Sample, ...]:
        """The windows that parity was judged on."""
        return self.tiling.results.samples

    @property
    def int8(self) -> tuple[Quantiser, frozenset[str]] | None:
        """What made the engine that was chosen and its layers in FP32, where it is an INT8 one."""
        quantiser, kept = self.measured.quantiser, self.choice.kept
        return None if quantiser is None or kept is None else (quantiser, kept)


def final_spec(outcome: Outcome, asked: Asked) -> EngineSpec:
    """The spec of the engine that was chosen, with everything that decided it; ``asked`` as in :mod:`unet_rt.cache`."""
    choice, samples = outcome.choice, outcome.samples
    return replace(
        choice.engine.spec,
        tile=choice.best.tile,
        run_batch=choice.best.batch,
        bytes_per_px=choice.bytes_per_px,
        made_on=facts.describe(),
        options={
            "threads": outcome.job.threads,
            "sample_sha256": [s.sha256 for s in outcome.windows],
            "kind": samples.kind,
            "input_range": samples.input_range,
            "asked": dict(asked),
            **_int8_options(outcome),
        },
    )


def _int8_options(outcome: Outcome) -> dict[str, Any]:
    """How the chosen engine was quantised; with it and the calibration the graph can be made again."""
    if outcome.int8 is None:
        return {}
    quantiser, kept = outcome.int8
    inputs = {i.name for i in outcome.tiling.spec.inputs}
    ranges = quantiser.calibration.ranges[quantiser.method or "minmax"]
    return {
        "int8": {
            "method": quantiser.method,
            "kept": sorted(kept),
            "input_range": {name: [r.low, r.high] for name, r in ranges.items() if name in inputs},
        }
    }


def engine_files(outcome: Outcome, spec: EngineSpec, *, keep_exam: bool) -> dict[FileKind, Path]:
    """The files of the engine folder, by kind, for the ``spec`` that :func:`final_spec` made."""
    job, made = outcome.job, outcome.engines.files[outcome.choice.engine]
    record = json.record_json(_record(outcome, spec, made.graph))
    files: dict[FileKind, Path] = {"model": job.model.given, "graph": made.graph, "parity": job.work / "parity.json"}
    files["parity"].write_text(record, encoding="utf-8")
    if made.plan is not None:
        files["engine"] = made.plan
    if outcome.int8 is not None:
        files["calibration"] = job.work / "calibration.json"
        files["calibration"].write_text(outcome.int8[0].calibration.dumps(), encoding="utf-8")
    if keep_exam and (arrays := exam_tiles(job, spec, outcome.choice.engine, outcome.windows)):
        files["exam"] = job.work / "exam.npz"
        np.savez_compressed(files["exam"], **arrays)  # type: ignore[arg-type]
    return files


def _record(outcome: Outcome, spec: EngineSpec, graph: Path) -> dict[str, Any]:
    """The record of parity that travels with the engine."""
    job, tiling, choice = outcome.job, outcome.tiling, outcome.choice
    verdict = choice.best.verdict
    if verdict is None:
        raise ParityError("the chosen candidate was not judged")
    return {
        "schema": 1,
        "kind": outcome.samples.kind,
        "budget": vars(job.budget.of(spec.precision)),
        "graph_sha256": sha256(graph),
        "model_sha256": sha256(job.model.given),
        "baseline": {
            "backend": baseline_name(),
            "precision": "fp32",
            "whole": tiling.spec.runs_whole,  # an engine with a plan has fixed sizes, its baseline has not
        },
        "fingerprint": exam.fingerprint(choice.best.backend, choice.engine.session_version, spec.device),
        "machine": facts.describe(),
        "batch": sorted(outcome.judge.batches),
        "rows": [
            {
                "backend": name,
                "precision": precision,
                "variant": variant,
                "device": spec.device,
                **row.to_json(),
            }
            for (name, precision, variant), rows in outcome.judge.rows.items()
            for row in rows
        ],
        "images": [{"name": s.name, "sha256": s.sha256, "shape": list(s.pixels.shape)} for s in outcome.windows],
        "verdict": verdict.to_json(),
        "smaller_tile": None
        if choice.smaller is None
        else {"tile": list(spec.tiles[1]), "verdict": choice.smaller.to_json()},
        "calibrated_on": [{"name": s.name, "sha256": s.sha256} for s in outcome.samples.calibrating],
        "seams": {str(k): v for k, v in tiling.seams.items()},
        "candidates": [c.to_json() for c in choice.candidates],
        "layers": [layer.to_json() for layer in _layer_costs(outcome)],
    }


def report_of(
    outcome: Outcome, folder: Path, spec: EngineSpec, advice: str, reached: Mapping[str, float]
) -> BuildReport:
    """What the caller of build is told."""
    tiling, choice, remarks = outcome.tiling, outcome.choice, outcome.job.remarks
    return BuildReport(
        folder,
        spec,
        choice.candidates,
        choice.chosen,
        outcome.samples.kind,
        len(outcome.windows),
        outcome.first,
        tiling.seams,
        tiling.mismatch,
        tuple(remarks.notes),
        tuple(remarks.warnings),
        advice,
        _layer_costs(outcome),
        dict(reached),
    )


def _layer_costs(outcome: Outcome) -> tuple[LayerCost, ...]:
    """What was ranked, once for all backends; marked is what the chosen engine keeps in FP32, if it is an INT8 one."""
    ranking = outcome.measured.quantiser.ranking if outcome.measured.quantiser is not None else []
    kept = outcome.choice.kept or frozenset()
    return tuple(replace(layer, kept=layer.name in kept) for layer in ranking)


def exam_tiles(job: Job, spec: EngineSpec, engine: Engine, windows: Sequence[Sample]) -> dict[str, Array]:
    """A few tiles as the network gets them and the baseline's outputs, float32; {} where the engine passes none.

    A tile is a smaller part of an image than those that were judged, and may hold more of what changes. One on which
    the engine misses the budget here, where it was accepted, says nothing about another machine.
    """
    if spec.runs_whole:
        tile = square_tile(spec.sizes, spec.outputs, 192**2 if spec.spatial == 2 else 32**3)
    else:
        tile = spec.tile
    picked = windows[:: max(1, len(windows) // EXAM_TILES)][:EXAM_TILES]
    budget = job.budget.of(spec.precision)
    kept, images = list[tuple[Array, list[Array]]](), list[ImageParity]()
    for sample in picked:
        x = tile_of(sample, spec, tile, job.threads)
        wanted = job.baseline.run(x)
        found = exam.compared(engine, spec, x[0], [y[0] for y in wanted], sample.name)
        if parity_module.judge([*images, *found], budget).accepted:
            images += found
            kept.append((x, wanted))
    if len(kept) < len(picked):
        job.remarks.notes.append(
            f"{len(picked) - len(kept)} of {len(picked)} tiles are left out of the exam: on a tile alone the engine is "
            "outside the budget that it holds on whole windows"
        )
    if not kept:
        job.remarks.warnings.append(
            "the engine carries no exam, so that other machines refuse it; larger samples may help"
        )
        return {}
    inputs, outputs = zip(*kept, strict=True)
    columns = zip(*outputs, strict=True)
    return {"input": np.concatenate(inputs)} | {f"output_{k}": np.concatenate(ys) for k, ys in enumerate(columns)}
