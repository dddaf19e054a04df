"""A PyTorch module becomes an ONNX graph: free batch and spatial axes, BatchNorm folded, the contract in its metadata.

Needs torch (``pip install unet-rt[torch]``); ONNX Runtime checks the result. Nothing is written unless the
graph gives what the module gives, on realistic pixels, at two sizes and two batch sizes.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import backends
from ..contract.contract import Contract
from ..errors import BackendError, ContractError, GraphError, first_line, size_text
from ..system.durable import Disk
from .exporters import Array, Exporter, dynamo, tidy, trace

if TYPE_CHECKING:
    import onnx
    from torch import nn


METADATA_KEY = "unet_rt.contract"
JUMPS = 8  # as many times the samples that the module itself turns may be turned in the graph,
MOST_JUMPS = 0.05  # but not more than this share
OPSET = 18  # the highest that both exporters write without conversion


@dataclass(frozen=True)
class Difference:
    """Between graph and module: the largest, and the share of samples beyond the tolerance."""

    worst: float
    share: float


@dataclass(frozen=True)
class Export:
    """What was written and how it was checked.

    Attributes:
        path: The ONNX file.
        exporter: ``trace`` (TorchScript) or ``dynamo`` (torch.export).
        opset: ONNX operator set.
        parameters: Numbers in the graph's initialisers of floating type.
        sizes: Input sizes (spatial axes) at which graph and module were compared.
        max_error: Largest absolute difference of an output between ONNX Runtime and torch, over both sizes.
        tolerance: What was allowed: from the module's own float32 rounding, measured against float64.
        notes: Decisions worth knowing, one sentence each.
    """

    path: Path
    exporter: str
    opset: int
    parameters: int
    sizes: tuple[tuple[int, ...], ...]
    max_error: float
    tolerance: float
    notes: tuple[str, ...] = ()


def export(
    module: nn.Module,
    out: str | os.PathLike[str],
    *,
    contract: Contract | None = None,
    sizes: Sequence[int | Sequence[int]] | None = None,
    pixels: npt.ArrayLike | None = None,
    exporter: Exporter = "auto",
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
) -> Export:
    """Write ``module`` to ``out`` as ONNX and check it against the module.

    Args:
        module: Any network that takes one tensor ``(N, C, *spatial)`` and returns a tensor or a sequence of them.
            It is exported in evaluation mode and left as it was.
        out: The ``.onnx`` file; written whole or not at all.
        contract: Stored in the metadata under ``unet_rt.contract``. Its axes and channels shape the example input.
        sizes: Two input sizes to compare at; a number stands for all spatial axes. Default: from the U-Net's
            architecture, else the contract's trained tile (or 256 px) and 64 px more.
        pixels: ``(C, *spatial)`` or ``(*spatial)``: the network's input (already normalised) to compare on. Default:
            microscopy drawn by :mod:`unet_rt.drawing.microscopy`.
        exporter: ``trace`` is fast and writes small graphs; ``dynamo`` follows more Python. ``auto`` traces, and
            takes the other one if the traced graph cannot be made or does not equal the module at both sizes.
        opset: ONNX operator set.
        metadata: More entries for the graph's metadata, beside the contract.

    Raises:
        GraphError: no exporter gives a graph that equals the module.
        ContractError: the module's channels cannot be told, or contradict the contract.
        BackendError: ONNX Runtime is missing, so that the graph cannot be checked.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise BackendError("torch is missing, which runs the module; pip install unet-rt[torch]") from error
    import onnx

    if not isinstance(module, torch.nn.Module):
        raise GraphError(f"export takes a torch.nn.Module, not {type(module).__name__}")
    contract = contract or Contract()
    spatial, channels = _input_of(module, contract)
    tiles = _tiles(module, contract, sizes, spatial)
    frozen = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    inputs = [_pixels(tile, channels, pixels) for tile in tiles]
    wanted = [_run_torch(frozen, x) for x in inputs]
    tolerance, jumpy = _tolerance(frozen, inputs, wanted)

    ways: dict[str, Callable[..., bytes]] = {"trace": trace, "dynamo": dynamo}
    tried = ["trace", "dynamo"] if exporter == "auto" else [exporter]
    notes: list[str] = []
    for name in tried:
        try:
            model = onnx.load_model_from_string(ways[name](frozen, inputs[0], len(wanted[0]), opset))
        except Exception as error:  # noqa: BLE001 - exporters raise anything; what they say goes into the message
            notes.append(f"{name}: {type(error).__name__}: {first_line(error)}")
            continue
        _sign(model, {**(metadata or {}), METADATA_KEY: json.dumps(contract.to_json())})
        errors = _errors(model, inputs, wanted, tolerance)
        if all(isinstance(e, Difference) and (e.worst <= tolerance or e.share <= jumpy) for e in errors):
            found = [e for e in errors if isinstance(e, Difference)]
            worst, share = max(e.worst for e in found), max(e.share for e in found)
            if share > 0:
                notes.append(
                    f"{share:.3%} of the samples are off by more than {tolerance:.1e}, up to {worst:.1e}: the network takes "
                    f"decisions (max-unpooling, for one) that the last bit of a number can turn; {jumpy / JUMPS:.3%} of "
                    "its own samples turn when its input changes by a rounding"
                )
            Disk().write_whole(Path(out), model.SerializeToString())
            return Export(
                path=Path(out),
                exporter=name,
                opset=opset,
                parameters=_parameters(model),
                sizes=tuple(tiles),
                max_error=worst,
                tolerance=tolerance,
                notes=tuple(notes),
            )
        for tile, e in zip(tiles, errors, strict=True):
            size = size_text(tile)
            if isinstance(e, str):
                notes.append(f"{name}: at {size} px the graph fails: {e}")
            elif e.worst > tolerance:
                notes.append(f"{name}: at {size} px the graph is off by {e.worst:.3g}, {tolerance:.3g} are allowed")
    raise GraphError(
        "no ONNX graph equals the module:\n  " + "\n  ".join(notes) + "\n"
        "Look for sizes taken as Python numbers in forward() (pass tensors' shapes on), or give sizes=[...] that the "
        "network accepts."
    )


