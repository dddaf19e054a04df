"""The search for INT8 inside a budget: which ranges, and which layers stay in FP32.

A model is prepared and calibrated once. Candidates are compared on the calibration tiles by what they do near the
decision: the mean change of the distance to the threshold (or between the two best classes) over the twentieth of samples
that are closest to it. It is smooth where counts of changed labels are not, and it is what changes labels. Whether a
candidate is good enough is never decided there, but on the samples that parity is judged on.

A network with several outputs is compared by all that are judged: the sum of their changes, each weighed by what one of its
changes costs of the budget, which plain INT8's verdict tells. So a layer counts for what it does to the outputs that miss
the budget, and an output that is far inside has next to no say.

Where plain INT8 misses the budget, every layer in turn is reverted to FP32; the layers that take away most of the change
per cost come first, and the shortest beginning of that list that holds the budget is found by halving.

All of it happens before a :class:`Deadline`: nothing is begun that is expected to end behind it, and what was left out is
said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..engine.engine import Engine
from ..errors import BackendError, ContractError, GraphError
from .calibration import METHODS, RangeMethod
from .job import Deadline, Say
from .quantiser import LayerCost, Mixture, Quantiser

if TYPE_CHECKING:
    from ..engine.parity import Verdict


WORTH = 0.02  # a layer whose return to FP32 takes away less of the change than this is not put back


Make = Callable[[frozenset[str], RangeMethod], Engine]
Drop = Callable[[Engine], None]
VerdictOf = Callable[[Engine], "Verdict"]


def plain_and_ends(
    quantiser: Quantiser, make: Make, drop: Drop, judge: VerdictOf, deadline: Deadline, until: float
) -> list[Mixture]:
    """Plain INT8 for one backend, and its ends in FP32 where that takes away some of the change.

    Args:
        quantiser: The model.
        make: Builds and loads an engine with these layers in FP32.
        drop: Closes an engine that is of no more use, and removes its files.
        judge: Parity on the user's samples.
        deadline: Of the whole search.
        until: Share of it by which this ends; plain INT8 is made in any case.

    Returns:
        Plain INT8 first.
    """
    method = quantiser.method or _best_method(quantiser, make, drop, deadline, until)
    quantiser.method = method
    begun = time.monotonic()
    found = [_mixture("", frozenset(), make(frozenset(), method), judge)]
    quantiser.weigh(found[0])
    lowest = quantiser.change(found[0].engine)
    each = time.monotonic() - begun
    start, words = frozenset[str](), list[str]()
    for label, names in quantiser.ends():
        keep = start | names
        if not names or keep == frozenset(quantiser.layers):
            continue
        if deadline.left(until) < each:
            quantiser.left_out.append(f"the {label} layer in FP32 was not tried")
            continue
        engine = _make(quantiser, make, keep, method)
        if engine is None:
            continue
        change = quantiser.change(engine)
        if change >= lowest * (1 - WORTH):
            drop(engine)
            continue
        mixture = _judge(quantiser, f"{' and '.join([*words, label])} layer in FP32", keep, engine, drop, judge)
        if mixture is not None:
            words.append(label)
            found.append(mixture)
            start, lowest = keep, change
    return found


def put_back(
    quantiser: Quantiser,
    found: Sequence[Mixture],
    make: Make,
    drop: Drop,
    judge: VerdictOf,
    deadline: Deadline,
    until: float,
) -> Mixture | None:
    """The mixture that returns fewest layers to FP32 and holds the budget, where none of ``found`` does; None: none.

    Args:
        found: What :func:`plain_and_ends` returned.
        until: Share of the deadline by which this ends; half of what is left until then is for ranking layers.
    """
    say, method = quantiser.say, quantiser.method
    if method is None:
        raise ContractError("layers are put back after plain INT8 was tried")
    quantiser.weigh(found[0])
    end = time.monotonic() + deadline.left(until)
    ranking = quantiser.ranking or _rank(
        quantiser, make, drop, method, found, time.monotonic() + deadline.left(until) / 2
    )
    quantiser.ranking = ranking
    useful = [layer.name for layer in ranking if layer.won >= WORTH] or [layer.name for layer in ranking]
    every = [*useful, *(layer.name for layer in ranking if layer.name not in useful)]

    def attempt(keep: frozenset[str]) -> Mixture | None:
        engine = _make(quantiser, make, keep, method)
        return None if engine is None else _judge(quantiser, _describe_kept(keep), keep, engine, drop, judge)

    mixture, complete = _shortest(every, found[-1].keep, attempt, drop, say, end)
    if not complete:
        quantiser.left_out.append(
            "shorter lists of layers were not tried" if mixture else "longer lists of layers in FP32 were not tried"
        )
    if mixture is not None:
        quantiser.ranking = [replace(layer, kept=layer.name in mixture.keep) for layer in ranking]
    return mixture


def _best_method(quantiser: Quantiser, make: Make, drop: Drop, deadline: Deadline, until: float) -> RangeMethod:
    """The ranges with which plain INT8 changes least near the decision, on the worst tile.

    On all tiles together ranges that cut a bright image off look best: it has few of the samples near the decision. Of
    several outputs the one decides on which a method does worst, compared with the best that any does there.
    """
    errors: dict[RangeMethod, list[float]] = {}
    each = 0.0
    for k, method in enumerate(METHODS):
        if k and deadline.left(until) < each:
            quantiser.left_out.append(f"ranges by {', '.join(METHODS[k:])} were not tried")
            break
        begun = time.monotonic()
        engine = make(frozenset(), method)
        errors[method] = quantiser.worst_changes(engine)
        drop(engine)
        each = max(each, time.monotonic() - begun)
    least = [min(column) for column in zip(*errors.values(), strict=True)]

    def behind(method: RangeMethod) -> float:
        pairs = zip(errors[method], least, strict=True)
        return max(1.0 if error == low else error / low if low else float("inf") for error, low in pairs)

    best = min(errors, key=behind)
    listed = ", ".join(f"{name} {' and '.join(f'{e:.3g}' for e in found)}" for name, found in errors.items())
    quantiser.say(f"ranges by {best} (change near the decision on the worst tile: {listed})")
    return best


def _make(quantiser: Quantiser, make: Make, keep: frozenset[str], method: RangeMethod) -> Engine | None:
    """An engine with these layers in FP32; None where nothing is left in INT8, or the backend cannot be built with it."""
    try:
        return make(keep, method)
    except GraphError:
        return None
    except BackendError as error:  # one mixture less; what is refused for good was refused as plain INT8
        text = f"INT8 with {_describe_kept(keep)} is left out: {error}"
        quantiser.refused += [text] if text not in quantiser.refused else []
        return None


def _describe_kept(keep: frozenset[str]) -> str:
    return f"{len(keep)} layer{'s' * (len(keep) != 1)} in FP32"


def _mixture(label: str, keep: frozenset[str], engine: Engine, judge: VerdictOf) -> Mixture:
    return Mixture(label, keep, engine, judge(engine))


def _judge(
    quantiser: Quantiser, label: str, keep: frozenset[str], engine: Engine, drop: Drop, judge: VerdictOf
) -> Mixture | None:
    """A mixture beside plain INT8; None, and one mixture less, where the backend cannot run it."""
    try:
        return _mixture(label, keep, engine, judge)
    except BackendError as error:
        drop(engine)
        quantiser.refused.append(f"INT8 with {label} is left out: {error}")
        return None


def _rank(
    quantiser: Quantiser, make: Make, drop: Drop, method: RangeMethod, found: Sequence[Mixture], until: float
) -> list[LayerCost]:
    """Layers by what their return to FP32 wins per cost: the ends as ``found`` has them, the others on top of these."""
    costs, start = quantiser.costs(), found[-1].keep
    changes = [quantiser.change(mixture.engine) for mixture in found]
    plain, lowest = changes[0], changes[-1]
    ranked = [
        LayerCost(name, _share_won(changes[k], changes[k + 1], plain), costs[name], True)
        for k, (before, after) in enumerate(pairwise(found))
        for name in sorted(after.keep - before.keep)
    ]
    rest: list[LayerCost] = []
    todo = [name for name in quantiser.layers if name not in start]
    todo.sort(key=lambda name: costs[name])  # cheap ones first, should the time not be enough for all
    each = 0.0  # seconds that a layer takes
    for k, name in enumerate(todo):
        begun = time.monotonic()
        if begun + each > until:
            quantiser.left_out.append(f"{len(todo) - k} of {len(todo)} layers were not tried in FP32")
            break
        engine = _make(quantiser, make, start | {name}, method)
        if engine is None:
            continue
        change = quantiser.change(engine)
        drop(engine)
        each = max(each, time.monotonic() - begun)
        quantiser.say(f"layer {k + 1}/{len(todo)} in FP32: change near the decision {plain:.3g} -> {change:.3g}")
        rest.append(LayerCost(name, _share_won(lowest, change, plain), costs[name], False))
    rest.sort(key=lambda layer: -max(layer.won, 0.0) / (layer.cost + 0.01))
    return ranked + rest


def _share_won(before: float, after: float, plain: float) -> float:
    """Share of plain INT8's change that goes from ``before`` to ``after``.

    All of it where plain INT8 is not even finite, and a finite one is reached; none where it changes nothing.
    """
    if not np.isfinite(plain):
        return float(np.isfinite(after))
    return (before - after) / plain if plain else 0.0


def _shortest(
    names: Sequence[str],
    start: frozenset[str],
    attempt: Callable[[frozenset[str]], Mixture | None],
    drop: Drop,
    say: Say,
    until: float = float("inf"),
) -> tuple[Mixture | None, bool]:
    """The shortest beginning of ``names`` (on top of ``start``) that holds the budget, by halving; None if none does.

    False beside it where the time (of the monotonic clock) ran out before the answer was known to be the shortest.
    """
    names = [name for name in names if name not in start]
    best: Mixture | None = None
    low, high = 1, len(names)
    step, each = 1, 0.0
    while step <= len(names):  # doubling first: the shortest is most often short, and long ones are slow
        if time.monotonic() + each > until:
            return None, False
        mixture, each = _try(start | frozenset(names[:step]), attempt, say, each)
        if mixture is not None and mixture.verdict.accepted:
            best, high = mixture, step - 1
            break
        if mixture is not None:
            drop(mixture.engine)
        low = step + 1
        step = min(step * 2, len(names)) if step < len(names) else step + 1
    if best is None:
        return None, True
    while low <= high:
        if time.monotonic() + each > until:
            return best, False
        middle = (low + high) // 2
        mixture, each = _try(start | frozenset(names[:middle]), attempt, say, each)
        if mixture is not None and mixture.verdict.accepted:
            drop(best.engine)
            best, high = mixture, middle - 1
        else:
            if mixture is not None:
                drop(mixture.engine)
            low = middle + 1
    return best, True


def _try(
    keep: frozenset[str], attempt: Callable[[frozenset[str]], Mixture | None], say: Say, slowest: float
) -> tuple[Mixture | None, float]:
    """A mixture, None where there cannot be one; with it the seconds of the slowest attempt so far."""
    begun = time.monotonic()
    mixture = attempt(keep)
    if mixture is None:
        return None, slowest
    verdict = mixture.verdict
    what = [] if verdict.label_change is None else [f"{verdict.label_change:.3%} of labels"]
    what += [] if verdict.error is None else [f"{verdict.error:.1e} of the range"]
    say(
        f"{_describe_kept(keep)}: {' and '.join(what)} change, {'inside' if verdict.accepted else 'outside'} the budget"
    )
    return mixture, max(slowest, time.monotonic() - begun)
