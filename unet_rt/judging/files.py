"""What verify measured, as files that CI services read: JUnit's XML and Markdown."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

from ..engine import parity as parity_module
from ..engine.parity import ImageParity, Verdict
from ..errors import OutputError
from ..system.durable import Disk
from .verify import VerifyReport


def write_junit(report: VerifyReport, path: Path) -> None:
    """Writes a report as a JUnit suite: a case per window, one for all together, one for the speed where it was judged.

    Raises:
        OutputError: The file cannot be written.
    """
    cases = [(image.title or "exam", _alone(report, image).reasons, "") for image in _judged(report)]
    cases.append(("all images inside the budget", report.verdict.reasons, _attachment(report)))
    if report.speed is not None:
        cases.append(("speed", () if report.speed.accepted else (report.speed.sentence,), ""))
    failures = sum(bool(reasons) for _, reasons, _ in cases)
    numbers = {"tests": str(len(cases)), "failures": str(failures), "errors": "0"}
    suite = ElementTree.Element("testsuite", {"name": f"unet-rt verify {report.engine}", **numbers})
    for name, reasons, attachment in cases:
        case = ElementTree.SubElement(suite, "testcase", {"classname": str(report.engine), "name": name})
        if reasons:
            ElementTree.SubElement(case, "failure", {"message": reasons[0]}).text = "\n".join(reasons)
        if attachment:
            ElementTree.SubElement(case, "system-out").text = attachment
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    _write(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def write_markdown(report: VerifyReport, path: Path) -> None:
    """Writes a report as Markdown: the verdict, why, a row per window, and the worst one's picture beside the file.

    Raises:
        OutputError: The file cannot be written.
    """
    verdict = report.verdict
    lines = [
        f"## {'✅' if report.accepted else '❌'} {report.engine} is {'inside' if report.accepted else 'outside'} its budget"
    ]
    lines += ["", *(f"- {reason}" for reason in verdict.reasons)]
    if report.speed is not None:
        lines.append(f"- {report.speed.sentence}")
    lines += ["", "| image | labels changed | lowest Dice | largest error | |", "|---|---:|---:|---:|---|"]
    for image in _judged(report):
        change = "" if image.label_change is None else f"{image.label_change:.4%}"
        dice = f"{min(image.dice.values()):.4f}" if image.dice else ""
        missed = "❌" if _alone(report, image).reasons else ""
        lines.append(f"| {_cell(image.title or 'exam')} | {change} | {dice} | {image.relative:.2e} | {missed} |")
    if report.picture is not None:
        lines += ["", f"![the window that differs most]({_beside(report.picture, path)})"]
    _write(path, "\n".join(lines) + "\n")


def _judged(report: VerifyReport) -> list[ImageParity]:
    return [image for image in report.verdict.images if image.judged]


def _alone(report: VerifyReport, image: ImageParity) -> Verdict:
    """What one window would have been said to be, were it the only one."""
    return parity_module.judge([image], report.budget)


def _attachment(report: VerifyReport) -> str:
    """The picture in the form that readers of JUnit files take for an attachment."""
    return "" if report.picture is None else f"[[ATTACHMENT|{report.picture.resolve()}]]"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _beside(picture: Path, path: Path) -> str:
    """The picture as a link from the folder of the file."""
    try:
        return Path(os.path.relpath(picture.resolve(), path.resolve().parent)).as_posix()
    except ValueError:  # on another drive
        return picture.resolve().as_uri()


def _write(path: Path, text: str) -> None:
    try:
        Disk().write_whole(path, text.encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); choose another place") from error
