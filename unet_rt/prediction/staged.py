"""Results kept in a stage beside their output, so that a run that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
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
from ..images.source import Source
from ..outputs.output import remove_parts
from ..outputs.shape import size_of
from ..outputs.zarr import ZarrOutput
from ..outputs.zarr_metadata import NO_DATA
from ..system.durable import locked
from ..tiling.decision import Decision, decide
from .blocks import Block
from .compute import run_blocks
from .finish import _shape, clear, is_zarr
from .plan import Prepared, close, numbers, prepare
from .report import RunReport, class_share, label_names
from .request import Array, Request
from .stage import Stage, open_stage, shard_lock
from .store import PackedStore, Store, ZarrStore
from .work import Progress, Spans, Tally

Compute = Callable[[Prepared, Sequence[int], Progress], RunReport]


def identity(engine: Engine, source: Source, decision: Decision, asked: Request) -> dict[str, Any]:
    """Everything that decides the result, under the names that messages use."""
    spec = replace(engine.spec, device=engine.spec.device.partition(":")[0])  # one of several GPUs decides nothing
    text = json.dumps(spec.to_json(), sort_keys=True).encode()
    # Without a folder nothing says which weights these are: such a stage is nobody's but this run's.
    graph = uuid4().hex if engine.folder is None else engine.folder.files["graph"]["sha256"]
    region = None
    if asked.region is not None:
        with open_image(asked.region, Contract(), spatial=len(source.shape)) as opened:
            region = opened.fingerprint()
    return {
        "engine": [hashlib.sha256(text).hexdigest()[:16], graph],
        "image": source.fingerprint() or _digest(source),
        "reading of the image": source.reading,
        "output": [asked.output, {**asdict(decision), "dtype": str(decision.dtype)}],
        "normalization": asdict(asked.normalization),
        "test-time augmentation": asked.tta,
        "head": asked.head,
        "pixel size": [asked.resample, asked.pixel_size_um],
        "region": region,
        "tile": asked.tile,
    }


def _digest(source: Source) -> str:
    """Of all pixels: what an array is told by."""
    total = hashlib.sha256(f"{source.shape} {source.dtype}".encode())
    for plane, start, stop in source.bands():
        total.update(np.ascontiguousarray(source.read_band(plane, start, stop)).data)
    return total.hexdigest()


def in_stage(
    engine: Engine,
    source: Source,
    asked: Request,
    out: Path,
    make: Callable[[Prepared, Store, bool], None],
    check: Callable[[], None],
    *,
    restart: bool = False,
    compute: Compute | None = None,
    progress: Progress | None = None,
    trace: Spans | None = None,
) -> RunReport:
    """Computes what is missing of a result in a stage, and has the output made where that was the last of it.

    Args:
        engine, source, asked: As for :func:`prepare`.
        out: The output.
        make: Makes the output from the finished blocks; told whether an earlier run may have made it already.
        check: Raises where something is there already that ``make`` would replace.
        restart: Throw away what an interrupted run has left.
        compute: Computes the missing blocks elsewhere, so that they have their marks afterwards; None: here.
        progress, trace: As for :func:`unet_rt.prediction.predict.predict`.
    """
    index, count = asked.shard
    if restart and count > 1:
        raise ContractError("--restart would throw away what other shards have done; restart one without --shard")
    made = None
    with shard_lock(out, index, count):
        try:
            stage, made = begun(engine, source, asked, out, restart=restart, create=check)
            refused = None
            try:
                check()  # first: another shard may find the last mark and make the output at any moment
            except OutputError as error:
                refused = error
            try:
                there = stage.finished()
            except FileNotFoundError as error:
                raise stage.gone() from error
            complete = len(there) == len(made.plan)
            moved = is_zarr(out) and asked.output != "instances" and complete and not stage.data.exists()
            if moved and not out.exists():
                raise OutputError(
                    f"{stage.folder} is what is left of {out}, which has gone; use --restart to begin anew"
                )
            if refused is not None and not complete:
                raise refused
            store = None if moved else open_store(stage, made, out, marks=bool(there))
            mine = [n for n in range(len(made.plan)) if n % count == index]
            missing = [n for n in mine if n not in there]
            done = sum(made.plan.tiles(n) for n in mine if n in there)
            begin = time.perf_counter()
            if compute is None or not missing or store is None:
                put = _nothing if store is None else partial(stage.put, store)
                report = run_blocks(made, missing, put, done_tiles=done, progress=progress, trace=trace)
            else:

                def told(now: int, total: int) -> None:
                    if progress is not None:
                        progress(done + now, done + total)

                report = compute(made, missing, told)
                report.seconds = time.perf_counter() - begin
            if len(missing) < len(mine):
                report.notes.append(f"{len(mine) - len(missing)} of {len(mine)} blocks were there from an earlier run")
            try:
                left = len(made.plan) - len(stage.finished())
                total, makers = stage.tally(made.decision.channels)
            except FileNotFoundError:
                if stage.folder.exists():
                    raise
                if count == 1 and compute is None:
                    raise stage.gone() from None
                return report  # another shard found all marks set, and made the output
            report.class_share = class_share(total, made.decision, engine.spec)
            report.outside_range = total.outside_share()
            report.notes += _mixed(makers)
            if left:
                report.notes.append(
                    f"shard {index}/{count} is done; {left} of {len(made.plan)} blocks are left to other shards"
                )
            elif (
                store is None
            ):  # the output is there: a kill came before the end of the stage, or another shard is at it
                stage.finish(lambda: None)
            else:
                stage.finish(partial(_finish, make, made, store, complete, out))
            clear(out)
            return report
        finally:
            if made is not None:
                close(made)


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


def _finish(
    make: Callable[[Prepared, Store, bool], None], made: Prepared, store: Store, again: bool, out: Path
) -> None:
    """Makes the output; its parts that killed processes have left go first. Nobody else is at them."""
    remove_parts(out)
    make(made, store, again)


def _nothing(block: Block, values: Array, tally: Tally) -> None:
    """Keeps nothing: there is nothing left to compute."""


def begun(
    engine: Engine,
    source: Source,
    asked: Request,
    out: Path,
    *,
    restart: bool = False,
    create: Callable[[], None],
) -> tuple[Stage, Prepared]:
    """The stage of a result, begun here or before, and the result.

    ``create`` is asked before a stage is begun; it raises where that must not be.
    """
    fresh: list[Prepared] = []

    def plan() -> dict[str, Any]:
        create()
        fresh.append(prepare(engine, source, asked))
        return {"plan": fresh[0].plan.to_json(), "numbers": numbers(fresh[0].affines)}

    kind: Any = "mask" if asked.output == "instances" else asked.output
    decision = decide(engine.spec.contract, engine.spec.outputs[0].channels, kind, asked.mask_values)
    spec = engine.spec
    maker = {"unet-rt": __version__, **exam.fingerprint(spec.backend, engine.session_version, spec.device)}
    stage = open_stage(out, identity(engine, source, decision, asked), plan, maker=maker, restart=restart)
    for other in fresh:
        close(other)
    return stage, prepare(engine, source, asked, stage)


def open_store(stage: Stage, made: Prepared, out: Path, *, marks: bool = True) -> Store:
    """Where the blocks of a stage are kept: as its output wants them. Made where there are no ``marks`` yet."""
    if marks and not stage.data.exists():
        raise OutputError(f"{stage.folder} has marks of finished blocks and no data; use --restart to begin anew")
    if not is_zarr(out):
        return PackedStore(stage.data, made.cuts)
    if not stage.data.exists():
        with locked(stage.folder / "start.lock"):
            if not stage.data.exists():
                begun = stage.data.with_name("data.begun")
                shutil.rmtree(begun, ignore_errors=True)
                ZarrOutput.create(
                    begun, _shape(made), made.plan.chunk, made.image.metadata, size_of(made.image, made.shape),
                    **_meaning(made),
                )  # fmt: skip
                stage.rename(begun, stage.data)
    return ZarrStore(ZarrOutput.open(stage.data), made.place)


def _meaning(made: Prepared) -> dict[str, Any]:
    """What values or channels of the result mean, as :meth:`ZarrOutput.create` takes it; nothing of unnamed channels."""
    decision, contract = made.decision, made.engine.spec.contract
    mask = decision.dtype == np.uint8
    if mask and not decision.channels:
        names = label_names(decision, contract)
        return {"names": names | ({int(made.nodata): NO_DATA} if made.image.gaps else {})}
    probabilities = decision.op in ("softmax", "sigmoid") or contract.output_is == "probabilities"
    if len(contract.classes) < decision.channels or not (mask or probabilities):
        return {}
    names = dict(
        enumerate(contract.classes[-decision.channels :])
    )  # the one channel of two classes is that of the second
    return {"names": names, "highest": max(decision.values) if mask else 1}