def _sign(model: onnx.ModelProto, metadata: dict[str, str]) -> None:
    """Names without the exporter's clutter, this package as producer, and the metadata; the graph is checked."""
    import onnx

    tidy(model)
    model.producer_name, model.producer_version = "unet-rt", ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)


def read_pixels(
    image: str | os.PathLike[str], contract: Contract, axes: str | None = None, channels: str | None = None
) -> Array:
    """(C, *spatial) of the first plane of an image, normalised as ``contract`` says: what to compare on."""
    from ..images.normalize import affine, normalize_pixels
    from ..images.open import open_image
    from ..images.reading import Reading

    if contract.normalization is None:
        raise ContractError("pixels to compare on need a normalisation; declare it in the contract")
    spatial = len(contract.axes) - 2 if contract.axes else 2
    with open_image(image, contract, Reading(axes, channels), spatial=spatial) as source:
        raw = source.read(0, (0,) * spatial, source.shape)
        return normalize_pixels(raw, affine(contract.normalization, source).plane(0))


def _input_of(module: nn.Module, contract: Contract) -> tuple[int, int]:
    """Number of spatial axes and channels."""
    from torch import nn

    spec = getattr(module, "spec", None)
    kinds: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    first = next((m for m in module.modules() if type(m) in kinds), None)
    if contract.axes is not None:
        if not contract.axes.startswith("NC"):
            raise ContractError(
                f"contract axes are {contract.axes!r}, but PyTorch modules take channels first; use NCYX or NCZYX"
            )
        spatial = len(contract.axes) - 2
    elif spec is not None and hasattr(spec, "dims"):
        spatial = int(spec.dims)
    elif first is not None:
        spatial = kinds[type(first)]
    else:
        raise ContractError("the module holds no convolution; declare Contract(axes='NCYX', channels=...)")
    known = getattr(spec, "in_channels", None) or getattr(first, "in_channels", None)
    if contract.channels and known and len(contract.channels) != known:
        raise ContractError(
            f"the contract names {len(contract.channels)} channels {contract.channels}, the module takes {known}"
        )
    channels = len(contract.channels) or known
    if not channels:
        raise ContractError("the module's input channels are unknown; declare Contract(channels=('...',))")
    return spatial, int(channels)


