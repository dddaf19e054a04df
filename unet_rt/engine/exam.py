"""The proof that travels with an engine: its record of parity, and the exam that renews it on other machines."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from ..errors import EngineError, ParityError, size_text
from ..system import facts
from ..system.durable import Disk
from ..system.json import from_json, record_json
from .budget import Budget
from .parity import ImageParity, Verdict, compare_outputs, judge

if TYPE_CHECKING:
    from .engine import Engine
    from .folder import EngineFolder
    from .spec import EngineSpec


log = logging.getLogger("unet_rt")
Array = npt.NDArray[Any]


def fingerprint(backend: str, version: str, device: str) -> dict[str, Any]:
    """What a result may depend on besides the engine's bytes: library version, processor, device."""
    if device.startswith("vulkan"):
        from ..backends.ncnn.library import vulkan_devices, vulkan_index

        found = vulkan_devices()[vulkan_index(device)]
        return {"backend": backend, "version": version, "gpu": found.name, "driver": found.driver}
    if facts.is_cuda(device):
        cuda = facts.cuda()
        index = facts.cuda_index(device)
        gpu = cuda.devices[index] if index < len(cuda.devices) else ""
        return {"backend": backend, "version": version, "gpu": gpu, "driver": cuda.identity}
    return {
        "backend": backend,
        "version": version,
        "device": device,
        "cpu": facts.cpu_name(),
        "features": sorted(facts.cpu_features()),
    }


def check_record(folder: EngineFolder) -> None:
    """Raises EngineError where the record of parity is missing, belongs to other bytes, or misses its own budget."""
    record = folder.parity
    way_out = "build the engine again with --samples, or load it with --accept-unverified"
    if record is None:
        raise EngineError(f"{folder.path} carries no record of parity; {way_out}")
    try:
        graph, accepted, kind = record["graph_sha256"], record["verdict"]["accepted"], record["kind"]
        budget = recorded_budget(folder).of(folder.spec.precision)
        missed = _missed(record["verdict"], budget)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{folder.path}: the record of parity is damaged ({error}); {way_out}") from error
    if graph != folder.files["graph"]["sha256"]:
        raise EngineError(f"{folder.path}: the record of parity belongs to another graph; {way_out}")
    if not accepted or missed:
        raise EngineError(f"{folder.path}: the recorded parity misses its budget; {way_out}")
    if kind == "synthetic" and folder.spec.precision != record.get("baseline", {}).get("precision", "fp32"):
        raise EngineError(
            f"{folder.path}: parity on synthetic tiles is accepted of the baseline's own precision only; {way_out}"
        )


def sit_if_elsewhere(engine: Engine, *, made_again: bool = False) -> None:
    """Sits the exam where processor, device or library version differ from those on record.

    What it gave on such a machine before holds for the same bytes only: a plan that was ``made_again`` sits it each time.
    """
    folder = engine.folder
    if folder is None or folder.parity is None:
        return
    here = fingerprint(engine.spec.backend, engine.session_version, engine.spec.device)
    there = folder.parity.get("fingerprint")
    if here == there and not made_again:
        return
    changed = ", ".join(key for key in here if not isinstance(there, Mapping) or there.get(key) != here[key])
    if not made_again and _passed_here(folder, here):
        return
    exam = folder.exam()
    if exam is None:
        if engine.spec.precision == "fp32":
            log.warning(
                "%s: built elsewhere (%s differs) and carries no exam; run unet-rt verify on images of yours",
                folder.path,
                changed,
            )
            return
        raise EngineError(
            f"{folder.path}: built elsewhere ({changed} differs) and carries no exam; "
            "build it here, or load it with --accept-unverified"
        )
    verdict = sit(engine, exam)
    if not verdict.accepted:
        raise ParityError(
            f"{folder.path}: fails its exam on this machine: {'; '.join(verdict.reasons)}; build it again here"
        )
    log.info("%s: built elsewhere (%s differs); passed its exam here", folder.path, changed)
    if not made_again:
        _keep_row(folder, here, verdict)


def recorded_budget(folder: EngineFolder) -> Budget:
    """The budget that the record of an engine names; the defaults where there is no record.

    Raises:
        EngineError: The record is damaged.
    """
    if folder.parity is None:
        return Budget()
    return from_json(
        Budget,
        folder.parity.get("budget"),
        where=f"{folder.path}: the record of parity names no budget that can be read by this version",
        error=EngineError,
        way_out="build the engine again, or name one with --budget",
    )


