"""What operators with windows do to stride, halo and exactness: convolutions, pooling, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import size_text
from . import line as lines
from .file import Node
from .numbers import Remark
from .tensor import (
    Axis,
    CannotRun,
    Inputs,
    Tensor,
    Walk,
    axis_size,
    first_input,
    is_tracked,
    numbers_of,
    plain,
    rule,
    sole_line,
    unknown,
    value_of,
)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    fault = frozenset({state.remark(node, "pools over the whole image")})
    axes = (first.axes or ())[:2] + tuple(plain(1) for _ in range(first.rank - 2))
    return [Tensor(axes, first.dtype, faults=fault)]


# --------------------------------------------------------------------------------------------------------- windows


# Average pools to at most so many parts per axis, of so many samples or more, are taken for adaptive ones.
_PARTS, _PART = 8, 3
_LARGEST = 1 << 24  # of a kernel, stride, dilation or pad: more pixels than any image has along an axis


@dataclass(frozen=True)
class _Windows:
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    auto: str


def _windows(node: Node, kernel: Sequence[int]) -> _Windows:
    n, a = len(kernel), node.attributes
    pads = _numbers("pads", a.get("pads", [0] * (2 * n)), -_LARGEST)
    return _Windows(
        _numbers("kernel", kernel, 1),
        _numbers("strides", a.get("strides", [1] * n), 1),
        _numbers("dilations", a.get("dilations", [1] * n), 1),
        pads[:n],
        pads[n:],
        str(a.get("auto_pad", "NOTSET")),
    )


def _numbers(name: str, values: Sequence[int], least: int) -> tuple[int, ...]:
    """Numbers of a window that some image could have."""
    found = tuple(int(v) for v in values)
    for value in found:
        if not least <= value <= _LARGEST:
            raise lines.TooLongError(f"has {name} of {value}, beyond any image")
    return found


def _window_size(n: int, kernel: int, stride: int, before: int, after: int, auto: str, ceil: bool) -> tuple[int, int]:
    """(output samples, padding before) of a convolution or pooling whose dilated kernel spans ``kernel`` samples."""
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        out = -(-n // stride)
        total = max(0, (out - 1) * stride + kernel - n)
        return out, (total // 2 if auto == "SAME_UPPER" else total - total // 2)
    if auto == "VALID":
        before = after = 0
    span = n + before + after - kernel
    if span < 0:
        raise CannotRun(f"needs {kernel} samples and has {n + before + after}")
    out = (-(-span // stride) if ceil else span // stride) + 1
    if ceil and (out - 1) * stride >= n + before:
        out -= 1  # a window must begin inside the samples or the padding before them
    return out, before


def _slide(state: Walk, node: Node, axis: Axis, k: int, w: _Windows, ceil: bool) -> tuple[Axis, list[str]]:
    """One axis of a convolution or pooling."""
    n = axis_size(axis)
    kernel, stride, dilation = w.kernel[k], w.strides[k], w.dilations[k]
    span = (kernel - 1) * dilation + 1
    size, before = _window_size(n, span, stride, w.before[k], w.after[k], w.auto, ceil)
    texts = []
    if w.auto in ("SAME_UPPER", "SAME_LOWER") and stride > 1 and n % stride:
        # The padding before depends on the size; a tile of another phase would read other pixels.
        texts.append(f"pads by {w.auto}, which shifts with sizes that are no multiple of its stride {stride}")
    line = sole_line(axis)
    if line is None:
        if not is_tracked(axis) or (span == 1 and stride == 1 and size == n):
            return (axis if size == n and is_tracked(axis) else plain(size)), texts
        return plain(size), [*texts, "slides over a flattened axis"]
    state.drop(line, lines.unreached(line, kernel, stride, dilation, before, size))
    return (lines.window(line, kernel, stride, dilation, before, size),), texts


def _slid(state: Walk, node: Node, x: Tensor, w: _Windows, ceil: bool = False) -> tuple[list[Axis], frozenset[Remark]]:
    if x.rank != len(w.kernel) + 2:
        raise CannotRun(f"has a kernel of {len(w.kernel)} axes and an input of {x.rank}")
    results = [_slide(state, node, axis, k, w, ceil) for k, axis in enumerate((x.axes or ())[2:])]
    faults = frozenset(state.remark(node, text) for _, texts in results for text in texts)
    if x.axes is not None and is_tracked(x.axes[1]):
        faults |= {state.remark(node, "sums over an axis that follows the image")}
    return [axis for axis, _ in results], faults


@rule("Conv", "ConvInteger", "QLinearConv", "FusedConv")
def _conv(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    weight = x[3] if node.op == "QLinearConv" else x[1]
    if weight is None:
        raise CannotRun("has no weights")
    if not weight.constant:
        return unknown(state, node, x, "takes its weights from the image")
    group = int(node.attributes.get("group", 1))
    out_channels, per_group, *kernel = weight.shape
    if first.shape[1] != per_group * group:
        raise CannotRun(f"has weights for {per_group * group} channels and an input of {first.shape[1]}")
    axes, faults = _slid(state, node, first, _windows(node, kernel))
    result = (*(first.axes or ())[:1], plain(out_channels), *axes)
    state.macs(per_group * math.prod(kernel), result)
    zero = x[7] if node.op == "QLinearConv" else None
    dtype = 6 if node.op == "ConvInteger" else first.dtype if zero is None else zero.dtype
    extra = [t for t in x[8:] if t is not None] if node.op == "FusedConv" else []
    if extra:
        return unknown(state, node, x, "is fused with more than is understood")
    return [Tensor(result, dtype, faults=faults)]


def _is_adaptive(op: str, spans: Sequence[int], w: _Windows, shape: Sequence[int]) -> bool:
    """Whether a pool looks like one to a number of parts, exported at one size: one part, or a few large ones."""
    if any((*w.before, *w.after)):
        return False
    if all(k == n > 1 for k, n in zip(spans, shape, strict=True)):
        return True
    parts = all(
        k == s >= _PART and n % k == 0 and n <= _PARTS * k for k, s, n in zip(spans, w.strides, shape, strict=True)
    )
    return op == "AveragePool" and parts


@rule("MaxPool", "AveragePool", "LpPool")
def _pool(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    w = _windows(node, node.attributes["kernel_shape"])
    shape = first.shape[2:]
    spans = [(k - 1) * d + 1 for k, d in zip(w.kernel, w.dilations, strict=True)]
    if _is_adaptive(node.op, spans, w, shape):
        state.whole_pools.add(node.name)
    if node.name in state.global_pools:
        bins = [n // k for n, k in zip(shape, spans, strict=True)]
        of = "the whole image" if max(bins) == 1 else f"{size_text(bins)} parts of the image"
        fault = frozenset({state.remark(node, f"pools over {of}: its kernel {size_text(w.kernel)} is a baked size")})
        return [Tensor((*(first.axes or ())[:2], *(plain(max(n, 1)) for n in bins)), first.dtype, faults=fault)]
    axes, faults = _slid(state, node, first, w, bool(node.attributes.get("ceil_mode", 0)))
    state.sums += 0 if node.op == "MaxPool" else math.prod(w.kernel)
    result = (*(first.axes or ())[:2], *axes)
    outputs = [Tensor(result, first.dtype, faults=faults)]
    if len(node.outputs) > 1 and node.outputs[1]:
        simple = w.kernel == w.strides and not any((*w.before, *w.after)) and set(w.dilations) == {1}
        fault = frozenset({state.remark(node, "gives positions counted over the whole image")})
        outputs.append(Tensor(result, 7, faults=fault, pooled=w.kernel if simple else ()))
    return outputs


@rule("MaxUnpool", pixels=(0, 1), numbers=(2,))
def _unpool(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, indices = first_input(x), x[1]
    kernel = _numbers("kernel", node.attributes["kernel_shape"], 1)
    strides = _numbers("strides", node.attributes.get("strides", [1] * len(kernel)), 1)
    if indices is None or indices.pooled != kernel or strides != kernel or len(x) > 2:
        return unknown(state, node, x, "puts values where another node says")
    result = [*(first.axes or ())[:2]]
    for axis, other, k in zip((first.axes or ())[2:], (indices.axes or ())[2:], kernel, strict=True):
        a, b = sole_line(axis), sole_line(other)
        result.append(
            plain(axis_size(axis) * k) if a is None or b is None else (lines.repeat(lines.merge_lines([a, b]), k),)
        )
    # The positions count over the whole image: not exact, by the fault that the indices bring along.
    return [Tensor(tuple(result), first.dtype)]


@rule("ConvTranspose")
def _conv_transpose(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, weight, a = first_input(x), x[1], node.attributes
    if weight is None or not weight.constant:
        return unknown(state, node, x, "takes its weights from the image")
    in_channels, per_group, *kernel = weight.shape
    if first.shape[1] != in_channels:
        raise CannotRun(f"has weights for {in_channels} channels and an input of {first.shape[1]}")
    w = _windows(node, kernel)
    extra = _numbers("output_padding", a.get("output_padding", [0] * len(kernel)), 0)
    target = [int(n) for n in a["output_shape"]][-len(kernel) :] if "output_shape" in a else None
    axes: list[Axis] = []
    texts: list[str] = []
    for k, axis in enumerate((first.axes or ())[2:]):
        n, span = axis_size(axis), (w.kernel[k] - 1) * w.dilations[k] + 1
        full = w.strides[k] * (n - 1) + extra[k] + span
        if target is not None or w.auto in ("SAME_UPPER", "SAME_LOWER"):
            size = n * w.strides[k] if target is None else target[k]
            total = max(0, full - size)
            before = total // 2 if w.auto == "SAME_UPPER" else total - total // 2
        else:
            before = 0 if w.auto == "VALID" else w.before[k]
            size = full - before - (0 if w.auto == "VALID" else w.after[k])
        if size < 1:
            raise CannotRun(f"leaves {size} samples")
        line = sole_line(axis)
        if line is None:
            texts += ["slides over a flattened axis"] if is_tracked(axis) else []
            axes.append(plain(size))
        else:
            moved = lines.transposed_window(line, w.kernel[k], w.strides[k], w.dilations[k], before, size)
            axes.append((moved,))
    batch = (first.axes or ())[:1]
    state.macs(per_group * math.prod(kernel), (first.axes or ()))
    faults = frozenset(state.remark(node, text) for text in texts)
    return [Tensor((*batch, plain(per_group * int(a.get("group", 1))), *axes), first.dtype, faults=faults)]


# --------------------------------------------------------------------------------------------- moving samples about


@rule("Pad", numbers=(1,))
def _pad(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, a = first_input(x), node.attributes
    given = a.get("pads", a.get("paddings"))
    if given is None:
        given = value_of(x[1]) if len(x) > 1 else None
    if given is None:
        return unknown(state, node, x, "pads by what is in the image")
    pads = _numbers("pads", given, -_LARGEST)
    axes = range(first.rank)
    if len(x) > 3 and x[3] is not None:
        chosen = value_of(x[3])
        if chosen is None:
            return unknown(state, node, x, "pads axes that depend on the image")
        axes = [int(k) % first.rank for k in chosen.ravel()]  # type: ignore[assignment]
    if len(x) > 2 and x[2] is not None and not x[2].constant:
        return unknown(state, node, x, "pads with a value taken from the image")
    mode = str(a.get("mode", "constant"))
    result, texts = list(first.axes or ()), list[str]()
    follower = state.follower(node)
    if len(x) > 1 and x[1] is not None and x[1].followed is not None:
        for number in numbers_of(x[1]):
            follower.holds(number)  # cropping instead of padding is another graph
            texts += [] if number.constant else ["pads by a number that changes with the size of the image"]
    for position, k in enumerate(axes):
        before, after = pads[position], pads[position + len(pads) // 2]
        result[k], found = _pad_axis(result[k], before, after, mode)
        texts += found
    faults = frozenset(state.remark(node, t) for t in texts)
    return [Tensor(tuple(result), first.dtype, faults=faults, bounds=frozenset(follower.bounds))]


def _pad_axis(axis: Axis, before: int, after: int, mode: str) -> tuple[Axis, list[str]]:
    n = axis_size(axis)
    if before == 0 and after == 0:
        return axis, []
    if n + before + after < 1:
        raise CannotRun(f"leaves {n + before + after} samples")
    if mode == "reflect" and max(before, after) >= n:
        raise CannotRun(f"reflects {max(before, after)} of {n} samples")
    line = sole_line(axis)
    if line is None:
        return plain(n + before + after), (["pads a flattened axis"] if is_tracked(axis) else [])
    moved = lines.pad(line, before, after, mode)
    return (moved,), (["wraps around the image"] if mode == "wrap" else [])
