"""A serialised plan given to the library: what it makes of it, and why it refuses."""

from __future__ import annotations

import logging
from typing import Any

from ...errors import DeviceMemoryError, EngineError
from .build import failure, logger, remedy, title

log = logging.getLogger("unet_rt")


def deserialize(trt: Any, plan: bytes) -> tuple[Any, Any]:
    """(engine, runtime) of a serialised plan. Only where the driver has confirmed a device: some versions crash else.

    Raises:
        EngineError: The library refuses the plan on this machine.
        DeviceMemoryError: The GPU has no room for its weights.
    """
    sink, messages = logger(trt)
    messages.take()
    runtime = trt.Runtime(sink)
    if hasattr(runtime, "get_engine_validity"):
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.INVALID:
            reasons = invalidity(trt, int(diagnostics)) or messages.take() or "it gives no reason"
            if int(diagnostics) & int(trt.EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY):
                raise DeviceMemoryError(
                    f"{title(trt)} {trt.__version__} does not run this plan here: {reasons}; free what others hold, or "
                    "use another GPU"
                )
            raise EngineError(
                f"{title(trt)} {trt.__version__} does not run this plan here: {reasons}; "
                "use --backend onnxruntime, or build the engine again"
            )
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        text = messages.take()
        found = failure(f"{title(trt)} cannot load the plan: {text}; {remedy(text)}", text)
        if isinstance(found, DeviceMemoryError):
            raise found
        raise EngineError(
            f"{title(trt)} {trt.__version__} refuses the plan: {text or 'it gives no reason'}; build the engine again"
        )
    return engine, runtime


def invalidity(trt: Any, diagnostics: int) -> str:
    """The bits of TensorRT-RTX's diagnostics in words; ``""`` for none."""
    words = {
        "VERSION_MISMATCH": "it was built by another version",
        "UNSUPPORTED_CC": "it does not support this GPU's compute capability",
        "OLD_CUDA_DRIVER": "the driver is too old",
        "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
        "INSUFFICIENT_GPU_MEMORY": "the GPU's memory is too small",
        "MALFORMED_ENGINE": "the plan is damaged",
        "CUDA_ERROR": "the driver or the CUDA runtime is not installed correctly",
    }
    members = trt.EngineInvalidityDiagnostics.__members__
    return ", ".join(words.get(name, name) for name, value in members.items() if diagnostics & int(value))


def runtime_config(trt: Any, engine: Any, kernels: bytes) -> tuple[Any, Any]:
    """TensorRT-RTX's settings, and its cache of compiled kernels; None for TensorRT."""
    if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        return None, None
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    # A kernel that is exchanged for a better one some runs later would change a tile's bits in the middle of an image.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # recorded here, by the addresses in use
    cache = config.create_runtime_cache()
    if kernels and not cache.deserialize(kernels):
        log.info("the kernels stored with the plan do not fit this machine; they are compiled again")
    config.set_runtime_cache(cache)
    return config, cache
