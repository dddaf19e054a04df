"""Timing that can be trusted: interleaved runs, medians and ratios."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import limits


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes:
        median_s: Median seconds of a run.
        low_s, high_s: Fastest and slowest run.
        runs: Runs counted (the warm-up is not).
        peak_bytes: Resident memory above that before the first run; 0 where it did not grow. On a GPU its memory.
        times_s: Every run counted; those of one round stand at the same place for all contenders.
    """

    median_s: float
    low_s: float
    high_s: float
    runs: int
    peak_bytes: int
    times_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """How many times as long one contender takes as another.

    Attributes:
        median: Of the ratios of the rounds.
        low, high: 95 % interval of that median; the lowest and highest ratio where there are fewer than six rounds.
    """

    median: float
    low: float
    high: float


def ratio(timing: Timing, to: Timing) -> Ratio:
    """The ratio of two contenders of one interleaved run, with the interval that order statistics give its median.

    Rounds are paired: what slowed a whole round down cancels. The interval runs from the k-th lowest to the k-th highest
    ratio, k as large as the binomial distribution allows at 95 %: nothing is assumed of how times are distributed. Five
    rounds cannot say as much (their range holds the median with 94 %), two with 50 %.
    """
    ratios = sorted(a / b for a, b in zip(timing.times_s, to.times_s, strict=True))
    n, below, k = len(ratios), 0.5 ** len(ratios), 0
    while below <= 0.025:  # the chance that at most k ratios lie below the median
        k += 1
        below += math.comb(n, k) * 0.5**n
    k = max(k - 1, 0)
    return Ratio(statistics.median(ratios), ratios[k], ratios[n - 1 - k])


def waited_s() -> float | None:
    """Seconds that the threads of this process wanted to run and had no processor; None where the system does not say."""
    try:
        tasks = [path.read_text().split() for path in Path("/proc/self/task").glob("*/schedstat")]
    except OSError:  # no Linux, or a thread that has just ended
        return None
    return sum(int(task[1]) for task in tasks) / 1e9 if tasks else None


class MemoryWatch:
    """Largest resident memory of the process while the ``with`` block runs, sampled every 10 ms."""

    def __enter__(self) -> MemoryWatch:
        self.before = limits.rss_bytes()
        self.peak = self.before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, limits.rss_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, limits.rss_bytes())

    @property
    def grown(self) -> int:
        return max(0, self.peak - self.before)


def interleave(
    contenders: Sequence[Callable[[], object]],
    *,
    runs: int = 5,
    seconds: float = 30.0,
    warm_up: int = 1,
    rest_s: float = 0.05,
) -> list[Timing]:
    """Runs contenders in turn, so that what disturbs the machine disturbs all of them alike.

    Every other round goes backwards: what a contender leaves behind (warm caches, memory) meets another one each time.
    A rest goes before each run: the waiting threads of ONNX Runtime spin for some 20 ms after its run has ended, and
    take a core from whoever comes next (1.29 times the time of a 120-ms tile on two cores, 1.00 after a rest).

    Args:
        contenders: Functions without arguments.
        runs: Rounds counted; fewer where ``seconds`` are used up, but at least two.
        seconds: For all rounds together, warm-up included; two rounds are always counted where ``runs`` allows.
        warm_up: Rounds that are not counted (compilation, allocation, first touch of memory).
        rest_s: Seconds without work before each run, where there are several contenders.
    """
    begun = time.perf_counter()
    peaks = [0] * len(contenders)
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(warm_up + runs):
        if turn >= warm_up + 2 and time.perf_counter() - begun > seconds:
            break
        for k in range(len(contenders))[:: 1 if turn % 2 == 0 else -1]:
            if len(contenders) > 1:
                time.sleep(rest_s)
            with MemoryWatch() as watch:
                start = time.perf_counter()
                contenders[k]()
                spent = time.perf_counter() - start
            peaks[k] = max(peaks[k], watch.grown)
            if turn >= warm_up:
                times[k].append(spent)
    return [
        Timing(statistics.median(t), min(t), max(t), len(t), p, tuple(t)) for t, p in zip(times, peaks, strict=True)
    ]
