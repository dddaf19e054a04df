"""Results kept in a stage beside their output, so that a run that was cut off goes on, and shards share one."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from .._version import __version__
from ..contract.contract import Contract
from ..engine import exam
from ..engine.engine import Engine
from ..errors import ContractError, OutputError
from ..images.open import open_image
from ..images.reading import Reading
from ..images.source import Source
from ..outputs.labels import is_zarr_output, label_place
from ..outputs.output import remove_parts
from ..outputs.shape import size_of
from ..outputs.zarr import ZarrOutput
from ..outputs.zarr_metadata import NO_DATA
from ..system.durable import locked
from .compute import run_blocks
from .files import clear, shape_of
from .finish import check_targets, finish
from .plan import Plan, Record, make_plan, numbers_json
from .report import RunReport, class_share, label_names
from .request import Request, decision_of
from .stage import Stage, open_stage, shard_lock, stage_folder
from .store import BlockStore, PackedStore, ZarrStore
from .work import UNSEEN, Observer, Progress

Compute = Callable[[Plan, Sequence[int], Progress], RunReport]


def predict_staged(
    engine: Engine,
    source: Source,
    asked: Request,
    out: Path,
    *,
    compute: Compute | None = None,
    observer: Observer = UNSEEN,
) -> RunReport:
    """Computes what is missing of a result in a stage, and makes the output where that was the last of it.

    Args:
        engine, source, asked: As for :func:`make_plan`.
        out: The output.
        compute: Computes the missing blocks elsewhere, so that they have their marks afterwards; None: here.
        observer: Who is told how it goes on.
    """
    index, count = asked.share
    if asked.restart and count > 1:
        raise ContractError("--restart would throw away what other shards have done; restart one without --shard")
    if not stage_folder(out).exists():
        check_targets(asked)
    plan = None
    with shard_lock(out, index, count):
        try:
            stage, plan = begin(engine, source, asked, out, create=partial(check_targets, asked))
            state = _state(stage, plan, asked, out)
            report = _compute_missing(state, compute, observer)
            report.notes += plan.notes(asked.normalization)
            left = _add_all(report, state, shared=count > 1 or compute is not None)
            if left:
                every = len(plan.blocks)
                report.notes.append(f"shard {index}/{count} is done; {left} of {every} blocks are left to other shards")
            elif left == 0:
                stage.finish(partial(_finish, state, asked, out, report))
            if left is not None:
                clear(out)
            return report
        finally:
            if plan is not None:
                plan.close()


@dataclass(frozen=True)
class _State:
    """How far a result in a stage is.

    Attributes:
        store: Where its blocks are; None: the output is there, as a kill came before the end of the stage, or another
            shard is at it.
        mine, missing: Numbers of this shard's blocks, and of those that have no mark.
        complete: All blocks of all shards were there.
    """

    stage: Stage
    plan: Plan
    store: BlockStore | None
    mine: list[int]
    missing: list[int]
    complete: bool


def _state(stage: Stage, plan: Plan, asked: Request, out: Path) -> _State:
    refused = None
    try:
        check_targets(asked)  # first: another shard may find the last mark and make the output at any moment
    except OutputError as error:
        refused = error
    try:
        there = stage.finished()
    except FileNotFoundError as error:
        raise stage.gone() from error
    complete = len(there) == len(plan.blocks)
    moved = is_zarr_output(out) and asked.output != "instances" and complete and not stage.data.exists()
    if moved and not out.exists():
        raise OutputError(f"{stage.folder} is what is left of {out}, which has gone; use --restart to begin anew")
    if refused is not None and not complete:
        raise refused
    store = None if moved else open_store(stage, plan, out, marks=bool(there))
    index, count = asked.share
    mine = [n for n in range(len(plan.blocks)) if n % count == index]
    return _State(stage, plan, store, mine, [n for n in mine if n not in there], complete)


def _compute_missing(state: _State, compute: Compute | None, observer: Observer) -> RunReport:
    plan, store, missing = state.plan, state.store, state.missing
    done = sum(map(plan.blocks.tiles, state.mine)) - sum(map(plan.blocks.tiles, missing))
    if store is None:  # hence nothing is missing
        report = run_blocks(plan, (), lambda *_: None, done_tiles=done, observer=observer)
    elif compute is None or not missing:
        report = run_blocks(plan, missing, partial(state.stage.put, store), done_tiles=done, observer=observer)
    else:
        begun = time.perf_counter()

        def tell(now: int, total: int) -> None:
            if observer.progress is not None:
                observer.progress(done + now, done + total)

        report = compute(plan, missing, tell)
        report.seconds = time.perf_counter() - begun
    if len(missing) < len(state.mine):
        kept, every = len(state.mine) - len(missing), len(state.mine)
        report.notes.append(f"{kept} of {every} blocks were there from an earlier run")
    return report


def _add_all(report: RunReport, state: _State, *, shared: bool) -> int | None:
    """Puts what all blocks gave into a report.

    Returns:
        How many blocks are left to others; None where another process found none left, and made the output.
    """
    stage, plan = state.stage, state.plan
    try:
        left = len(plan.blocks) - len(stage.finished())
        total, makers = stage.tally(plan.decision.channels)
    except FileNotFoundError:
        if stage.folder.exists():
            raise
        if not shared:
            raise stage.gone() from None
        return None
    report.class_share = class_share(total, plan.decision, plan.contract)
    report.outside_range = total.outside_share()
    report.notes += _mixed(makers)
    return left


def _finish(state: _State, asked: Request, out: Path, report: RunReport) -> None:
    """Makes the output; its parts that killed processes have left go first. Nobody else is at them."""
    if state.store is not None:
        remove_parts(out)
        finish(state.plan, state.store, asked, report, again=state.complete)


def identity(engine: Engine, source: Source, asked: Request) -> dict[str, Any]:
    """Everything that decides the result, under the names that messages use."""
    decision = decision_of(asked, engine.spec)
    spec = replace(engine.spec, device=engine.spec.device.partition(":")[0])  # one of several GPUs decides nothing
    text = json.dumps(spec.to_json(), sort_keys=True).encode()
    # Without a folder nothing says which weights these are: such a stage is nobody's but this run's.
    graph = uuid4().hex if engine.folder is None else engine.folder.files["graph"]["sha256"]
    region = None
    if asked.region is not None:
        with open_image(asked.region, Contract(), Reading(indices=True), spatial=len(source.shape)) as opened:
            region = opened.fingerprint()
    return {
        "engine": [hashlib.sha256(text).hexdigest()[:16], graph],
        "image": source.fingerprint() or _digest(source),
        "reading of the image": source.reading,
        "output": [asked.output, {**asdict(decision), "dtype": str(decision.dtype)}],
        "normalization": None if asked.normalization is None else asdict(asked.normalization),
        "test-time augmentation": asked.tta,
        "head": asked.head,
        "pixel size": [asked.resample, asked.size_um],
        "region": region,
        "tile": asked.tile,
    }


def _digest(source: Source) -> str:
    """Of all pixels: what an array is told by."""
    total = hashlib.sha256(f"{source.shape} {source.dtype}".encode())
    for plane, start, stop in source.bands():
        total.update(np.ascontiguousarray(source.read_band(plane, start, stop)).data)
    return total.hexdigest()


def _mixed(makers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say of blocks that were not all computed by the same libraries on the same processor or device.

    Each of them ran an engine that was proven there, so that nothing is refused; but only one of a kind gives equal bits.
    """
    different = {}
    for key in dict.fromkeys(key for maker in makers for key in maker):
        values = {str(maker.get(key)) for maker in makers}
        if len(values) > 1:
            different[key] = key if key == "features" else f"{key} ({', '.join(sorted(values))})"
    if not different:
        return []
    return [f"blocks were computed with more than one {' and '.join(different.values())}: they may differ by rounding"]


