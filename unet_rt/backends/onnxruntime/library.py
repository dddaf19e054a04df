"""The ONNX Runtime that is installed, its errors and session options."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np

from ...errors import BackendError
from ...system import facts
from ..session import Port

# ONNX Runtime names element types in its own way.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(uint16)": "uint16",
    "tensor(int16)": "int16",
    "tensor(uint32)": "uint32",
    "tensor(int32)": "int32",
    "tensor(uint64)": "uint64",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


def conflict() -> str | None:
    """Two ONNX Runtime wheels in one folder, None if there is at most one in each.

    Folders of their own, one before the other on the path, do no harm: the first is what is imported.
    """
    folders = {
        name: folder
        for name in facts.DISTRIBUTIONS["onnxruntime"]
        if (folder := facts.package_folder(name)) is not None
    }
    found = [name for name, folder in folders.items() if list(folders.values()).count(folder) > 1]
    if not found:
        return None
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found and facts.cuda().devices else "onnxruntime"
    return (
        f"{' and '.join(found)} are both installed and overwrite each other's files; "
        f"pip uninstall -y {' '.join(found)}, then pip install {keep}"
    )


def missing(device: str = "cpu") -> str | None:
    """None if usable on ``device``; else what is missing and how to get it."""
    clash = conflict()
    if clash is not None:
        return clash
    wheel = "onnxruntime" if device == "cpu" else "onnxruntime-gpu"
    if importlib.util.find_spec("onnxruntime") is None:
        return f"ONNX Runtime is not installed; pip install {wheel}"
    if device == "cpu":
        import_library()
        return None
    reason = facts.cuda().missing
    if reason is not None:
        return f"ONNX Runtime cannot use {device}: {reason}; use --device cpu"
    if "CUDAExecutionProvider" not in import_library().get_available_providers():
        return (
            f"ONNX Runtime cannot use {device}: this is the CPU wheel; "
            "pip uninstall -y onnxruntime, then pip install onnxruntime-gpu"
        )
    from ...kernels import device as gpu

    reason = gpu.missing_reason(facts.cuda_index(device))
    return None if reason is None else f"ONNX Runtime cannot use {device}: {reason}"


# Since 1.30 or so, merely importing the official wheels creates an identifier and a database in the user's cache
# folder and sends events to Microsoft. Images and networks here may be confidential, and nothing may be written that
# nobody asked for. The library reads the variables when it is imported (the second is their name in older releases);
# whoever sets them to something else has decided otherwise.
_NO_TELEMETRY = ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED")


def import_library() -> Any:
    for variable in _NO_TELEMETRY:
        os.environ.setdefault(variable, "1")
    try:
        import onnxruntime
    except (ImportError, OSError, AttributeError) as error:
        raise BackendError(
            f"ONNX Runtime is installed but cannot be imported ({error}); pip install --force-reinstall onnxruntime"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        # What is left of the folder after one of two wheels was uninstalled.
        raise BackendError(
            "ONNX Runtime is installed incompletely (it has no InferenceSession); "
            "pip install --force-reinstall onnxruntime"
        )
    return onnxruntime


def errors(onnxruntime: Any) -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime; they have no base of their own."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    found = (getattr(state, name) for name in dir(state))
    return (
        *(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception)),
        RuntimeError,
        ValueError,
        MemoryError,
    )


def cpu_provider() -> tuple[str, dict[str, str]]:
    return "CPUExecutionProvider", {}


def session_options(library: Any, threads: int) -> Any:
    """Options that sessions have on all devices."""
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = library.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors; its warnings are about the exporter's graph, not the user's doing
    # The pattern is one block per input shape, traced in the first run beside the chunks that this run needed:
    # peak memory 626 MB instead of 290 MB for a 1024-px tile of a 0.45 M parameter U-Net, at the same speed.
    options.enable_mem_pattern = False
    # The arena stays: fresh pages for every tensor cost 1.35 s instead of 0.8 s in the same run.
    options.enable_cpu_mem_arena = True
    # Waiting threads sleep. Spinning saves tens of microseconds per operator, where operators take milliseconds,
    # and takes the cores from those who read, gather and stitch at the same time (and from a container's quota).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def strays(session: Any, provider: str, allowed: frozenset[str] = frozenset()) -> list[str]:
    """Nodes of a session that another provider than ``provider`` runs, operators in ``allowed`` aside.

    The session was made with ``session.record_ep_graph_assignment_info``.
    """
    return [
        node.name or node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type not in allowed
    ]


def port_of(value: Any) -> Port:
    dtype = _DTYPES.get(value.type)
    if dtype is None:
        raise ValueError(f"input {value.name} is {value.type}, which NumPy cannot hold")
    return Port(value.name, tuple(n if isinstance(n, int) else None for n in value.shape), np.dtype(dtype))