def _tiles(
    module: nn.Module, contract: Contract, sizes: Sequence[int | Sequence[int]] | None, spatial: int
) -> list[tuple[int, ...]]:
    """Two tile sizes; the second one is not square, so that mixed-up axes show."""
    if sizes is not None:
        tiles = [(s,) * spatial if isinstance(s, int) else tuple(int(k) for k in s) for s in sizes]
        if len(tiles) < 2 or any(len(t) != spatial for t in tiles):
            raise GraphError(f"sizes {sizes} are not two sizes over {spatial} spatial axes; use e.g. [256, 320]")
        return tiles
    spec = getattr(module, "spec", None)
    start = 256 if spatial == 2 else 48
    if spec is not None and hasattr(spec, "size_at_least"):
        a = spec.size_at_least(min(start, *contract.trained_tile) if contract.trained_tile else start)
        b = spec.size_at_least(a + 1)
        return [(a,) * spatial, (*(a,) * (spatial - 1), b)]
    a_tile = contract.trained_tile or (start,) * spatial
    return [tuple(a_tile), (*a_tile[:-1], a_tile[-1] + 64)]


def _pixels(tile: tuple[int, ...], channels: int, pixels: npt.ArrayLike | None) -> Array:
    """(2, C, *tile) of normalised pixels: two different windows, mirrored where the image is smaller."""
    if pixels is None:
        from ..drawing.microscopy import microscopy

        drawn = [microscopy(tile[-2:] if len(tile) > 1 else (32, *tile), seed=seed).image for seed in (1, 2)]
        # Dithered below one grey level: equal neighbours are an artefact of integers, and ties prove little.
        random = np.random.default_rng(3)
        planes = [image + random.random(image.shape, np.float32) for image in drawn]
        planes = [(p - p.min()) / np.float32(max(float(np.ptp(p)), 1.0)) for p in planes]
        if len(tile) == 1:
            planes = [p[0] for p in planes]
        # Deeper planes are dimmer: a volume whose planes differ.
        for size in reversed(tile[:-2]):
            fade = np.linspace(1, 0.5, size, dtype=np.float32)
            planes = [fade.reshape(-1, *(1,) * p.ndim) * p for p in planes]
        return np.stack([np.stack([p * np.float32(0.9**c) for c in range(channels)]) for p in planes])
    given = np.asarray(pixels, np.float32)
    given = given[None] if given.ndim == len(tile) else given
    if given.ndim != len(tile) + 1 or given.shape[0] != channels:
        raise ContractError(f"pixels are {given.shape}; the module takes ({channels}, *spatial) with {len(tile)} axes")
    grow = [(0, 0)] + [(0, max(0, t - s)) for t, s in zip(tile, given.shape[1:], strict=True)]
    given = np.pad(given, grow, mode="reflect")
    low = given[(slice(None), *(slice(0, t) for t in tile))]
    high = given[(slice(None), *(slice(s - t, s) for t, s in zip(tile, given.shape[1:], strict=True)))]
    return np.ascontiguousarray(np.stack([low, np.flip(high, -1)]))


