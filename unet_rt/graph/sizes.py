"""The sizes that a network accepts, and its stride, halo and shrink, found by trying sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import size_text
from ..tiling.field import OutputField
from .fields import as_measured, axis_field, field_lines, gives_whole_samples, halo_of, shrink_of
from .file import Graph, Value
from .layout import SPATIAL, free_export, input_axes
from .line import Line
from .numbers import MAX_STRIDE, Bound, lengthened
from .rounding import NO_ROUNDING, Rounding
from .tensor import Tensor, Walk, is_tracked, sole_line
from .walk import walk

_MAX_SIZE = 8192
# Remainders tried: networks for images take one of the first, and each try is a walk.
_MAX_REMAINDERS = 128
_MOST_WORK, _NODE = 1 << 26, 256  # samples along axes, as which a node counts, walked in all before trying sizes ends
# A network that is another one below this many pixels (or four strides) is not called exact above.
_MAX_LOW = 256


@dataclass
class Search:
    """Walks at ever larger sizes until the accepted sizes and the fields are known."""

    graph: Graph
    letters: Mapping[str, str]
    channels: Mapping[str, int]
    declared: tuple[int | None, ...]
    batch: int
    global_pools: frozenset[str] = frozenset()
    strides: tuple[int, ...] = ()
    remainders: tuple[int, ...] = ()
    base: int = 64
    lawful: bool = False
    density: float = 0.0
    rounding: Rounding = NO_ROUNDING
    moduli: tuple[int, ...] = ()
    bounds: list[Bound] = field(default_factory=list)
    outputs: list[OutputField] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    work: int = 0

    def at(self, sizes: Sequence[int], strict: bool = False) -> Walk:
        given = input_axes(self.graph, self.letters, self.channels, tuple(sizes), self.batch)
        state = walk(self.graph, given, tuple(sizes), self.global_pools, strict)
        self.work += state.work + _NODE * len(self.graph.nodes)
        return state

    def tensors(self, state: Walk) -> list[Tensor]:
        return [state.tensors[o.name] for o in self.graph.outputs]

    def congruent(self, at_least: int, extra: int = 0) -> tuple[int, ...]:
        """The smallest size per axis from ``at_least`` on with the right remainder, plus ``extra`` strides.

        Axes differ by a stride each, so that a graph cannot mix them up unnoticed.
        """
        return tuple(
            at_least + (r - at_least) % s + (extra + k) * s
            for k, (s, r) in enumerate(zip(self.strides, self.remainders, strict=True))
        )

    # -- sizes

    def find_sizes(self) -> None:
        """Stride and remainder of the sizes that the graph accepts."""
        if any(n is not None for n in self.declared):
            first = self.at([n or 64 for n in self.declared])
            self.global_pools = frozenset(first.whole_pools)
        for base in (64, 256, 1024):
            self.base = base
            if self._find_remainder(base):
                self.lawful = True
                return
        self.strides = self.strides or (1,) * len(self.declared)
        self.remainders = tuple((n or 0) % s for n, s in zip(self.declared, self.strides, strict=True))

    def _stride(self, base: int) -> tuple[int, ...]:
        """Least common multiple of the down-samplings on the way to the outputs, per axis."""
        start = self.at([n or base for n in self.declared])
        found = [1] * len(self.declared)
        tensors: Iterable[Tensor] = self.tensors(start)
        if start.broken or not any(t.lines() for t in tensors):
            tensors = start.tensors.values()
        for line in (line for t in tensors for line in t.lines()):
            found[line.source] = math.lcm(found[line.source], line.stride)
        found = [s if s <= MAX_STRIDE else 1 for s in found]
        known = [math.lcm(s, m) for s, m in zip(found, self.moduli or (1,) * len(found), strict=True)]
        return lengthened(known, _bounds_of(tensors))

    def _unheld(self, bounds: Iterable[Bound], states: Sequence[Walk]) -> list[str]:
        """Why what the walks tell holds for too few sizes."""
        texts = []
        for bound in sorted(bounds, key=lambda b: (b.node, b.axis, b.modulus, b.low)):
            sizes = [state.sizes[bound.axis] for state in states]
            if self.strides[bound.axis] % bound.modulus:
                texts.append(f"{bound.node[1]} computes with the remainder of the size modulo {bound.modulus}")
            if bound.high is not None and bound.high < max(sizes):
                texts.append(f"{bound.node[1]} computes something else for sizes above {bound.high} px")
            if bound.low > max(_MAX_LOW, 4 * self.strides[bound.axis]):
                texts.append(f"{bound.node[1]} computes something else for sizes below {bound.low} px")
        return texts

    def _find_remainder(self, base: int) -> bool:
        self.strides = self._stride(base)
        fallback: tuple[int, ...] | None = None
        candidates = range(min(max(self.strides), _MAX_REMAINDERS)) if None in self.declared else range(1)
        for r in candidates:
            if self.work > _MOST_WORK:
                break
            self.remainders = tuple(
                (r if n is None else n) % s for n, s in zip(self.declared, self.strides, strict=True)
            )
            small = self.at(self.congruent(base), strict=True)
            if small.broken:
                continue
            large = self.at(self.congruent(base, 1), strict=True)
            if large.broken or not self._law(small, large):
                continue
            if not small.dropped:
                return True
            fallback = fallback or self.remainders
        if fallback is None:
            return False
        self.remainders = fallback
        return True

    def _law(self, small: Walk, large: Walk) -> bool:
        """Whether output sizes follow the scale between two walks that lie one stride apart."""
        for a, b in zip(self.tensors(small), self.tensors(large), strict=True):
            if a.axes is None or b.axes is None or len(a.lines()) != len(b.lines()):
                return False
            for p, q in zip(a.lines(), b.lines(), strict=True):
                lost = small.sizes[p.source] * p.scale - p.size
                if p.scale != q.scale or q.size - p.size != self.strides[p.source] * p.scale or lost.denominator != 1:
                    return False
        return True

    def minimum(self) -> list[int]:
        """Smallest accepted size per axis."""
        if not self.lawful:
            return [n or max(s, r) for n, s, r in zip(self.declared, self.strides, self.remainders, strict=True)]
        top = [(n - r) // s for n, s, r in zip(self.congruent(self.base), self.strides, self.remainders, strict=True)]
        steps = _smallest(max(top), lambda k: self._runs([min(k, t) for t in top]))
        best = [min(steps, t) for t in top]
        for axis in range(len(best)):

            def runs(k: int, axis: int = axis) -> bool:
                return self._runs([k if a == axis else b for a, b in enumerate(best)])

            best[axis] = _smallest(best[axis], runs)
        sizes = [r + k * s for k, s, r in zip(best, self.strides, self.remainders, strict=True)]
        if not all(o.exact for o in self.outputs):
            return sizes
        for b in self.bounds:
            sizes[b.axis] += max(0, -(-(b.low - sizes[b.axis]) // self.strides[b.axis])) * self.strides[b.axis]
        return self._unmixed(sizes)

    def _unmixed(self, sizes: list[int]) -> list[int]:
        """``sizes``, or larger ones: of a tile that keeps anything, no edge may reach what lies at the other.

        Pads that mirror much of a small tile and are cut off again bring the one edge to the other.
        """
        fields = [o.field for o in self.outputs if len(o.field) == len(sizes)]
        kept = list(sizes)
        for axis, stride in enumerate(self.strides if fields else ()):
            need = max(math.ceil((sum(f[axis].halo) + sum(f[axis].shrink) + 1) / f[axis].scale) for f in fields)
            kept[axis] += max(0, -(-(need - kept[axis]) // stride)) * stride
        least = list(kept)
        while max(kept) <= _MAX_SIZE and fields and not (state := self.at(kept, strict=True)).broken:
            mixed = set()
            for tensor, output in zip(self.tensors(state), self.outputs, strict=True):
                for line, f in zip(field_lines(tensor), output.field, strict=False):
                    before, after = halo_of(line)
                    mixed |= {line.source} if before > f.halo[0] or after > f.halo[1] else set()
            if not mixed or self.work > _MOST_WORK:
                break
            for axis in mixed:
                kept[axis] += self.strides[axis]
        return [k if k > n else s for k, n, s in zip(kept, least, sizes, strict=True)]

    def exact_up_to(self) -> list[Bound | None]:
        """The bound of the largest size per axis up to which the graph's numbers are followed, None where there is none."""
        result: list[Bound | None] = [None] * len(self.declared)
        for bound in self.bounds:
            best = result[bound.axis]
            if bound.high is not None and (best is None or best.high is None or bound.high < best.high):
                result[bound.axis] = bound
        return result

    def _runs(self, steps: Sequence[int]) -> bool:
        sizes = [r + k * s for k, s, r in zip(steps, self.strides, self.remainders, strict=True)]
        if min(sizes) < 1:
            return False
        state = self.at(sizes, strict=True)
        if state.broken:
            return False
        for tensor, output in zip(self.tensors(state), self.outputs, strict=True):
            found = field_lines(tensor)
            if len(found) != len(output.field):
                return False
            for line, f in zip(found, output.field, strict=True):
                if line.size < 1 or line.size != sizes[line.source] * f.scale - sum(f.shrink):
                    return False
        return True

    # -- fields

    def find_fields(self) -> None:
        """Walk at three sizes, large enough that an untouched core exists, and compare."""
        if not self.lawful and None not in self.declared:
            self._fields_of_fixed()
            return
        size, extra = self.base, 2
        while True:
            states = [self.at(self.congruent(size, k)) for k in range(3)]
            ready = all(self._has_core(line) for t in self.tensors(states[0]) for line in t.lines())
            disagreements = [self._disagreement(states, k) for k in range(len(self.graph.outputs))]
            settled = ready and (not any(disagreements) or extra == 0)
            if settled or size >= _MAX_SIZE or any(s.broken for s in states):
                break
            extra -= ready
            size *= 2
        self.moduli = lengthened(self.strides, _bounds_of(t for s in states for t in self.tensors(s)))
        if self.lawful and self.moduli != self.strides:
            self.find_sizes()
            self.find_fields()
            return
        self.density, self.rounding = states[0].density, _rounding_of(states[0], self.tensors(states[0]))
        self.bounds = sorted(_bounds_of(self.tensors(states[0])), key=lambda b: (b.node, b.axis, b.modulus, b.low))
        for k, value in enumerate(self.graph.outputs):
            self.outputs.append(self._output(value, states, k, disagreements[k], ready))

    def _fields_of_fixed(self) -> None:
        """Fields at the one size that the graph runs at, and what keeps it from others."""
        declared = tuple(n for n in self.declared if n is not None)
        only = self.at(declared)
        larger = self.at([n + s for n, s in zip(declared, self.strides, strict=True)])
        self.density, self.rounding = only.density, _rounding_of(only, self.tensors(only))
        for k, value in enumerate(self.graph.outputs):
            why = larger.broken[0] if larger.broken else self._disagreement([only, larger], k)
            why = why or self._fraction(only, k)
            why = f"runs at {size_text(declared)} px only: {why}; {free_export(self.letters)}" if why else ""
            output = self._output(value, [only], k, "", True)
            self.outputs.append(
                replace(output, exact=False, reasons=(why, *output.reasons), note="") if why else output
            )
        lines = [line for tensor in self.tensors(only) for line in tensor.lines()]
        for axis in {line.source for line in lines if not gives_whole_samples(line, declared[line.source])}:
            scales = [o.field[axis].scale for o in self.outputs if len(o.field) == len(declared)]
            stride = math.lcm(*(scale.denominator for scale in scales))
            self.strides = (*self.strides[:axis], stride, *self.strides[axis + 1 :])
        self.remainders = tuple(n % s for n, s in zip(declared, self.strides, strict=True))

    def _fraction(self, state: Walk, k: int) -> str:
        """A sentence if the size that was walked at is no whole number of samples of output ``k``."""
        for line in self.tensors(state)[k].lines():
            size = state.sizes[line.source]
            if not gives_whole_samples(line, size):
                return (
                    f"{size} px x {line.scale} is no whole number of samples, and the network makes {line.size} of it"
                )
        return ""

    def _has_core(self, line: Line) -> bool:
        before, after = halo_of(line)
        return line.size - before - after >= 2 * self.strides[line.source] * line.scale + 2

    def _disagreement(self, states: list[Walk], k: int) -> str:
        """A sentence if the three walks do not tell the same about output ``k``."""
        lines = [field_lines(self.tensors(s)[k]) for s in states]
        if all(self._agree(states, here) for here in zip(*lines, strict=False)) and len({len(x) for x in lines}) == 1:
            return ""
        for node in states[0].order:
            for name in node.outputs:
                tensors = [s.tensors.get(name) for s in states]
                if any(t is None or t.axes is None for t in tensors):
                    continue
                found = [t.lines() for t in tensors if t is not None]
                if len({len(x) for x in found}) > 1 or not all(
                    self._agree(states, x) for x in zip(*found, strict=True)
                ):
                    sizes = ", ".join(f"{s.sizes[-1]} px" for s in states)
                    return f"{node} does not follow the size: inputs of {sizes} give fields that do not agree"
        return "inputs of three sizes give fields that do not agree"

    def _agree(self, states: list[Walk], trio: Sequence[Line]) -> bool:
        """Whether one line tells the same at all three sizes, and shifts by a stride within its core."""
        first, source = trio[0], trio[0].source
        stride = self.strides[source]
        if any(line.scale != first.scale or line.source != source for line in trio):
            return False
        shift = stride * first.scale
        if shift.denominator != 1:
            return False
        step = int(shift)
        sizes = [s.sizes[source] for s in states]
        for line, size in zip(trio, sizes, strict=True):
            if halo_of(line) != halo_of(first) or shrink_of(line, size) != shrink_of(first, sizes[0]):
                return False
            grown = size - sizes[0]
            half = first.size // 2
            for name in ("low", "high"):
                a, b = getattr(first, name), getattr(line, name)
                if not np.array_equal(a[:half], b[:half]) or not np.array_equal(a[-half:] + grown, b[-half:]):
                    return False
        before, after = halo_of(first)
        for array in (first.low, first.high):
            core = array[before : first.size - after]
            # A tap of weight zero beyond the edge changes no value; there the dependence is cut off.
            cut = (first.high[before : first.size - after] == sizes[0] - 1) | (
                first.low[before : first.size - after] == 0
            )
            if len(core) > step:
                equal = core[step:] - core[:-step] == stride
                if not (equal | cut[step:] | cut[:-step]).all():
                    return False
        return True

    def _output(self, value: Value, states: list[Walk], k: int, disagreement: str, ready: bool) -> OutputField:
        tensor = self.tensors(states[0])[k]
        remarks = sorted(tensor.faults)
        reasons = list(dict.fromkeys(text for _, text in remarks))
        broken = next((s.broken[0] for s in states if s.broken), "")
        if broken and not reasons:
            reasons.append(broken)
        if disagreement and not reasons:
            reasons.append(disagreement)
        reasons = reasons or self._unheld(tensor.bounds, states)
        letters = self._output_letters(tensor, value)
        found = [
            line if self.lawful else as_measured(line, states[0].sizes[line.source]) for line in field_lines(tensor)
        ]
        if not found or len(found) != len(tensor.lines()):
            reasons = reasons or [f"output '{value.name}' has no spatial axes of its own"]
        elif not reasons and not ready:
            sizes = states[0].sizes[-1]
            reasons.append(f"no sample of output '{value.name}' is untouched by the edges of a tile of {sizes} px")
        elif not reasons and len(found) != len(self.declared):
            reasons.append(f"output '{value.name}' follows {len(found)} of {len(self.declared)} spatial axes")
        fields = tuple(axis_field(line, states[0].sizes[line.source]) for line in found)
        channels = 1
        if tensor.axes is not None and "C" in letters:
            channels = tensor.shape[letters.index("C")]
        notes = "; ".join(text for _, text in sorted(tensor.notes))
        return OutputField(value.name, letters, channels, fields, not reasons, tuple(reasons), "" if reasons else notes)

    def _output_letters(self, tensor: Tensor, value: Value) -> str:
        spatial = SPATIAL[len(self.declared)]
        if tensor.axes is None:
            return "?" * len(value.shape or ())
        rest = ["N", "C"] if any("N" in own for own in self.letters.values()) else ["C"]
        if tensor.rank == len(spatial) and all(is_tracked(a) for a in tensor.axes):
            rest = []
        letters = ""
        for k, axis in enumerate(tensor.axes):
            line = sole_line(axis)
            if line is not None:
                letters += spatial[line.source]
            elif "N" in rest and k == 0:
                letters += "N"
                rest.remove("N")
            elif "C" in rest:
                letters += "C"
                rest = []
            else:
                letters += "?"
        return letters


def _rounding_of(state: Walk, outputs: Sequence[Tensor]) -> Rounding:
    # A product, a bias or a function rounds a whole value, and twice as much of the square as an addition does on average.
    alone = sum(2.0 for node in state.order if not all(state.tensors[o].constant for o in node.outputs if o))
    return Rounding(state.sums + alone, max((len(t.notes) for t in outputs), default=0))


def _bounds_of(tensors: Iterable[Tensor]) -> set[Bound]:
    return set[Bound]().union(*(t.bounds for t in tensors))


def _smallest(top: int, holds: Any) -> int:
    """Smallest k in 0..top with ``holds(k)``, taking for granted that it holds from there on, and at ``top``."""
    low, high = 0, top
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
