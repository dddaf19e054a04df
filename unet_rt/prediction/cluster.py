"""Blocks of one result on several processes or machines, by Dask (dask.distributed).

Workers open engine, image and stage by their paths, once each, so all of them need the same file system. What is sent is the
numbers of a few blocks; a block is finished when its mark lies in the stage, so a worker may be lost at any time (Dask runs
its share again elsewhere), and so may the client: the same command goes on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

from ..engine.engine import Engine, LoadOptions
from ..engine.folder import read_folder
from ..engine.load import load
from ..errors import BackendError, ContractError
from ..images.listing import where_of
from ..images.open import open_image
from ..images.source import Source
from ..system import facts, limits
from .compute import run_blocks
from .plan import Plan
from .report import RunReport, merge_reports
from .request import Request, engine_form
from .stage import Stage
from .staged import Compute, begin, open_store
from .store import BlockStore
from .work import Progress

PER_WORKER = 8  # shares of the blocks per worker: the last ones to finish wait for at most an eighth of their work


@dataclass(frozen=True)
class Job:
    """What a worker needs to know: paths and plain values.

    Attributes:
        engine, options: The engine folder, and how it was loaded here.
        image: Path or URL of the image.
        asked: What is asked for, settled; threads are those of one worker.
        out: The output, beside which the stage lies.
        token: Another one for every run: what a worker holds open is of one run.
    """

    engine: str
    options: LoadOptions
    image: str
    asked: Request
    out: str
    token: str


def missing() -> BackendError:
    return BackendError("dask.distributed is missing, which --scheduler needs; pip install 'unet-rt[dask]'")


def delegate(engine: Engine, image: Any, asked: Request, out: Path) -> tuple[Request, Compute]:
    """What a scheduler's workers are asked for, and the function that has them compute it.

    Raises:
        ContractError: ``asked.scheduler`` is none, or engine and image are not on disk, where workers could open them.
    """
    scheduler = asked.scheduler or ""
    count = processes(scheduler)
    if engine.folder is None or not isinstance(image, (str, Path)):
        raise ContractError("a scheduler's workers open engine and image by their paths; give both as paths")
    asked = replace(
        asked,
        processes=count,
        threads=asked.threads or (max(1, limits.threads() // count) if count > 1 else 0),
    )
    folder = str(engine.folder.path.resolve())
    region = None if asked.region is None else where_of(asked.region)
    theirs = replace(asked, restart=False, region=region)
    job = Job(folder, engine.options, where_of(image), theirs, str(out.resolve()), uuid4().hex)
    return asked, lambda plan, numbers, progress: compute(scheduler, job, plan, numbers, progress)


def compute(scheduler: str, job: Job, plan: Plan, numbers: Sequence[int], progress: Progress | None) -> RunReport:
    """Has workers compute blocks; returns when all of them have their marks.

    Args:
        scheduler: ``local:N`` starts N processes here, which share the threads; ``tcp://host:port`` names a scheduler.
        job: What workers need to know.
        plan: The result.
        numbers: Of the blocks that are missing.
        progress: Called with (tiles done, tiles in all) of these blocks.

    Raises:
        BackendError: Dask is missing, the scheduler cannot be reached or has no worker, or a block failed on one.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise missing() from error
    tiles = {n: plan.blocks.tiles(n) for n in numbers}
    done, total = 0, sum(tiles.values())
    reports: list[RunReport] = []
    with contextlib.ExitStack() as exits:
        client, workers = _client(scheduler, exits, Client)
        size = max(1, -(-len(numbers) // (PER_WORKER * workers)))
        shares = [list(numbers[k : k + size]) for k in range(0, len(numbers), size)]
        if progress is not None:
            progress(0, total)
        # Shares of a lost worker go to another one by themselves; one whose pixels are bad would fail again.
        futures = client.map(partial(work, job), shares, pure=False)
        try:
            for future, result in as_completed(futures, with_results=True, raise_errors=True):  # type: ignore[no-untyped-call]
                if future.status != "finished":
                    raise BackendError(
                        f"--scheduler {scheduler} has gone, or the work was cancelled there ({future.status}); give the "
                        "same command again: finished blocks are kept"
                    )
                share, report = result
                reports.append(report)
                done += sum(tiles[n] for n in share)
                if progress is not None:
                    progress(done, total)
        except KilledWorker as error:
            raise BackendError(
                f"the same blocks ended several workers ({error}); look at their logs, most often memory: use less --memory"
            ) from error
    return merge_reports(reports)


def _client(scheduler: str, exits: contextlib.ExitStack, client: Any) -> tuple[Any, int]:
    """A client and the number of workers."""
    count = processes(scheduler)
    if scheduler.startswith("local:"):
        from distributed import LocalCluster

        # Dask's own bound would stop workers at a share of the machine's memory; theirs is in the plan.
        options = {"threads_per_worker": 1, "processes": True, "dashboard_address": None, "memory_limit": 0}
        cluster = exits.enter_context(LocalCluster(n_workers=count, **options))  # type: ignore[no-untyped-call]
        return exits.enter_context(client(cluster)), count
    try:
        connected = exits.enter_context(client(scheduler, timeout=10))
    except OSError as error:
        raise BackendError(
            f"--scheduler {scheduler} does not answer ({error}); start dask scheduler, or use local:N"
        ) from error
    workers = len(connected.scheduler_info()["workers"])
    if not workers:
        raise BackendError(
            f"--scheduler {scheduler} has no workers; start some with: dask worker {scheduler} --nthreads 1"
        )
    return connected, workers


# --- on workers -----------------------------------------------------------------------------------------------------


def work(job: Job, numbers: Sequence[int]) -> tuple[list[int], RunReport]:
    """Computes blocks on a worker, those that have no mark yet; returns all of them."""
    with _ONE:  # an engine and an image serve one thread at a time
        stage, store, plan = _opened(job)
        try:
            there = stage.finished()
        except FileNotFoundError:
            _no_stage(job.out)
        report = run_blocks(plan, [n for n in numbers if n not in there], partial(stage.put, store))
        return list(numbers), report


_ONE = threading.Lock()


@lru_cache(maxsize=1)
def _opened(job: Job) -> tuple[Stage, BlockStore, Plan]:
    """Engine, image and stage, opened once per process and run; they live until the next run."""
    asked = job.asked
    engine: Engine = load(
        job.engine, device=_device(job), threads=asked.threads or None, accept_unverified=job.options.accept_unverified
    )
    engine = engine_form(engine, asked)
    spec = engine.spec
    source: Source = open_image(
        job.image, spec.contract, asked.reading, spatial=spec.spatial, network_channels=spec.channels
    )
    stage, plan = begin(engine, source, asked, Path(job.out), create=partial(_no_stage, job.out))
    return stage, open_store(stage, plan, Path(job.out), marks=False), plan


def _no_stage(out: str) -> NoReturn:
    raise BackendError(f"{out} is not being computed any more; its run has ended")


def _device(job: Job) -> str | None:
    """The device of this worker: the one that was asked for, else, of an engine for GPUs, that of the worker's number."""
    if job.options.device is not None or not read_folder(job.engine).spec.device.startswith("cuda"):
        return job.options.device
    from distributed import get_worker

    count = len(facts.cuda().devices)
    name = str(get_worker().name)
    return f"cuda:{int(name) % count}" if name.isdecimal() and count else None


def processes(scheduler: str) -> int:
    """N of ``local:N``, 1 for a scheduler elsewhere.

    Raises:
        ContractError: ``scheduler`` is neither.
    """
    if scheduler.startswith("local:"):
        count = scheduler.removeprefix("local:")
        if not count.isdecimal() or not int(count):
            raise ContractError(f"--scheduler {scheduler}: give the number of processes, e.g. local:2")
        return int(count)
    if "://" not in scheduler:
        raise ContractError(f"--scheduler {scheduler} is neither local:N nor an address such as tcp://host:8786")
    return 1
