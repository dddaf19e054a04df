"""The parity check of ``unet-rt verify`` for a user's own test suite: three lines in a pytest file.

Example:
    from unet_rt.testing import assert_parity

    def test_masks_are_those_of_the_release():
        assert_parity("nuclei.urt", images="tests/images", baseline="released.onnx")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .engine.budget import Budget
from .judging.verify import VerifyReport, verify


def assert_parity(
    engine: str | Path,
    images: Any = None,
    *,
    baseline: str | Path | None = None,
    budget: Budget | None = None,
    **options: Any,
) -> VerifyReport:
    """Raises AssertionError, with every bound that was missed, where an engine is outside its budget.

    Args:
        engine: Engine folder.
        images: Files, folders or arrays; None: the engine's own exam.
        baseline: ONNX file whose masks are to be kept, such as that of the last release; None: the engine's own, which
            notices another machine and no other network.
        budget: What is allowed; None: the budget on record.
        **options: As for :func:`unet_rt.verify`.
    """
    report = verify(engine, images, baseline=baseline, budget=budget, **options)
    if not report.accepted:
        raise AssertionError(f"{engine} is outside its budget: " + "; ".join(report.verdict.reasons))
    return report
