"""Parity as tests of pytest's own, one per image: installed with unet-rt, silent until an engine is named.

    pytest --unet-rt-engine model.urt --unet-rt-images images [--unet-rt-baseline released.onnx] [--unet-rt-budget ...]

Without images the engine sits its exam: one test. A test that fails says which bounds were missed, and draws the window
that differs most into ``unet-rt-pictures``; the file is the test's property ``picture``, and an attachment in JUnit files.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

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


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds a test per image behind those that were collected."""
    engine, images = config.getoption("--unet-rt-engine"), config.getoption("--unet-rt-images")
    if engine is None:
        if images is not None:
            import pytest

            raise pytest.UsageError("--unet-rt-images without --unet-rt-engine; name the engine folder as well")
        return
    items.extend(_tests(session, [None] if images is None else images))


def _tests(session: pytest.Session, images: list[Any]) -> list[pytest.Item]:
    import pytest

    from .baseline.samples import sample_images
    from .engine.budget import parse_budget
    from .errors import UnetRtError

    config = session.config
    try:
        found = images if images == [None] else sample_images(images)
        budget = parse_budget(config.getoption("--unet-rt-budget") or [])
    except UnetRtError as error:
        raise pytest.UsageError(str(error)) from error

    class ParityTest(pytest.Item):
        """One image of an engine against the baseline."""

        def __init__(self, *, image: Any, **options: Any) -> None:
            super().__init__(**options)
            self.image = image

        def runtest(self) -> None:
            from .judging.verify import verify

            folder = config.invocation_params.dir / PICTURES
            with tempfile.TemporaryDirectory(prefix="unet-rt-") as work:
                report = verify(
                    config.getoption("--unet-rt-engine"),
                    None if self.image is None else [self.image],
                    baseline=config.getoption("--unet-rt-baseline"),
                    budget=budget,
                    picture=Path(work) / "worst.png",
                    picture_always=False,
                )
                if report.picture is not None:
                    folder.mkdir(exist_ok=True)
                    place = folder / f"{self.path.stem}.png"
                    shutil.move(report.picture, place)
                    report = replace(report, picture=place)
            if report.picture is not None:
                self.user_properties.append(("picture", str(report.picture)))
                self.add_report_section("call", "stdout", f"[[ATTACHMENT|{report.picture}]]")
            if not report.accepted:
                raise AssertionError("; ".join(report.verdict.reasons))

        def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
            error = excinfo.value
            return (
                str(error) if isinstance(error, AssertionError | UnetRtError) else super().repr_failure(excinfo, style)
            )

        def reportinfo(self) -> tuple[Path, None, str]:
            return self.path, None, f"unet-rt: {self.name}"

    def test(image: Any) -> pytest.Item:
        path = Path(config.getoption("--unet-rt-engine") if image is None else image)
        name = "exam" if image is None else path.name
        made: pytest.Item = ParityTest.from_parent(
            session, name=name, path=path, image=image, nodeid=f"unet-rt::{name}"
        )
        return made

    return [test(image) for image in found]
