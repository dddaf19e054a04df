"""Build, step 4: INT8 per backend, from one calibration, and layers returned to FP32 where the budget needs it.

Which ranges, ends and layers are tried is decided in :mod:`unet_rt.search`; here it is given engines, verdicts and time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import numpy as np

from .. import backends
from ..baseline.samples import SampleWindow
from ..engine.engine import Engine
from ..engine.parity import Verdict
from ..errors import BackendError, GraphError
from ..graph.passes.qdq import FORMS
from .calibration import RangeMethod, draw_tiles
from .engines import Engines, calibration_tile
from .job import INT8_ENDS, PUT_BACK_ENDS, BuildJob
from .quantiser import Mixture, Quantiser
from .report import CandidateKey
from .search import Drop, Make, VerdictOf, plain_and_ends, put_back
from .tiling import Tiling

CALIBRATION_FLOP = 1e12  # of all calibration tiles together: half a minute of two cores


def check_int8(name: str, device: str) -> None:
    """Raises BackendError where a backend has no INT8 on a device of this machine."""
    if name not in FORMS or "int8" not in backends.get(name).precisions(device):
        raise BackendError(f"{name} has no int8 on {device} here")


def calibrate_model(job: BuildJob, tiling: Tiling, windows: Sequence[SampleWindow]) -> Quantiser:
    """The model, calibrated on tiles of the windows that were set aside.

    Raises:
        GraphError: It has nothing for INT8.
        ImageError: The tiles prove nothing.
    """
    side = calibration_tile(tiling.spec)
    count = int(np.clip(CALIBRATION_FLOP / (job.model.report.flops_per_pixel * prod(side) + 1), 6, 48))
    return Quantiser(
        job.model.graph,
        job.baseline,
        draw_tiles(windows, tiling.spec, side, count, job.threads),
        budget=job.budget,
        windows=tuple((s.name, s.sha256) for s in windows),
        threads=job.threads,
        remarks=job.remarks,
    )


def int8_maker(
    job: BuildJob, engines: Engines, quantiser: Quantiser, tile: tuple[int, ...], batches: Sequence[int], name: str
) -> Make:
    """What builds and loads INT8 engines of one backend for a search."""

    def make(keep: frozenset[str], method: RangeMethod) -> Engine:
        source = job.work / "quantised.onnx"
        quantiser.write(source, name, keep, method)
        return engines.make(name, "int8", tile, batches, source=source)

    return make


def make_mixtures(job: BuildJob, quantiser: Quantiser, make: Make, drop: Drop, judge: VerdictOf) -> list[Mixture]:
    """INT8 for one backend: plain first, then with its ends in FP32 where that helps."""
    return plain_and_ends(quantiser, make, drop, judge, job.deadline, INT8_ENDS)


def return_layers(
    job: BuildJob,
    quantiser: Quantiser,
    found: Mapping[str, Sequence[Mixture]],
    others: Mapping[CandidateKey, Engine],
    *,
    make: Callable[[str], Make],
    drop: Drop,
    judge: VerdictOf,
    seconds: Callable[[Engine], float],
) -> tuple[dict[str, Mixture], dict[CandidateKey, Verdict]]:
    """Layers returned to FP32 where a backend's INT8 misses the budget, and would be the fastest inside it.

    Whether BF16 and FP16 are inside is found out here; FP32 is taken to be.

    Args:
        job: The build.
        quantiser: The model.
        found: Per backend what :func:`make_mixtures` made.
        others: The engines of other precisions.
        make: Of a backend, what builds its INT8 engines.
        drop: Closes an engine that is of no more use, and removes its files.
        judge: Parity on the samples.
        seconds: What a tile takes an engine, roughly.

    Returns:
        A mixture inside the budget per backend that was brought there; verdicts on ``others`` that were needed for it.
    """
    returned, verdicts, notes = dict[str, Mixture](), dict[CandidateKey, Verdict](), job.remarks.notes
    waiting = [name for name, mixtures in found.items() if not any(m.verdict.accepted for m in mixtures)]
    if not waiting:
        return returned, verdicts
    inside = [m.engine for mixtures in found.values() for m in mixtures if m.verdict.accepted]
    for key, engine in others.items():
        if key[1] != "fp32":
            try:
                verdicts[key] = judge(engine)
            except BackendError:  # it cannot be run, as will be found and said when it is measured
                continue
        if key[1] == "fp32" or verdicts[key].accepted:
            inside.append(engine)
    fastest = min((seconds(engine) for engine in inside), default=float("inf"))
    plain = {name: seconds(found[name][0].engine) for name in waiting}
    for name in sorted(waiting, key=lambda name: plain[name]):
        if plain[name] >= fastest:  # and layers in FP32 make no engine faster
            notes.append(
                f"{name} int8 is outside the budget and no faster than what is inside: no layers were returned to FP32"
            )
            continue
        try:
            mixture = put_back(quantiser, found[name], make(name), drop, judge, job.deadline, PUT_BACK_ENDS)
        except (BackendError, GraphError) as error:  # what is inside the budget already is none the worse for it
            notes.append(f"{name} int8: layers were returned to FP32 until {error}")
            continue
        if mixture is None:
            notes.append(f"{name} int8 was not brought inside the budget by returning layers to FP32")
        else:
            returned[name] = mixture
            fastest = min(fastest, seconds(mixture.engine))
    return returned, verdicts