def begin(
    engine: Engine, source: Source, asked: Request, out: Path, *, create: Callable[[], None]
) -> tuple[Stage, Plan]:
    """The stage of a result, begun here or before, and the plan that it records.

    ``create`` is asked before a stage is begun; it raises where that must not be.
    """

    def settle() -> dict[str, Any]:
        create()
        plan = make_plan(engine, source, asked)
        plan.close()
        return {"plan": plan.blocks.to_json(), "numbers": numbers_json(plan.affines)}

    spec = engine.spec
    maker = {"unet-rt": __version__, **exam.fingerprint(spec.backend, engine.session_version, spec.device)}
    stage = open_stage(out, identity(engine, source, asked), settle, maker=maker, restart=asked.restart)
    record = Record(stage.run["plan"], stage.run["numbers"], stage.kept)
    return stage, make_plan(engine, source, asked, record)


def open_store(stage: Stage, plan: Plan, out: Path, *, marks: bool = True) -> BlockStore:
    """Where the blocks of a stage are kept: as its output wants them. Made where there are no ``marks`` yet."""
    if marks and not stage.data.exists():
        raise OutputError(f"{stage.folder} has marks of finished blocks and no data; use --restart to begin anew")
    if not is_zarr_output(out):
        return PackedStore(stage.data, plan.cuts)
    if not stage.data.exists():
        with locked(stage.folder / "start.lock"):
            if not stage.data.exists():
                started = stage.data.with_name("data.begun")
                shutil.rmtree(started, ignore_errors=True)
                ZarrOutput.create(
                    started, shape_of(plan), plan.blocks.chunk, plan.image.metadata, size_of(plan.image, plan.shape),
                    over=label_place(out), **_meaning(plan),
                )  # fmt: skip
                stage.rename(started, stage.data)
    return ZarrStore(ZarrOutput.open(stage.data), plan.place)


def _meaning(plan: Plan) -> dict[str, Any]:
    """What values or channels of the result mean, as :meth:`ZarrOutput.create` takes it; nothing of unnamed channels."""
    decision, contract = plan.decision, plan.contract
    mask = decision.dtype == np.uint8
    if mask and not decision.channels:
        names = label_names(decision, contract)
        return {"names": names | ({int(plan.nodata): NO_DATA} if plan.image.gaps else {})}
    probabilities = decision.op in ("softmax", "sigmoid") or contract.output_is == "probabilities"
    if len(contract.classes) < decision.channels or not (mask or probabilities):
        return {}
    names = dict(
        enumerate(contract.classes[-decision.channels :])
    )  # the one channel of two classes is that of the second
    return {"names": names, "highest": max(decision.values) if mask else 1}
