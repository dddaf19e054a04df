"""Sliding windows as MONAI and nnU-Net lay and weigh them, slow and in float64, and engines to compare with them.

Windows are written down from what the two libraries document: MONAI steps ``window * (1 - overlap)`` pixels and moves the
last window back into the image; nnU-Net takes as many windows as steps of a share of the window need, and spreads them.
Both put an image that is smaller than the window into the middle of zeros, after normalisation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil, prod
from pathlib import Path
from typing import Any

import networks
import numpy as np

from unet_rt.baseline.model import baseline_engine, open_model
from unet_rt.baseline.tiles import blended_spec, untiled_spec
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.engine.engine import Engine, EngineView

Array = np.ndarray[Any, np.dtype[Any]]

MEAN, STD = (7.0, -3.0), (2.0, 5.0)  # of two channels: 0 after normalisation is another pixel in each
CONTRACT = Contract(task="multiclass", output_is="logits", normalization=Normalization("fixed", mean=MEAN, std=STD))

# (image, window): larger than the window and no multiple of anything, smaller along one axis, smaller along all, equal
SHAPES = [
    ((201, 317), (96, 64)),
    ((61, 130), (96, 64)),
    ((33, 41), (96, 64)),
    ((96, 64), (96, 64)),
    ((21, 50, 37), (16, 32, 32)),
    ((11, 45, 32), (16, 32, 32)),
]


def monai_starts(image: int, window: int, overlap: Fraction) -> list[int]:
    """Origins along one axis."""
    step = max(1, int(window * (1 - overlap)))
    starts = [0]
    while starts[-1] + window < image:
        starts.append(min(starts[-1] + step, image - window))
    return starts


def nnunet_starts(image: int, window: int, step: Fraction) -> list[int]:
    """Origins along one axis; ``step``: share of the window. Halves are rounded as float64 happens to hold them."""
    last = max(0, image - window)
    gaps = ceil(last / (window * step))
    return [0] if gaps == 0 else np.rint(np.arange(gaps + 1) * (last / gaps)).astype(int).tolist()


def gaussian(window: Sequence[int], centre: Callable[[int], float]) -> Array:
    """A Gaussian whose deviation is an eighth of the window, 1 at its ``centre`` along every axis."""
    places = np.meshgrid(*(np.arange(n) for n in window), indexing="ij")
    squares = sum(((x - centre(n)) / (n / 8)) ** 2 for x, n in zip(places, window, strict=True))
    return np.exp(-squares / 2)


def monai_weight(window: Sequence[int]) -> Array:
    return gaussian(window, lambda n: (n - 1) / 2).clip(min=1e-3)


def nnunet_weight(window: Sequence[int]) -> Array:
    """Ten times the Gaussian, as float16 holds it; what that rounds to 0 weighs as much as the least that it does not."""
    weight = (10 * gaussian(window, lambda n: n // 2)).astype(np.float16).astype(np.float64)
    weight[weight == 0] = weight[weight > 0].min()
    return weight


def windows_of(
    rule: str, image: Sequence[int], window: Sequence[int], share: Fraction
) -> tuple[list[list[int]], Array]:
    """Origins per axis and the weights, with neighbours that have ``share`` of the window in common."""
    if rule == "monai":
        return [monai_starts(n, w, share) for n, w in zip(image, window, strict=True)], monai_weight(window)
    return [nnunet_starts(n, w, 1 - share) for n, w in zip(image, window, strict=True)], nnunet_weight(window)


def slide(
    run: Callable[[Array], Array], x: Array, window: Sequence[int], starts: list[list[int]], weight: Array
) -> Array:
    """The weighted mean of what ``run`` makes of the windows of a normalised image (C, *spatial)."""
    missing = [max(0, w - n) for n, w in zip(x.shape[1:], window, strict=True)]
    before = [m // 2 for m in missing]
    x = np.pad(x, [(0, 0), *((b, m - b) for b, m in zip(before, missing, strict=True))])
    total: Any = 0.0
    weights = np.zeros(x.shape[1:])
    for origin in itertools.product(*starts):
        place = tuple(slice(o, o + w) for o, w in zip(origin, window, strict=True))
        y = run(np.ascontiguousarray(x[(slice(None), *place)])[None])[0]
        if isinstance(total, float):
            total = np.zeros((len(y), *x.shape[1:]))
        total[(slice(None), *place)] += weight * y
        weights[place] += weight
    inside = tuple(slice(b, w - (m - b)) for b, m, w in zip(before, missing, x.shape[1:], strict=True))
    return (total / weights)[(slice(None), *inside)]


def weight_sums(image: Sequence[int], window: Sequence[int], starts: list[list[int]], weight: Array) -> Array:
    """What the weights over every sample come to, for images that are no smaller than the window."""
    total = np.zeros(image)
    for origin in itertools.product(*starts):
        total[tuple(slice(o, o + w) for o, w in zip(origin, window, strict=True))] += weight
    return total


def covering(window: Sequence[int], starts: list[list[int]]) -> int:
    """Windows that hold a sample, at most."""
    return prod(
        max(sum(a <= b < a + w for a in origins) for b in origins) for origins, w in zip(starts, window, strict=True)
    )


def rounding(values: Array, window: Sequence[int], starts: list[list[int]]) -> float:
    """How far two float32 means of the same ``values`` may lie apart.

    Of n windows over a sample each sum takes n roundings, numerator and denominator of both: 4 n, half a unit each. The
    weights' own errors count twice: an exponent of at most 8 computed in float32 is off by 16 units, the exponential and
    its product with the other axes' by 3 more.
    """
    return float((2 * covering(window, starts) + 19 * len(window)) * np.finfo(np.float32).eps * np.abs(values).max())


def pictures(shape: Sequence[int], seed: int = 0) -> tuple[Array, Array]:
    """Pixels (C, *spatial) and the same as the network gets them."""
    x = np.concatenate([networks.texture((1, 1, *shape), seed + k)[0] for k in range(len(MEAN))])
    mean, std = (np.array(v, np.float32).reshape(-1, *[1] * len(shape)) for v in (MEAN, STD))
    pixels = x * std + mean
    return pixels, (pixels - mean) / std


def module(dims: int) -> Any:
    """A U-Net with instance normalisation, as nnU-Net and MONAI train them: what it says depends on the window."""
    return networks.build(networks.UNetSpec(dims=dims, norm="instance", inputs=len(MEAN), classes=3, channels=8))


def export(dims: int, folder: Path) -> Path:
    """Its ONNX file."""
    path = folder / f"instance{dims}.onnx"
    networks.export(module(dims), [(1, len(MEAN), *(32,) * dims)], path, free_batch=True)
    return path


def engine_of(path: Path, work: Path) -> Engine:
    """The file in ONNX Runtime, FP32, to be looked at with :func:`placed`."""
    work.mkdir(exist_ok=True)
    model = open_model(path, work, options=CONTRACT)
    return baseline_engine(model, untiled_spec(model))


def placed(
    engine: Engine, rule: str, window: Sequence[int], overlap: Sequence[int] | None = None, **more: Any
) -> Engine:
    """The same engine with its tiles placed by a rule."""
    spec = blended_spec(engine.spec, tuple(window), Path("m.onnx"), overlap=overlap, placement=rule, **more)
    return EngineView(engine, replace(spec, batch=None))
