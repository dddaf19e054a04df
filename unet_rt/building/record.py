"""Build, step 6: what travels with the engine: its spec, the record of its parity, its calibration and its exam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..baseline.results import tile_of
from ..baseline.samples import SampleWindow
from ..engine import exam
from ..engine import parity as parity_module
from ..engine.engine import Engine
from ..engine.folder import FileKind, sha256
from ..engine.parity import ImageParity
from ..engine.spec import EngineSpec
from ..errors import ParityError
from ..system import facts, json
from ..tiling.grid import square_tile
from .cache import Digests
from .candidates import Trials
from .choice import Winner
from .engines import Engines
from .job import BuildJob
from .measure import Judge
from .quantiser import LayerCost, Quantiser
from .report import BuildReport
from .samples import Samples
from .tiling import Tiling

Array = npt.NDArray[Any]
EXAM_TILES = 8


@dataclass(frozen=True)
class Outcome:
    """What the steps before the folder came to, the engines still open.

    Attributes:
        job: What was built.
        samples: The windows it was measured on.
        first: What the first window looks like to the network, and what it makes of it.
        tiling: How images are tiled.
        trials: What was tried.
        winner: What becomes the engine.
        judge: What judged it.
        engines: All that are open.
        reached: Seconds from the beginning to the end of each step.
    """

    job: BuildJob
    samples: Samples
    first: Mapping[str, Any]
    tiling: Tiling
    trials: Trials
    winner: Winner
    judge: Judge
    engines: Engines
    reached: Mapping[str, float]

    @property
    def windows(self) -> tuple[SampleWindow, ...]:
        """The windows that parity was judged on."""
        return self.tiling.results.samples

    @property
    def int8(self) -> tuple[Quantiser, frozenset[str]] | None:
        """What made the engine that was chosen and its layers in FP32, where it is an INT8 one."""
        quantiser, kept = self.trials.quantiser, self.winner.kept
        return None if quantiser is None or kept is None else (quantiser, kept)


def finish_spec(outcome: Outcome, digests: Digests) -> EngineSpec:
    """The spec of the engine that was chosen, with the digests of everything that decided it."""
    winner, samples = outcome.winner, outcome.samples
    return replace(
        winner.engine.spec,
        tile=winner.best.tile,
        run_batch=winner.best.batch,
        bytes_per_px=winner.bytes_per_px,
        equal=winner.equal,
        made_on=facts.describe(),
        options={
            "threads": outcome.job.threads,
            "sample_sha256": [s.sha256 for s in outcome.windows],
            "kind": samples.kind,
            "input_range": samples.input_range,
            "asked": dict(digests),
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


def write_files(outcome: Outcome, spec: EngineSpec) -> dict[FileKind, Path]:
    """The files of the engine folder, by kind, for the ``spec`` that :func:`finish_spec` built."""
    job, built = outcome.job, outcome.engines.files[outcome.winner.engine]
    record = json.record_json(_describe_parity(outcome, spec, built.graph))
    files: dict[FileKind, Path] = {"model": job.model.given, "graph": built.graph, "parity": job.work / "parity.json"}
    files["parity"].write_text(record, encoding="utf-8")
    if built.compiled is not None:
        files["engine"] = built.compiled
    if outcome.int8 is not None:
        files["calibration"] = job.work / "calibration.json"
        files["calibration"].write_text(outcome.int8[0].calibration.dumps(), encoding="utf-8")
    if job.options.keep_exam and (arrays := exam_tiles(job, spec, outcome.winner.engine, outcome.windows)):
        files["exam"] = job.work / "exam.npz"
        np.savez_compressed(files["exam"], **arrays)  # type: ignore[arg-type]
    return files


def _describe_parity(outcome: Outcome, spec: EngineSpec, graph: Path) -> dict[str, Any]:
    """The record of parity that travels with the engine."""
    job, tiling, winner = outcome.job, outcome.tiling, outcome.winner
    verdict = winner.best.verdict
    if verdict is None:
        raise ParityError("the chosen candidate was not judged")
    return {
        "schema": 1,
        "kind": outcome.samples.kind,
        "budget": job.budget.of(spec.precision).to_json(),
        "graph_sha256": sha256(graph),
        "model_sha256": sha256(job.model.given),
        "baseline": {
            "backend": job.baseline.spec.backend,
            "precision": "int8" if job.model.quantised else "fp32",
            "whole": tiling.spec.runs_whole,  # an engine with a plan has fixed sizes, its baseline has not
        },
        "fingerprint": exam.fingerprint(winner.best.backend, winner.engine.session_version, spec.device),
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
        if winner.smaller is None
        else {"tile": list(spec.tiles[1]), "verdict": winner.smaller.to_json()},
        "calibrated_on": [{"name": s.name, "sha256": s.sha256} for s in outcome.samples.calibrating],
        "seams": {str(k): v for k, v in tiling.seams.items()},
        "candidates": [c.to_json() for c in winner.candidates],
        "layers": [layer.to_json() for layer in _layer_costs(outcome)],
    }


def make_report(outcome: Outcome, folder: Path, spec: EngineSpec, advice: str) -> BuildReport:
    """What the caller of build is told."""
    tiling, winner, remarks = outcome.tiling, outcome.winner, outcome.job.remarks
    return BuildReport(
        folder,
        spec,
        winner.candidates,
        winner.chosen,
        outcome.samples.kind,
        len(outcome.windows),
        dict(outcome.first),
        dict(tiling.seams),
        tiling.mismatch,
        tuple(remarks.notes),
        tuple(remarks.warnings),
        advice,
        _layer_costs(outcome),
        dict(outcome.reached),
    )


def _layer_costs(outcome: Outcome) -> tuple[LayerCost, ...]:
    """What was ranked, once for all backends; marked is what the chosen engine keeps in FP32, if it is an INT8 one."""
    ranking = outcome.trials.quantiser.ranking if outcome.trials.quantiser is not None else []
    kept = outcome.winner.kept or frozenset()
    return tuple(replace(layer, kept=layer.name in kept) for layer in ranking)


def exam_tiles(job: BuildJob, spec: EngineSpec, engine: Engine, windows: Sequence[SampleWindow]) -> dict[str, Array]:
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
        found = exam.compare_tile(engine, spec, x[0], [y[0] for y in wanted], sample.name)
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