def _run_torch(module: nn.Module, x: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    import torch

    with torch.no_grad():
        y = module(torch.from_numpy(x))
    outputs = [y] if isinstance(y, torch.Tensor) else list(y.values()) if isinstance(y, dict) else list(y)
    if not outputs or not all(isinstance(t, torch.Tensor) for t in outputs):
        raise GraphError(f"the module returns {type(y).__name__}; export takes modules that return tensors")
    return [t.numpy() for t in outputs]


def _tolerance(module: nn.Module, inputs: list[Array], wanted: list[list[npt.NDArray[Any]]]) -> tuple[float, float]:
    """(error, share of samples that may have a larger one).

    The error is 16 times the module's own float32 rounding error: another order of summation is allowed, another
    result not. Seen: graph and module differ by 0.5 to 2 times that error, folded BatchNorm included; by 10 times in
    3-D networks of few channels. The share is 0 unless the module jumps: where a change of the input by a rounding
    turns some of its samples, so may a graph.
    """
    precise = copy.deepcopy(module).double()
    own, scale, finite = 0.0, 0.0, True
    offs: list[npt.NDArray[Any]] = []
    random = np.random.default_rng(0)
    for x, y32 in zip(inputs, wanted, strict=True):
        for a, b in zip(_run_torch(precise, x.astype(np.float64)), y32, strict=True):
            off = np.abs(a - b)
            offs.append(off)
            # A jump would hide all else: seen in smooth networks are maxima up to 20 times that quantile.
            own = max(own, min(float(np.max(off, initial=0.0)), 100 * float(np.quantile(off, 0.9))))
            scale = max(scale, float(np.max(np.abs(a), initial=0.0)))
            finite = finite and bool(np.isfinite(b).all())
    if not finite:
        raise GraphError("the module's output is not finite on realistic pixels; train it, or look for a wrong scale")
    tolerance = max(16 * own, 16 * float(np.finfo(np.float32).eps) * scale)
    turned = max(float(np.mean(off > tolerance)) for off in offs)
    for x, y32 in zip(inputs, wanted, strict=True):
        moved = np.nextafter(x, np.where(random.random(x.shape) < 0.5, np.float32(-np.inf), np.float32(np.inf)))
        for a, b in zip(_run_torch(module, moved), y32, strict=True):
            turned = max(turned, float(np.mean(np.abs(a - b) > tolerance)))
    return tolerance, min(JUMPS * turned, MOST_JUMPS)


def _errors(
    model: onnx.ModelProto, inputs: list[Array], wanted: list[list[npt.NDArray[Any]]], tolerance: float
) -> list[Difference | str]:
    """Per input: the difference to torch, or what ONNX Runtime said."""
    import onnx

    backend = backends.get("onnxruntime")
    missing = backend.missing()
    if missing is not None:
        raise BackendError(f"the graph cannot be checked: {missing}")
    with tempfile.TemporaryDirectory(prefix="unet-rt-export-") as folder:
        path = Path(folder) / "graph.onnx"
        onnx.save(model, str(path))
        try:
            session = backend.load(path, precision="fp32", device="cpu", threads=0)
        except BackendError as error:
            return [first_line(error)] * len(inputs)
        found: list[Difference | str] = []
        with session:
            for x, ys in zip(inputs, wanted, strict=True):
                worst, share = 0.0, 0.0
                try:
                    # Two images at once and one alone: a baked batch size shows here.
                    for batch in (slice(0, 2), slice(1, 2)):
                        for got, y in zip(session.run([x[batch]]), ys, strict=True):
                            if got.shape != y[batch].shape:
                                raise GraphError(f"output is {got.shape}, torch gives {y[batch].shape}")
                            off = np.abs(got.astype(np.float64) - y[batch])
                            worst = max(worst, float(np.max(off, initial=0.0)))
                            share = max(share, float(np.mean(off > tolerance)))
                    found.append(Difference(worst, share))
                except (BackendError, GraphError, ValueError) as error:
                    found.append(first_line(error))
    return found


def _parameters(model: onnx.ModelProto) -> int:
    import onnx

    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
    return sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type in floating)
