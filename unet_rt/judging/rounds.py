"""Rounds of contenders that run in turn, each a process of its own: what scatters twofold is repeated, load is said."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..system.timing import Timing

REST_S = 0.05  # before each run: threads of the one before spin for a while, and take a core from the next one
SCATTERED = 2.0  # a run that takes so many times its contender's median marks its round for repetition
BUSY = 0.1  # share of its time that a contender waits for a processor from which on the machine counts as busy


@dataclass(frozen=True)
class Run:
    """One run of a contender, as it measured itself.

    Attributes:
        seconds: From its call to its return.
        waited: Share of the time of its threads in which they wanted a processor and had none; None where not known.
    """

    seconds: float
    waited: float | None


@dataclass(frozen=True)
class Rounds:
    """What rounds in turn came to.

    Attributes:
        timings: Of every contender, of the rounds that count.
        waited: Of every contender, the median share of its time that it waited for a processor; None where not known.
        repeated: Rounds that scattered twofold and were taken again.
        scattered: Of every contender, slowest over fastest run that counts.
    """

    timings: tuple[Timing, ...]
    waited: tuple[float | None, ...]
    repeated: int
    scattered: tuple[float, ...]

    def notes(self, names: Sequence[str], what: str) -> list[str]:
        """What is to be said of load and scatter; ``what`` was timed."""
        found = list[str]()
        if self.repeated:
            found.append(f"{what}: {self.repeated} rounds in which a time was twice the usual were taken again")
        widest, name = max(zip(self.scattered, names, strict=True))
        if widest >= SCATTERED:
            found.append(
                f"{what}: the times of {name} scatter {widest:.1f}-fold even so; bench again when the machine is quieter"
            )
        busy = max((share, name) for share, name in zip((w or 0.0 for w in self.waited), names, strict=True))
        if busy[0] >= BUSY:
            found.append(
                f"{what}: the machine was busy with other work ({busy[1]} waited {busy[0]:.0%} of its time for a "
                "processor); speeds are too low, and ratios are those under this load"
            )
        return found


def take_rounds(
    contenders: Sequence[Callable[[], Run]],
    *,
    runs: int,
    seconds: float,
    warm_up: int = 1,
    rest_s: float = REST_S,
) -> Rounds:
    """Runs contenders in turn, every other round backwards, and takes rounds again in which one of them scattered.

    Args:
        contenders: Each runs once and says what it measured.
        runs: Rounds that count; fewer where ``seconds`` are used up, but at least two where ``runs`` allows.
        seconds: For all rounds together, warm-up and repetitions included.
        warm_up: Rounds before, which do not count.
        rest_s: Seconds without work before each run.
    """
    begun, turn, repeated = time.perf_counter(), 0, 0
    rounds = list[list[Run]]()
    while turn < warm_up + runs + repeated:
        if len(rounds) >= 2 and time.perf_counter() - begun > seconds:
            break
        found = dict[int, Run]()
        for k in range(len(contenders))[:: 1 if turn % 2 == 0 else -1]:
            time.sleep(rest_s)
            found[k] = contenders[k]()
        turn += 1
        if turn > warm_up:
            rounds.append([found[k] for k in range(len(contenders))])
        done = len(rounds) == runs
        if (
            done
            and repeated < runs
            and time.perf_counter() - begun < seconds
            and (bad := _scattered(rounds)) is not None
        ):
            del rounds[bad]
            repeated += 1
    columns = list(zip(*rounds, strict=True))
    timings = tuple(_timing([run.seconds for run in column]) for column in columns)
    known = ([run.waited for run in column if run.waited is not None] for column in columns)
    waited = tuple(statistics.median(shares) if shares else None for shares in known)
    return Rounds(timings, waited, repeated, tuple(t.high_s / t.low_s for t in timings))


def _timing(times: Sequence[float]) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), len(times), 0, tuple(times))


def _scattered(rounds: Sequence[Sequence[Run]]) -> int | None:
    """The round that scatters most, where a time in it is twice its contender's median or more."""
    medians = [statistics.median(run.seconds for run in column) for column in zip(*rounds, strict=True)]
    worst = [max(run.seconds / median for run, median in zip(row, medians, strict=True)) for row in rounds]
    k = max(range(len(rounds)), key=worst.__getitem__)
    return k if worst[k] >= SCATTERED else None