def _row(folder: EngineFolder, here: Mapping[str, Any]) -> Path:
    """The file beside an engine's own that says how its graph did on a machine; no part of the engine."""
    machine_id = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()
    return folder.path / f"row-{folder.files['graph']['sha256'][:12]}-{machine_id[:12]}.json"


def _keep_row(folder: EngineFolder, here: Mapping[str, Any], verdict: Verdict) -> None:
    """Writes what the exam gave here, so that it need not be sat at every load; folders may be read-only."""
    row = {
        "schema": 1,
        "graph_sha256": folder.files["graph"]["sha256"],
        "exam_sha256": folder.files["exam"]["sha256"],
        "fingerprint": dict(here),
        "machine": facts.describe(),
        "verdict": verdict.to_json(),
    }
    path = _row(folder, here)
    try:
        Disk().write_whole(path, record_json(row).encode())
    except OSError as error:
        log.info("%s: what the exam gave here is not kept (%s)", folder.path, error.strerror)


def _passed_here(folder: EngineFolder, here: Mapping[str, Any]) -> bool:
    """Whether this very graph has passed this very exam on such a machine before, and holds the budget on record."""
    if folder.parity is None or "exam" not in folder.files:
        return False
    try:
        row = json.loads(_row(folder, here).read_text(encoding="utf-8"))
        verdict, budget = row["verdict"], recorded_budget(folder).of(folder.spec.precision)
        same = (
            row["fingerprint"] == dict(here)
            and row["graph_sha256"] == folder.files["graph"]["sha256"]
            and row["exam_sha256"] == folder.files["exam"]["sha256"]
        )
        return bool(same and verdict["accepted"]) and not _missed(verdict, budget)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EngineError):
        return False  # no row, or none that can be trusted: the exam is sat


def _missed(verdict: Mapping[str, Any], budget: Budget) -> bool:
    """Whether the numbers of a written verdict are outside a budget, whatever the verdict says of itself."""
    change, dice = verdict["label_change"], verdict["dice"]
    values = [i for i in verdict["images"] if i["label_change"] is None and i["judged"]]
    if any(not float(image["relative"]) <= budget.error for image in values):  # a regression beside labels is one, too
        return True
    if change is None:  # a regression
        return not float(verdict["relative"]) <= budget.error
    return bool(change > budget.labels or (dice is not None and dice < budget.dice))


def sit(engine: Engine, exam: Mapping[str, Array]) -> Verdict:
    """Runs the exam's tiles one by one and judges them by the budget on record."""
    folder = engine.folder
    budget = Budget() if folder is None else recorded_budget(folder)
    results: list[ImageParity] = []
    for k, tile in enumerate(exam["input"]):
        wanted = [exam[f"output_{n}"][k] for n in range(len(engine.spec.outputs))]
        results += compare_tile(engine, engine.spec, tile, wanted, f"exam tile {k}")
    return judge(results, budget.of(engine.spec.precision))


def compare_tile(
    engine: Engine, spec: EngineSpec, tile: Array, wanted: Sequence[Array], name: str
) -> list[ImageParity]:
    """Agreement of an engine with the baseline's outputs ``wanted`` (K, *spatial) for a tile (C, *spatial).

    The smaller tile of a plan is run on the tile's first corner: there it sees the same edges, and but for its halo at
    the others its outputs are the same.
    """
    found = compare_outputs(wanted, [y[0] for y in engine.run(tile[None])], spec, name)
    for smaller in spec.tiles[1:]:
        got = engine.run(tile[(None, slice(None), *(slice(n) for n in smaller))])
        corners = [
            (slice(None), *(
                slice(f.out_size(n) - (f.halo[1] if n < whole else 0))
                for f, n, whole in zip(output.field, smaller, tile.shape[1:], strict=True)
            ))
            for output in spec.used_outputs()
        ]  # fmt: skip
        found += compare_outputs(
            [y[corner] for y, corner in zip(wanted, corners, strict=True)],
            [y[0][corner] for y, corner in zip(got, corners, strict=True)],
            spec,
            f"{name}, its corner of {size_text(smaller)} px",
        )
    return found
