"""Runs compiled CUDA kernels without a GPU: an interpreter of the PTX that nvcc makes of them.

The kernels' bodies also run as ordinary C++ (``_cuda_host``), but there the branches for devices are left out: wide and
read-only loads, conversions, multiplications and shifts by the device's instructions. Here they are what runs, as the
compiler left them. Kernels of this project use no barriers, shared memory or shuffles, so that their threads are
independent, and what a thread does is checked on the way:

* an access must be aligned to its size, as the hardware demands;
* it must stay inside the memory it was given (:class:`Memory`);
* no two threads may write one byte, read what another one writes, or read through the read-only cache what any writes.

A register is a NumPy array with a place for every thread of a launch, and an instruction is carried out for all threads
that are at it. Threads whose ways part are brought together again by always going on with those that are farthest back
in the text of the kernel.

Semantics: "PTX ISA", version 9.0, NVIDIA. An instruction that no kernel has needed so far is an error that names it.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]

TYPES = {
    "u8": "u1", "s8": "i1", "b8": "u1", "u16": "u2", "s16": "i2", "b16": "u2", "u32": "u4", "s32": "i4", "b32": "u4",
    "u64": "u8", "s64": "i8", "b64": "u8", "f16": "f2", "f16x2": "u4", "f32": "f4", "f64": "f8", "pred": "?",
}  # fmt: skip
_WARP = 32
_NOBODY, _MANY, _CACHED = -1, -2, -3  # where a thread's number stands otherwise


class PtxError(Exception):
    """A kernel did what a device would punish, or what this interpreter does not know."""


# --------------------------------------------------------------------------------------------------------------- memory


class Memory:
    """The memory that kernels may touch: regions of the host's, with what each byte has seen in the running launch."""

    def __init__(self) -> None:
        self.regions: list[_Region] = []
        self.counts: Counter[tuple[str, int]] = Counter()
        """Accesses of threads, of all launches, by kind and bytes."""
        self.instructions: int | None = None
        """Of warps, of all launches; None: not counted."""

    def add(self, start: int, size: int) -> _Region:
        """A region; ``regions.remove`` takes it away again."""
        self.regions.append(_Region(start, size))
        return self.regions[-1]

    def begin(self) -> None:
        for region in self.regions:
            region.writer[:] = _NOBODY
            region.reader[:] = _NOBODY

    def load(self, what: str, addresses: Values, threads: Values, dtype: np.dtype[Any], count: int) -> list[Values]:
        """A vector of ``count`` values per thread, value by value. ``what``: load, read-only load."""
        found = np.empty((count, len(addresses)), dtype)
        for part, region, first in self._parts(what, addresses, threads, dtype, count):
            region.read(first, dtype.itemsize * count, threads[part], read_only=what != "load")
            for k in range(count):
                found[k, part] = region.view(dtype)[first // dtype.itemsize + k]
        return list(found)

    def store(self, addresses: Values, threads: Values, values: Sequence[Values]) -> None:
        """A vector per thread, value by value."""
        dtype = values[0].dtype
        for part, region, first in self._parts("store", addresses, threads, dtype, len(values)):
            region.write(first, dtype.itemsize * len(values), threads[part])
            for k, value in enumerate(values):
                region.view(dtype)[first // dtype.itemsize + k] = value[part]

    def add_up(self, addresses: Values, threads: Values, values: Values) -> None:
        """Adds a value per thread at its address."""
        for part, region, first in self._parts("atomic", addresses, threads, values.dtype, 1):
            np.add.at(region.view(values.dtype), first // values.dtype.itemsize, values[part])

    def _parts(
        self, what: str, addresses: Values, threads: Values, dtype: np.dtype[Any], count: int
    ) -> Iterator[tuple[Values, _Region, Values]]:
        """The threads whose vectors are in one region, that region, and their places in it."""
        size = dtype.itemsize * count
        if (addresses % np.uint64(size)).any():
            bad = int(addresses[np.argmax(addresses % np.uint64(size) != 0)])
            raise PtxError(f"{what} of {size} bytes at {bad:#x}, which is no multiple of them")
        self.counts[what, size] += len(addresses)
        # Words around an array's first and last byte may be read: devices' allocations hold them.
        slack = 4 if "load" in what else 1
        left = np.ones(len(addresses), np.bool_)
        for region in self.regions:
            first, last = region.start - region.start % slack, -(-region.end // slack) * slack
            part = np.flatnonzero(left & (addresses >= first) & (addresses + np.uint64(size) <= last))
            if len(part):
                left[part] = False
                yield part, region, (addresses[part] - np.uint64(region.base)).astype(np.int64)
        if left.any():
            bad = int(addresses[np.argmax(left)])
            raise PtxError(f"{what} of {size} bytes at {bad:#x}, which is in no array: {self.regions}")


class _Region:
    def __init__(self, start: int, size: int) -> None:
        self.start, self.end = start, start + size
        self.base = start - start % 16
        self.size = -(-(self.end - self.base) // 16) * 16
        self.writer = np.full(self.size, _NOBODY)
        self.reader = np.full(self.size, _NOBODY)

    def __repr__(self) -> str:
        return f"{self.start:#x} to {self.end:#x}"

    def view(self, dtype: np.dtype[Any]) -> Values:
        memory = (ctypes.c_uint8 * self.size).from_address(self.base)
        return np.frombuffer(memory, dtype)

    # Races: nothing orders the threads of a launch.

    def read(self, first: Values, size: int, threads: Values, *, read_only: bool) -> None:
        at = first[:, None] + np.arange(size)
        writer = self.writer[at]
        if ((writer != _NOBODY) & ((writer != threads[:, None]) | read_only)).any():
            raise PtxError("load of bytes that a thread of the same launch writes")
        reader = self.reader[at]
        own = (reader == _NOBODY) | (reader == threads[:, None])
        self.reader[at] = _CACHED if read_only else np.where(own, threads[:, None], np.minimum(reader, _MANY))

    def write(self, first: Values, size: int, threads: Values) -> None:
        at = first[:, None] + np.arange(size)
        writer, reader = self.writer[at], self.reader[at]
        self.writer[at] = threads[:, None]
        if ((writer != _NOBODY) & (writer != threads[:, None])).any() or (self.writer[at] != threads[:, None]).any():
            raise PtxError("two threads of a launch write one byte")
        if ((reader != _NOBODY) & (reader != threads[:, None])).any():
            cached = (reader == _CACHED).any()
            by = "the launch reads as read-only" if cached else "another thread of the launch reads"
            raise PtxError(f"store to bytes that {by}")


# ---------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Instruction:
    text: str
    guard: str | None  # register of a predicate
    negated: bool
    name: str  # up to the first dot
    parts: tuple[str, ...]  # between dots
    operands: tuple[str, ...]  # vectors as one, with their braces


@dataclass
class Kernel:
    """One entry of a PTX file: instructions in blocks, which threads leave at their ends alone."""

    name: str
    parameter: str
    parameter_bytes: int
    registers: dict[str, str] = field(default_factory=dict)  # type by prefix
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # block


_ENTRY = re.compile(
    r"\.visible \.entry (\w+)\(\s*\.param (?:\.align \d+ )?\.b8 (\w+)\[(\d+)\]\s*\)(.*?)\n\}", re.DOTALL
)
_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*?);")
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def kernels_of(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX file by their (mangled) names."""
    return {name: _kernel(name, parameter, int(size), body) for name, parameter, size, body in _ENTRY.findall(text)}


def _kernel(name: str, parameter: str, size: int, body: str) -> Kernel:
    kernel = Kernel(name, parameter, size, blocks=[[]])
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if match := re.fullmatch(r"\.reg \.(\w+)\s+(%[a-z]+)<\d+>;", line):
            kernel.registers[match[2]] = match[1]
        elif match := re.fullmatch(r"(\$\w+):", line):
            if kernel.blocks[-1]:
                kernel.blocks.append([])
            kernel.labels[match[1]] = len(kernel.blocks) - 1
        elif line and not line.startswith(".") and line not in "{}":
            # Inline assembly stands in braces of its own.
            inside = line[1:-1].strip() if line.startswith("{") and line.endswith("}") else line
            inside = inside.removeprefix("{").strip()
            match = _INSTRUCTION.fullmatch(inside)
            if match is None:
                raise PtxError(f"cannot read the line: {line}")
            negated, guard, op, parts, rest = match.groups()
            found = Instruction(
                inside, guard, negated == "!", op, tuple(parts.split(".")[1:]), tuple(_OPERANDS.findall(rest))
            )
            kernel.blocks[-1].append(found)
            if op in ("bra", "ret", "exit"):
                kernel.blocks.append([])
    return kernel


# ------------------------------------------------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Launch:
    """Where a launch's blocks and threads are, and its one parameter's bytes."""

    grid: tuple[int, int, int]
    threads: int
    parameter: bytes


def run(kernel: Kernel, launch: Launch, memory: Memory) -> None:
    """Carries out a launch; ``memory.instructions`` counts what warps would carry out.

    Raises:
        PtxError: An access that a device would punish, a race, an instruction that is not known here.
    """
    if len(launch.parameter) != kernel.parameter_bytes:
        raise PtxError(f"{kernel.name} takes {kernel.parameter_bytes} bytes, {len(launch.parameter)} were given")
    memory.begin()
    state = _State(kernel, launch, memory)
    with np.errstate(all="ignore"):
        while len(state.alive):
            places = state.place[state.alive]
            block = int(places.min())
            threads = state.alive[places == block]
            state.block(block, threads)


class _State:
    def __init__(self, kernel: Kernel, launch: Launch, memory: Memory) -> None:
        self.kernel, self.memory = kernel, memory
        nx, ny, nz = launch.grid
        count = nx * ny * nz * launch.threads
        index = np.arange(count)
        at = index // launch.threads
        self.specials = {
            "%tid.x": (index % launch.threads).astype("u4"),
            "%ctaid.x": (at % nx).astype("u4"),
            "%ctaid.y": (at // nx % ny).astype("u4"),
            "%ctaid.z": (at // (nx * ny)).astype("u4"),
            "%nctaid.y": np.full(count, ny, "u4"),
        }
        self.count = count
        self.place = np.zeros(count, np.int32)  # block of each thread
        self.alive = index
        self.registers: dict[str, Values] = {}
        self.parameter = np.frombuffer(launch.parameter + b"\0" * 16, np.uint8)

    def block(self, block: int, threads: Values) -> None:
        """Carries a block out for the threads that are at its beginning."""
        if self.memory.instructions is not None:
            self.memory.instructions += len(np.unique(threads // _WARP)) * len(self.kernel.blocks[block])
        ends = False
        for instruction in self.kernel.blocks[block]:
            active = threads
            if instruction.guard is not None:
                active = threads[self.get(instruction.guard, threads, "pred") != instruction.negated]
            if instruction.name in ("bra", "ret", "exit"):  # the last of a block
                self.place[threads] = block + 1
                end = len(self.kernel.blocks)
                self.place[active] = self.kernel.labels[instruction.operands[0]] if instruction.name == "bra" else end
                self.alive = self.alive[self.place[self.alive] < end]
                ends = True
            elif len(active):
                _perform(self, instruction, active)
        if not ends:
            self.place[threads] = block + 1

    # --- operands

    def get(self, operand: str, threads: Values, kind: str) -> Values:
        """An operand of an instruction whose type is ``kind``."""
        dtype = np.dtype(TYPES[kind])
        if operand[0] != "%":
            return np.full(len(threads), _immediate(operand, dtype), dtype)
        if operand in self.specials:
            held = self.specials[operand][threads]
        else:
            held = self._register(operand)[threads]
        if held.dtype == dtype:
            return held
        if held.dtype.itemsize == dtype.itemsize:
            return held.view(dtype)
        raw = held.view(f"u{held.dtype.itemsize}").astype(f"u{dtype.itemsize}")
        return raw.view(dtype)

    def put(self, register: str, threads: Values, value: Values) -> None:
        """Narrower integers are extended by their sign, if they have one."""
        held = self._register(register)
        if value.dtype.itemsize < held.dtype.itemsize:
            value = value.astype(f"{value.dtype.kind}{held.dtype.itemsize}")
        held[threads] = value if value.dtype == held.dtype else np.ascontiguousarray(value).view(held.dtype)

    def _register(self, name: str) -> Values:
        held = self.registers.get(name)
        if held is None:
            kind = self.kernel.registers[name.rstrip("0123456789")]
            held = self.registers[name] = np.zeros(self.count, TYPES[kind])
        return held


def _immediate(text: str, dtype: np.dtype[Any]) -> Any:
    if text[:2] in ("0f", "0F"):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    if text[:2] in ("0d", "0D"):
        return np.uint64(int(text[2:], 16)).view(np.float64)
    number = int(text, 0)
    if dtype.kind == "b":
        return bool(number)
    return np.array(number % 2 ** (8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)


# -------------------------------------------------------------------------------------------------------- instructions


def _perform(state: _State, i: Instruction, threads: Values) -> None:
    if i.name in _MEMORY:
        _MEMORY[i.name](state, i, threads)
        return
    if i.name == "mov" and (i.operands[0][0] == "{" or i.operands[1][0] == "{"):
        _pack(state, i, threads)
        return
    if i.name == "mov" and i.operands[1] == state.kernel.parameter:
        state.put(i.operands[0], threads, np.zeros(len(threads), "u8"))  # addresses of parameters begin there
        return
    form = _form(i)
    values = [state.get(o, threads, kind) for o, kind in zip(i.operands[1:], form.kinds, strict=True)]
    state.put(i.operands[0], threads, form.compute(*values))


@dataclass(frozen=True)
class _Form:
    kinds: tuple[str, ...]  # types of the operands
    compute: Callable[..., Values]


@cache
def _form(i: Instruction) -> _Form:
    kind = i.parts[-1]
    name = i.name
    if name == "cvta":
        return _Form(("u64",), lambda a: a)
    if name == "cvt":
        return _conversion(i)
    if name == "setp":
        if len(i.parts) != 2:
            _unknown(i)
        return _Form((kind, kind), lambda a, b: _compared(i.parts[0], a, b))
    if name == "selp":
        return _Form((kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))
    if name in ("shl", "shr"):
        return _Form((kind, "u32"), lambda a, n: _shifted(name, a, n))
    if name == "shf":
        if i.parts != ("r", "wrap", "b32"):
            _unknown(i)
        return _Form((kind, kind, "u32"), _funnel)
    if name == "prmt" and i.parts == ("b32",):
        return _Form(("b32", "b32", "b32"), _permuted)
    if name in ("mul", "mad") and kind[0] != "f":
        return _product(i)
    if name == "fma":
        return _Form((kind,) * 3, _fused if i.parts == ("rn", "f32") else _unknown(i))
    if name in ("min", "max") and kind[0] == "f":
        if i.parts == ("NaN", "f16x2"):
            return _Form(("b32", "b32"), lambda a, b: _by_halves(name, a, b))
        return _Form((kind, kind), lambda a, b: _extreme(name, a, b) if len(i.parts) == 1 else _unknown(i))
    if name in ("div", "rem") and kind[0] != "f":
        return _Form((kind, kind), lambda a, b: _divided(name, a, b))
    if name == "clz":
        return _Form((kind,), lambda a: _leading_zeros(a))
    plain = _PLAIN.get(name)
    rounded = name in ("add", "sub", "mul", "div") and kind in ("f32", "f64")
    if plain is None or i.parts[:-1] != (("rn",) if rounded else ()) or kind in ("f16", "f16x2"):
        return _unknown(i)
    return _Form((kind,) * (len(i.operands) - 1), plain)


def _unknown(i: Instruction) -> NoReturn:
    raise PtxError(f"not known here: {i.text}")


_PLAIN: dict[str, Callable[..., Values]] = {
    "mov": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}

_COMPARISONS: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _compared(how: str, a: Values, b: Values) -> Values:
    if a.dtype.kind != "f":
        return _COMPARISONS[how](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if how in ("num", "nan"):
        return unordered if how == "nan" else ~unordered
    if how in _COMPARISONS:
        return _COMPARISONS[how](a, b) & ~unordered
    return _COMPARISONS[how[:-1]](a, b) | unordered


def _shifted(name: str, a: Values, n: Values) -> Values:
    bits = 8 * a.dtype.itemsize
    most = np.minimum(n, bits - 1).astype(a.dtype)
    if name == "shl":
        return np.where(n < bits, np.left_shift(a, most), a.dtype.type(0))
    moved = np.right_shift(a, most)
    return moved if a.dtype.kind == "i" else np.where(n < bits, moved, a.dtype.type(0))


def _funnel(low: Values, high: Values, n: Values) -> Values:
    both = high.astype("u8") << np.uint64(32) | low.astype("u8")
    return (both >> (n & np.uint32(31)).astype("u8")).astype("u4")


def _permuted(a: Values, b: Values, selector: Values) -> Values:
    both = b.astype("u8") << np.uint64(32) | a.astype("u8")
    result = np.zeros_like(both)
    for place in range(4):
        nibble = (selector >> np.uint32(4 * place)).astype("u8") & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * place)
    return result.astype("u4")


def _product(i: Instruction) -> _Form:
    part, kind = i.parts
    narrow = np.dtype(TYPES[kind])
    wide = np.dtype(f"{narrow.kind}{2 * narrow.itemsize}") if narrow.itemsize < 8 else narrow
    if part == "lo":

        def product(a: Values, b: Values) -> Values:
            return a * b
    elif narrow.itemsize == 8:
        _unknown(i)
    elif part == "hi":

        def product(a: Values, b: Values) -> Values:
            bits = wide.type(8 * narrow.itemsize)
            return (a.astype(wide) * b.astype(wide) >> bits).astype(narrow)
    else:

        def product(a: Values, b: Values) -> Values:
            return a.astype(wide) * b.astype(wide)

    if i.name == "mul":
        return _Form((kind, kind), product)
    third = f"{kind[0]}{2 * int(kind[1:])}" if part == "wide" else kind
    return _Form((kind, kind, third), lambda a, b, c: product(a, b) + c)


def _fused(a: Values, b: Values, c: Values) -> Values:
    """float32 a * b + c, rounded once: the sum in float64 is rounded to odd, so that the second rounding is the first."""
    product = a.astype("f8") * b.astype("f8")  # exact
    addend = c.astype("f8")
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    bits = total.view("i8").copy()
    fix = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    toward_zero = (error < 0) == (total > 0)
    bits[fix] += np.where(toward_zero[fix], -1, 1)
    return bits.view("f8").astype("f4")


def _extreme(name: str, a: Values, b: Values) -> Values:
    """The other operand where one is NaN; of two zeros the one whose sign is asked for."""
    smaller = (a < b) | ((a == b) & np.signbit(a)) if name == "min" else (a > b) | ((a == b) & ~np.signbit(a))
    return np.where((smaller | np.isnan(b)) & ~np.isnan(a), a, b)


def _by_halves(name: str, a: Values, b: Values) -> Values:
    """Of two pairs of float16 the larger or smaller ones; NaN wins."""
    x, y = (np.ascontiguousarray(v).view("f2").reshape(-1, 2) for v in (a, b))
    found = np.where(np.isnan(x) | np.isnan(y), np.float16(np.nan), _extreme(name, x, y))
    return np.ascontiguousarray(found).view("u4").reshape(-1)


def _divided(name: str, a: Values, b: Values) -> Values:
    if (b == 0).any():
        raise PtxError("division of integers by zero")
    quotient = np.abs(a) // np.abs(b) if a.dtype.kind == "i" else a // b
    if a.dtype.kind == "i":
        quotient = np.where((a < 0) != (b < 0), -quotient, quotient)
    return quotient if name == "div" else a - quotient * b


def _leading_zeros(a: Values) -> Values:
    count = np.zeros(len(a), "u4")
    for bit in range(8 * a.dtype.itemsize):
        count += a >> a.dtype.type(bit) == 0
    return count


def _conversion(i: Instruction) -> _Form:
    to, source = i.parts[-2:]
    how = i.parts[:-2]
    if to == "f16x2":
        if how != ("rn",):
            _unknown(i)
        return _Form(
            ("f32", "f32"),
            lambda a, b: a.astype("f2").view("u2").astype("u4") << np.uint32(16) | b.astype("f2").view("u2"),
        )
    dtype = np.dtype(TYPES[to])
    if to[0] == "f" and source[0] == "f":
        # From narrower floats nothing is rounded.
        allowed = how == ("rn",) if int(to[1:]) < int(source[1:]) else how == ()
    elif to[0] == "f":
        allowed = how == ("rn",)
    elif source[0] == "f":
        allowed = how == ("rzi",)
        if allowed:
            return _Form((source,), lambda a: _whole(a, dtype))
    else:
        allowed = how == ()
    if not allowed:
        _unknown(i)
    return _Form((source,), lambda a: a.astype(dtype))


def _whole(a: Values, dtype: np.dtype[Any]) -> Values:
    info = np.iinfo(dtype)
    inside = np.trunc(np.nan_to_num(a.astype("f8"), nan=0.0))
    found = np.where(np.abs(inside) < 2.0 ** (info.bits - 1), inside, 0).astype(dtype)
    found = np.where(inside >= 2.0 ** (info.bits - 1), info.max, found)
    return np.where(inside < info.min, info.min, found).astype(dtype)


def _pack(state: _State, i: Instruction, threads: Values) -> None:
    """``mov`` between a register and the halves of a vector."""
    to, source = i.operands
    bits = int(i.parts[0][1:])
    if to[0] == "{":
        names = _names(to)
        whole = state.get(source, threads, i.parts[0])
        each = bits // len(names)
        for k, name in enumerate(names):
            if name != "_":
                state.put(name, threads, (whole >> whole.dtype.type(each * k)).astype(f"u{each // 8}"))
        return
    names = _names(source)
    each = bits // len(names)
    whole = np.zeros(len(threads), f"u{bits // 8}")
    for k, name in enumerate(names):
        part = state.get(name, threads, f"b{each}").astype(whole.dtype)
        whole |= part << whole.dtype.type(each * k)
    state.put(to, threads, whole)


def _names(vector: str) -> list[str]:
    return [name.strip() for name in vector.strip("{}").split(",")]


# --- loads and stores

_ADDRESS = re.compile(r"\[(%?[\w$]+)(?:\+(-?\d+))?\]")


def _addresses(state: _State, operand: str, threads: Values) -> Values:
    match = _ADDRESS.fullmatch(operand)
    assert match, operand
    base, shift = match[1], int(match[2] or 0)
    if base == state.kernel.parameter:
        return np.full(len(threads), shift, np.uint64)
    return state.get(base, threads, "u64") + np.array(shift, np.int64).view(np.uint64)


def _vector(parts: Sequence[str]) -> int:
    return next((int(p[1:]) for p in parts if p in ("v2", "v4")), 1)


def _load(state: _State, i: Instruction, threads: Values) -> None:
    space, dtype, count = i.parts[0], np.dtype(TYPES[i.parts[-1]]), _vector(i.parts)
    targets = _names(i.operands[0]) if count > 1 else [i.operands[0]]
    addresses = _addresses(state, i.operands[1], threads)
    if space == "param":
        size = dtype.itemsize * count
        if int(addresses.max()) + size > state.kernel.parameter_bytes or (addresses % np.uint64(size)).any():
            raise PtxError(f"{i.text}: outside of the kernel's parameter, or misaligned in it")
        at = addresses.astype(np.int64)[:, None] + np.arange(size)
        values = np.ascontiguousarray(state.parameter[at]).view(dtype)
        found = [values[:, k] for k in range(count)]
    elif space == "global":
        what = "read-only load" if "nc" in i.parts else "load"
        found = state.memory.load(what, addresses, threads, dtype, count)
    else:
        _unknown(i)
    for name, value in zip(targets, found, strict=True):
        state.put(name, threads, value)


def _store(state: _State, i: Instruction, threads: Values) -> None:
    if i.parts[0] != "global":
        _unknown(i)
    sources = _names(i.operands[1]) if _vector(i.parts) > 1 else [i.operands[1]]
    values = [state.get(source, threads, i.parts[-1]) for source in sources]
    state.memory.store(_addresses(state, i.operands[0], threads), threads, values)


def _atomic(state: _State, i: Instruction, threads: Values) -> None:
    if i.parts[:2] != ("global", "add"):
        _unknown(i)
    kind = i.parts[-1]
    state.memory.add_up(_addresses(state, i.operands[-2], threads), threads, state.get(i.operands[-1], threads, kind))


_MEMORY: dict[str, Callable[[_State, Instruction, Values], None]] = {
    "ld": _load, "st": _store, "atom": _atomic, "red": _atomic,
}  # fmt: skip
