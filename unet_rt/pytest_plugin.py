"""Parity as tests of pytest's own, one per image: installed with unet-rt, silent until an engine is named.

    pytest --unet-rt-engine model.urt --unet-rt-images images [--unet-rt-baseline released.onnx] [--unet-rt-budget ...]

Without images the engine sits its exam: one test. A test that fails says which bounds were missed, and draws the window
that differs most into ``unet-rt-pictures``; the file is the test's property ``picture``, and an attachment in JUnit files.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from .errors import UnetRtError

PICTURES = "unet-rt-pictures"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, whose defaults are no engine and nothing to do."""
    group = parser.getgroup("unet-rt", "parity of an engine, one test per image")
    group.addoption("--unet-rt-engine", metavar="DIR", help="engine folder to hold against its baseline")
    group.addoption(
        "--unet-rt-baseline", metavar="MODEL", help="ONNX file or engine folder (default: the engine's own)"
    )
    group.addoption("--unet-rt-images", metavar="PATH", nargs="+", help="files or folders (default: the engine's exam)")
    group.addoption("--unet-rt-budget", metavar="KEY=VALUE", nargs="+", help="what may differ (default: as at build)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds a test per image behind those that were collected; -k and -m choose among all of them."""
    engine, images = config.getoption("--unet-rt-engine"), config.getoption("--unet-rt-images")
    if engine is None:
        if images is not None:
            raise pytest.UsageError("--unet-rt-images without --unet-rt-engine; name the engine folder as well")
        return
    from .baseline.samples import sample_images
    from .engine.budget import parse_budget

    try:
        found = [None] if images is None else sample_images(images)
        parse_budget(config.getoption("--unet-rt-budget") or [])
    except UnetRtError as error:
        raise pytest.UsageError(str(error)) from error
    for image in found:
        path = Path(engine if image is None else image)
        name = "exam" if image is None else path.name
        items.append(ParityTest.from_parent(session, name=name, path=path, image=image, nodeid=f"unet-rt::{name}"))


class ParityTest(pytest.Item):
    """One image of an engine against the baseline, or its exam."""

    def __init__(self, *, image: Any, **options: Any) -> None:
        super().__init__(**options)
        self.image = image

    def runtest(self) -> None:
        """Verifies, and keeps the picture where the budget is missed."""
        from .engine.budget import parse_budget
        from .judging.verify import verify

        option = self.config.getoption
        with tempfile.TemporaryDirectory(prefix="unet-rt-") as work:
            report = verify(
                option("--unet-rt-engine"),
                None if self.image is None else [self.image],
                baseline=option("--unet-rt-baseline"),
                budget=parse_budget(option("--unet-rt-budget") or []),
                picture=Path(work) / "worst.png",
                picture_always=False,
            )
            if report.picture is not None:
                self._attach(report.picture)
        if not report.accepted:
            raise AssertionError("; ".join(report.verdict.reasons))

    def _attach(self, picture: Path) -> None:
        """Keeps a picture where reports find it."""
        place = self.config.invocation_params.dir / PICTURES / f"{self.path.stem}.png"
        place.parent.mkdir(exist_ok=True)
        shutil.move(picture, place)
        self.user_properties.append(("picture", str(place)))
        self.add_report_section("call", "stdout", f"[[ATTACHMENT|{place}]]")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The bounds that were missed, or what is wrong with the question, without a traceback."""
        error = excinfo.value
        return str(error) if isinstance(error, AssertionError | UnetRtError) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where the test is from, and its name."""
        return self.path, None, f"unet-rt: {self.name}"
