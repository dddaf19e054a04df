"""Crop-and-concat as an operator of PyTorch: ``torch.ops.unet_rt.crop_concat(skip, up, crop)``.

Eagerly it runs the project's kernel (one copy of every sample) where that knows device, dtype and layout, and slicing and
``torch.cat`` elsewhere; it has a gradient, and exports to ONNX as plain Slice and Concat.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import calls
from ..kernels import native as native_module

NATIVE = (torch.float32, torch.float16, torch.int8, torch.uint8)


def crop_concat(skip: Tensor, up: Tensor, crop: int) -> Tensor:
    """``skip`` (N, C1, *S1) without ``crop`` samples at each side, and ``up`` (N, C2, *S2): (N, C1 + C2, *S2)."""
    if torch.compiler.is_compiling():  # a compiler does better with what it can see through
        return _plain(skip, up, crop)
    result: Tensor = _operator(skip, up, crop)
    return result


def _plain(skip: Tensor, up: Tensor, crop: int) -> Tensor:
    if crop:
        skip = skip[(slice(None), slice(None), *(slice(crop, -crop) for _ in range(skip.dim() - 2)))]
    return torch.cat((skip, up), dim=1)


def _operator_body(skip: Tensor, up: Tensor, crop: int) -> Tensor:
    room = [s - u for s, u in zip(skip.shape[2:], up.shape[2:], strict=True)]
    if any(r != 2 * crop for r in room):
        raise ValueError(f"skip {tuple(skip.shape)} is not {crop} samples larger a side than up {tuple(up.shape)}")
    native = (
        skip.dtype == up.dtype
        and skip.dtype in NATIVE
        and skip.device == up.device
        and skip.is_contiguous()
        and up.is_contiguous()
        and (skip.device.type == "cpu" or (skip.device.type == "cuda" and native_module.cuda_missing() is None))
    )
    if not native:
        return _plain(skip, up, crop)
    out = torch.empty((up.shape[0], skip.shape[1] + up.shape[1], *up.shape[2:]), dtype=up.dtype, device=up.device)
    if up.device.type == "cpu":
        arrays: list[Any] = [t.detach().numpy() for t in (skip, up, out)]
        calls.crop_concat(*arrays, offset=[crop] * len(room), threads=torch.get_num_threads())
    else:
        stream = torch.cuda.current_stream(up.device).cuda_stream
        calls.crop_concat(skip.detach(), up.detach(), out, offset=[crop] * len(room), stream=stream)
    return out


_operator: Any = torch.library.custom_op(
    "unet_rt::crop_concat", _operator_body, mutates_args=(), schema="(Tensor skip, Tensor up, int crop) -> Tensor"
)


@_operator.register_fake  # type: ignore[untyped-decorator] # the operator is Any
def _shape(skip: Tensor, up: Tensor, crop: int) -> Tensor:
    return _plain(skip, up, crop)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    skip, _, ctx.crop = inputs
    ctx.channels = skip.shape[1]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    skip, up = grad[:, : ctx.channels], grad[:, ctx.channels :]
    around = [ctx.crop] * (2 * (grad.dim() - 2))
    return functional.pad(skip, around) if ctx.crop else skip, up, None


_operator.register_autograd(_gradient, setup_context=_remember)


def _symbolic(g: Any, skip: Any, up: Any, crop: Any) -> Any:
    from torch.onnx import symbolic_helper

    number = int(symbolic_helper._maybe_get_const(crop, "i"))
    if number:
        rank = symbolic_helper._get_tensor_rank(g.original_node.output()) or 4
        axes = list(range(2, rank))
        numbers = ([number] * len(axes), [-number] * len(axes), axes)  # starts, ends, axes
        skip = g.op("Slice", skip, *(g.op("Constant", value_t=torch.tensor(v)) for v in numbers))
    return g.op("Concat", skip, up, axis_i=1)


torch.onnx.register_custom_op_symbolic("unet_rt::crop_concat", _symbolic, 11)  # type: ignore[attr-defined]
