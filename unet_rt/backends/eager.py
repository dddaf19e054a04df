"""Eager PyTorch: the baseline where the module itself is at hand. It runs modules, not graphs, so no engine uses it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BackendError, size_text
from ..system import facts
from .session import Array, BackendSettings, SessionBase, thread_count

if TYPE_CHECKING:
    from torch import nn

any_tile = True
variant = ""


def missing(device: str = "cpu") -> str | None:
    """None if usable on ``device``; else what is missing and how to get it."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed; pip install torch"
    if device != "cpu":
        reason = facts.cuda().missing
        if reason is not None:
            return f"PyTorch cannot use {device}: {reason}; use --device cpu"
        if not _import().cuda.is_available():
            return f"PyTorch cannot use {device}: this is a build without CUDA; install torch with CUDA"
    return None


def precisions(device: str = "cpu") -> tuple[str, ...]:
    """Precisions this backend computes in on ``device``."""
    return ("fp32",)


def _import() -> Any:
    try:
        import torch
    except (ImportError, OSError, AttributeError) as error:
        raise BackendError(
            f"PyTorch is installed but cannot be imported ({error}); pip install --force-reinstall torch"
        ) from error
    return torch


def build(
    model: Path,
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    blob: Path | None = None,
    tiles: Sequence[Sequence[int]] = (),
    batches: Sequence[int] = (),
) -> None:
    """Nothing can be built: a graph has no module.

    Raises:
        BackendError: Always.
    """
    raise BackendError(
        f"eager PyTorch runs modules, not graphs such as {model.name}; use --backend onnxruntime or openvino, "
        "or pass the module where a baseline is asked for"
    )


def load(
    graph: Path | nn.Module,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    threads: int = 0,
    blob: Path | None = None,
    settings: BackendSettings | None = None,
) -> EagerSession:
    """Session of a module in evaluation mode.

    Args:
        graph: The module. Paths are refused: what they hold cannot be run without the module's code.
        precision: ``"fp32"``.
        device: ``"cpu"`` or ``"cuda:N"``; the module is used where it is, and must be there.
        threads: Threads to compute with; 0: as many as affinity and quota allow.
        blob: None: nothing is compiled.
    """
    reason = missing(device)
    if reason is not None:
        raise BackendError(reason)
    if isinstance(graph, str | Path):
        raise BackendError(f"eager PyTorch cannot run {graph}: pass the module itself, with its weights loaded")
    if precision != "fp32":
        raise BackendError(f"eager PyTorch is the FP32 baseline, {precision} was asked; use --precision fp32")
    return EagerSession(graph, device, threads)


class EagerSession(SessionBase):
    """A module as a session."""

    title = "PyTorch"

    def __init__(self, module: nn.Module, device: str, threads: int) -> None:
        super().__init__("fp32", device, threads)
        torch = self._torch = _import()
        if any(part.training for part in module.modules()):
            raise BackendError(f"{type(module).__name__} is in training mode; call its eval() before it is a baseline")
        tensors = [*module.parameters(), *module.buffers()]
        places = {str(tensor.device) for tensor in tensors}
        if places and places != {device}:
            raise BackendError(
                f"{type(module).__name__} is on {', '.join(sorted(places))}, {device} was asked; use its to({device!r})"
            )
        kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        if kinds - {torch.float32}:
            found = ", ".join(sorted(str(kind) for kind in kinds))
            raise BackendError(f"{type(module).__name__} has {found} weights, fp32 was asked; use its float()")
        self._module: Any = module

    @property
    def version(self) -> str:
        return f"torch {self._torch.__version__}"

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        """Outputs of the module in the order it returns them; the caller owns them."""
        torch, module = self._torch, self._module
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)  # a setting of the whole process
        try:
            # TF32 is not FP32: ten bits of mantissa (CUDA only; nothing changes on a CPU).
            with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
                tensors = [torch.from_numpy(np.array(array, order="C")).to(self.device) for array in inputs]
                tensors = [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]
                found = module(*tensors)
                return [np.array(tensor.cpu().numpy()) for tensor in _tensors(found)]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shapes = ", ".join(size_text(array.shape) for array in inputs)
            raise BackendError(
                f"{type(module).__name__} fails on an input of {shapes}: {error}; pass what the module takes"
            ) from error
        finally:
            torch.set_num_threads(before)

    def _release(self) -> None:
        self._module = None


def monai_missing() -> str | None:
    """None if MONAI's sliding window can be used here; else what is missing and how to get it."""
    if importlib.util.find_spec("monai") is None:
        return "MONAI is not installed; pip install monai"
    return missing()


def sliding_window(
    module: nn.Module | Callable[[Array], Array], x: Array, window: Sequence[int], *, overlap: float, mode: str
) -> Array:
    """MONAI's ``sliding_window_inference``: what most people predict large images with.

    Args:
        module: The network; a module, or any function of a batch of windows.
        x: (N, C, *spatial), float32, normalised.
        window: Size of the windows.
        overlap: Share of a window that neighbours have in common; MONAI's default is 0.25.
        mode: ``"constant"``, MONAI's default, or ``"gaussian"``.

    Returns:
        (N, K, *spatial), float32.
    """
    from monai.inferers.utils import sliding_window_inference

    torch = _import()

    def predictor(batch: Any) -> Any:
        if isinstance(module, torch.nn.Module):
            return module(batch)
        return torch.from_numpy(module(batch.numpy()))

    with torch.inference_mode():
        found: Any = sliding_window_inference(
            torch.from_numpy(x), tuple(window), 1, predictor, overlap=overlap, mode=mode
        )
    result: Array = found.numpy()
    return result


def _tensors(found: Any) -> list[Any]:
    """Tensors that a module returned: one, a sequence, or a mapping (in its order)."""
    if isinstance(found, Mapping):
        found = list(found.values())
    if not isinstance(found, Sequence):
        return [found]
    return [tensor for part in found for tensor in _tensors(part)]


def variants(module: nn.Module, x: Array, device: str, threads: int = 0) -> dict[str, Callable[[], Any]]:
    """Ways to run a module in PyTorch that people compare with, as functions that return when the run has ended.

    Args:
        module: In evaluation mode, FP32, on the CPU; copies of it run.
        x: (N, C, *tile) float32.
        device: ``"cpu"`` or ``"cuda:N"``.
        threads: Of PyTorch on the CPU; 0: by affinity and quota.
    """
    import copy

    torch = _import()
    torch.set_num_threads(thread_count(threads))
    gpu = device != "cpu"
    half = torch.float16 if gpu else torch.bfloat16
    there = torch.from_numpy(x).to(device)
    plain = copy.deepcopy(module).to(device)
    last: Any = copy.deepcopy(module)
    last = last.to(device, memory_format=torch.channels_last)
    there_last = there.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else there
    compiled = torch.compile(copy.deepcopy(module).to(device))

    def run(network: Any, tile: Any, cast: bool = False) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode(), torch.autocast("cuda" if gpu else "cpu", dtype=half, enabled=cast):
                y = network(tile)
                if gpu:
                    torch.cuda.synchronize()
                return y

        return call

    name = "FP16" if gpu else "BF16"
    return {
        "eager FP32": run(plain, there),
        "eager FP32, channels_last": run(last, there_last),
        f"eager, channels_last, autocast {name}": run(last, there_last, cast=True),
        "torch.compile FP32": run(compiled, there),
    }
