"""Contenders that are timed in turns, and their times."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .section import DeviceLost, alive, synchronize

SAMPLE_S = 0.05  # one timed sample lasts at least this long


@dataclass
class Contender:
    """Something to time: ``call`` enqueues one run, ``result`` is the output of the last one (N, K, *spatial)."""

    name: str
    call: Callable[[], object]
    result: Callable[[], Tensor]
    roof: str  # the GEMM it is held against: fp32, tf32, fp16, int8
    notes: dict[str, Any] = field(default_factory=dict)


def interleave(
    contenders: Sequence[Contender], device: str, *, rounds: int, seconds: float, sample_s: float = SAMPLE_S
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per call of every contender, in turns; and those that failed, with the reason.

    A sample is as many calls enqueued back to back as fill ``sample_s``, between two waits for the whole device: the
    wait is less than a thousandth of it. Three calls warm up, the last of them gives the number per sample. The order
    of the contenders is drawn anew every round, so that nobody always follows the one who heats the chip.
    """
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    failed: dict[str, str] = {}
    counts: dict[str, int] = {}
    begun = time.perf_counter()

    def sample(contender: Contender, count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            contender.call()
        synchronize(device)
        return (time.perf_counter() - start) / count

    order = list(contenders)
    shuffle = random.Random(0).shuffle
    for turn in range(-1, rounds):
        if turn >= 2 and time.perf_counter() - begun > seconds:
            break
        for contender in order:
            if contender.name in failed:
                continue
            try:
                if turn < 0:
                    sample(contender, 2)
                    once = sample(contender, 1)
                    counts[contender.name] = max(1, min(2000, math.ceil(sample_s / max(once, 1e-7))))
                else:
                    times[contender.name].append(sample(contender, counts[contender.name]))
            except Exception as error:
                failed[contender.name] = f"{type(error).__name__}: {error}"
                if device != "cpu" and not alive():
                    raise DeviceLost(contender.name) from error
        shuffle(order)
    return {name: found for name, found in times.items() if found and name not in failed}, failed


def spread(times: Sequence[float]) -> dict[str, Any]:
    """Median, fastest and slowest in milliseconds."""
    return {
        "median_ms": statistics.median(times) * 1e3,
        "low_ms": min(times) * 1e3,
        "high_ms": max(times) * 1e3,
        "rounds": len(times),
    }


def wall(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
