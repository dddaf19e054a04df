"""ONNX Runtime sessions on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BackendError, size_text
from ...graph.passes.qdq import QUANTISED_KEY
from ..session import Array, SessionBase, arrays_for, thread_count
from .library import cpu_provider, errors, import_library, missing, port_of, session_options


def bare(graph: Path, threads: int) -> Callable[[Sequence[Array]], list[Array]]:
    """The library used directly on the CPU, as its documentation shows: what an engine must not be slower than.

    Its defaults, but for the threads. Returns a function of the graph's inputs, in graph order.
    """
    library = import_library()
    options = library.SessionOptions()
    options.intra_op_num_threads = thread_count(threads)
    session = library.InferenceSession(str(graph), options, providers=[cpu_provider()])
    names = [value.name for value in session.get_inputs()]
    return lambda inputs: list(session.run(None, dict(zip(names, inputs, strict=True))))


class OnnxRuntimeSession(SessionBase):
    """A graph in ONNX Runtime on the CPU."""

    title = "ONNX Runtime"

    def __init__(self, graph: Path, precision: str, threads: int) -> None:
        super().__init__(precision, "cpu", threads)
        reason = missing()
        if reason is not None:
            raise BackendError(reason)
        self._library = import_library()
        self._errors = errors(self._library)
        self._output_shapes: dict[tuple[tuple[int, ...], ...], list[tuple[tuple[int, ...], np.dtype[Any]]]] = {}
        self._last: tuple[tuple[int, ...], ...] | None = None
        self._session: Any = None
        try:
            session = self._open(graph)
            self._ports = tuple(port_of(value) for value in session.get_inputs())
        except self._errors as error:
            raise BackendError(f"ONNX Runtime refuses {graph}: {error}") from error
        self._output_names = [value.name for value in session.get_outputs()]
        active, wanted = session.get_providers(), cpu_provider()[0]
        if not active or active[0] != wanted:
            raise BackendError(
                f"{wanted} was asked for {graph.name}, ONNX Runtime took {', '.join(active) or 'nothing'}; "
                "pip install --force-reinstall onnxruntime"
            )
        self._session = session

    def _open(self, graph: Path) -> Any:
        options = session_options(self._library, self.threads)
        if self._precision != "int8":
            return self._library.InferenceSession(str(graph), options, providers=[cpu_provider()])
        with tempfile.TemporaryDirectory(prefix="unet-rt-") as folder:
            options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
            session = self._library.InferenceSession(str(graph), options, providers=[cpu_provider()])
            compiled = Path(options.optimized_model_filepath).read_bytes()
        # Files that other tools have quantised do not say how many layers they are; what they do is their answer.
        asked = int(session.get_modelmeta().custom_metadata_map.get(QUANTISED_KEY, "0"))
        got = _count(compiled, "QLinearConv")
        if got < asked:
            raise BackendError(
                f"int8 was asked, ONNX Runtime runs {got} of {asked} quantised layers of {graph.name} in INT8; "
                "use another --precision, or --backend openvino"
            )
        return session

    @property
    def version(self) -> str:
        return f"onnxruntime {self._library.__version__}"

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        arrays = arrays_for(self._ports, inputs)
        try:
            return self._run_bound(arrays)
        except self._errors as error:
            shapes = ", ".join(size_text(array.shape) for array in arrays)
            raise BackendError(
                f"ONNX Runtime fails on an input of {shapes}: {error}; "
                "if memory is short, use a smaller --tile or --batch"
            ) from error

    def _run_bound(self, arrays: list[Array]) -> list[Array]:
        key = tuple(array.shape for array in arrays)
        known = self._output_shapes.get(key)
        names = [port.name for port in self._ports]
        options = self._run_options(key)
        if known is None:
            outputs: list[Array] = self._session.run(self._output_names, dict(zip(names, arrays, strict=True)), options)
            if len(self._output_shapes) < 64:  # shapes of one use each must not pile up
                self._output_shapes[key] = [(output.shape, output.dtype) for output in outputs]
            return outputs
        # Written by ONNX Runtime straight into the caller's arrays; `run` would hold them in its arena and copy.
        outputs = [np.empty(shape, dtype) for shape, dtype in known]
        binding = self._session.io_binding()
        for name, array in zip(names, arrays, strict=True):
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in zip(self._output_names, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding, options)
        return outputs

    def _run_options(self, key: tuple[tuple[int, ...], ...]) -> Any:
        """Options of a run: where the shapes changed, the arena gives its memory back after it.

        Else the memory of a whole image stays for as long as tiles follow; one run per change pays for new pages.
        """
        changed, self._last = self._last not in (None, key), key
        if not changed:
            return None
        options = self._library.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def _release(self) -> None:
        self._session = None


def _count(model: bytes, operator: str) -> int:
    """Nodes of one operator in a serialised graph (field 4 of a node), read without the onnx package."""
    return model.count(b"\x22" + bytes([len(operator)]) + operator.encode())
