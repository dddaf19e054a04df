"""Build, step 3: a file in FP16 or BF16 was widened to FP32; its own answers are what that is held against."""

from __future__ import annotations

from contextlib import closing

from ..baseline.model import own_engine
from ..baseline.results import raw_results
from ..baseline.tiles import whole_grid
from ..engine import parity as parity_module
from ..errors import BackendError, ParityError
from .job import BuildJob
from .tiling import FEWEST_WINDOWS, Tiling


def hold_to_file(job: BuildJob, tiling: Tiling) -> None:
    """Compares the widened graph with the file as given, in ONNX Runtime, on the first windows.

    Raises:
        ParityError: They differ by more than FP16 is allowed to: activations leave its range, most likely.
    """
    model, spec = job.model, tiling.spec
    kind = model.precision.upper()
    note = f"{model.given.name} computes in {kind}: widened to FP32 for the baseline, every weight as it is"
    try:
        own = own_engine(model, spec, threads=job.threads)
        if own is None:
            return
        job.remarks.say(f"holding the widened graph against {model.given.name}")
        images = []
        with closing(own):
            for sample, values in list(zip(tiling.results.samples, tiling.results.values, strict=True))[
                :FEWEST_WINDOWS
            ]:
                grid = whole_grid(spec, sample.shape) if spec.runs_whole else spec.grid(sample.shape, spec.tile)
                found = raw_results(own, sample, grid, job.threads)
                images += parity_module.compare_outputs(values, found, spec, sample.name)
    except BackendError as error:
        job.remarks.notes.append(f"{note}; the file itself was not compared: {error}")
        return
    verdict = parity_module.judge(images, job.budget.of("fp16"))
    if not verdict.accepted:
        raise ParityError(
            f"{model.given.name} computes in {kind}, and its own answers in ONNX Runtime are not those of the same weights "
            f"in FP32: {verdict.reasons[0]}; give the FP32 graph that it was made from, or allow more with --budget"
        )
    differ = f"errors of {verdict.relative:.1e} of its range" if verdict.label_change is None else (
        f"{verdict.label_change:.4%} of labels"
    )  # fmt: skip
    job.remarks.notes.append(f"{note}; the file itself differs in {differ}")
