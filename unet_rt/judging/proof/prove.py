"""One command that shows what a machine can do: sections over kernels, networks and backends, and a report of them."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import backends
from ..._version import __version__
from ...building.job import Say
from ...errors import OutputError
from ...system.durable import Disk
from ...system.json import record_json
from .engines import NETWORKS, section_eager, section_engines
from .kernels import kernels_missing, section_kernels
from .run import Results, Runner
from .section import DeviceLost, Section

SCHEMA = 1
SECONDS = 590.0  # for everything: ten minutes
LOST = 70  # exit code of a section after whose step the device no longer answers


def sections(device: str) -> dict[str, tuple[Callable[[Section], None], float]]:
    """The sections for a device, in the order in which they are run, and the most seconds each may take."""
    found: dict[str, tuple[Callable[[Section], None], float]] = {"kernels": (section_kernels, 60.0)}
    usable = sorted(backends.names(), key=lambda name: name == "tensorrt")  # what crashes a device comes last
    for network in NETWORKS:
        for name in usable:
            found[f"{network}-{name}"] = functools.partial(section_engines, network=network, backend=name), 150.0
        if network == NETWORKS[0]:
            found["eager"] = section_eager, 120.0
    return found


def prove(
    device: str,
    machine: Mapping[str, Any],
    *,
    out: Path | None = None,
    seconds: float = SECONDS,
    only: Sequence[str] = (),
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Runs all sections, each in a process of its own, and returns the report, which ``out`` holds after each of them.

    Args:
        device: ``"cpu"``, ``"cuda:N"`` or ``"vulkan:N"``.
        machine: What there is to say of the machine.
        out: Where the report is written, after every section: an interruption leaves what was found until then.
        seconds: For everything; what there is no time for says so.
        only: Sections; none: all.
        say: Receives what is being done.

    Raises:
        BackendError: There is no such device.
        OutputError: The report cannot be written.
    """
    where, chosen = backends.device(device), dict[str, float]()
    begun = time.time()
    results: Results = {}
    for name, (_, most) in sections(where).items():
        if only and name not in only:
            continue
        reason = _missing(name, where)
        if reason is not None:
            results[name] = {"failed": [{"what": name, "why": reason}]}
        else:
            chosen[name] = most

    def report(found: Results, complete: bool = False) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "unet_rt": __version__,
            "device": where,
            "complete": complete,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
            "seconds": round(time.time() - begun, 1),
            "machine": dict(machine),
            "sections": {**results, **found},
        }

    def write(found: Results, complete: bool = False) -> None:
        say(f"{len(found)} of {len(chosen)} sections")
        if out is not None:
            _write(out, report(found, complete))

    with tempfile.TemporaryDirectory(prefix="unet-rt-proof-") as work:
        write({})
        runner = Runner(functools.partial(_command, Path(work), where), Path(work), seconds, write)
        found = runner.run(chosen)
        write(found, complete=True)
        return report(found, complete=True)


def run_section(name: str, device: str, work: Path, limit: float, say: Say) -> int:
    """A section in this process, for :func:`prove`; whatever it raises is in its figures. The exit code."""
    section = Section(name, device, work, time.time() + limit, say)
    begun = time.time()
    if hasattr(os, "getloadavg"):
        section.figures["load"] = round(
            os.getloadavg()[0], 2
        )  # others' work on this machine: times are to be read with it
    try:
        sections(device)[name][0](section)
    except DeviceLost as lost:
        section.figures["doing"] = str(lost)
        return LOST
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the record
        section.figures.setdefault("failed", []).append(
            {"what": name, "why": "".join(traceback.format_exception_only(error)).strip()}
        )
    finally:
        section.figures["seconds"] = round(time.time() - begun, 1)
        section.save()
    return 0


def _missing(name: str, device: str) -> str | None:
    """Why there is nothing to run for a section; None if there is."""
    if name == "kernels":
        return kernels_missing(device)
    if name == "eager":
        if not device.startswith(("cpu", "cuda")):
            return f"PyTorch has no {device}"
        return backends.get("eager").missing(device)
    return backends.get(name.partition("-")[2]).missing(device)


def _command(work: Path, device: str, name: str, limit: float, without: Sequence[str]) -> list[str]:
    """Of the process of a section."""
    asked = [name, device, str(work), str(limit)]
    return [sys.executable, "-m", "unet_rt", "doctor", "--section", *asked]


def _write(path: Path, report: Mapping[str, Any]) -> None:
    try:
        Disk().write_whole(path, (record_json(report) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); choose another place with --out") from error
