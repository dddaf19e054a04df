"""ncnn sessions: FP32 on processors, FP32 or FP16 on Vulkan devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BackendError, size_text
from ...system.json import Record, from_json
from ..session import Array, Port, SessionBase, arrays_for
from .library import captured_stderr, import_library, vulkan_index

# Storage and arithmetic below FP32, each of which ncnn chooses by itself where the device has it.
_LOWER = (
    "use_fp16_packed",
    "use_fp16_storage",
    "use_fp16_arithmetic",
    "use_bf16_packed",
    "use_bf16_storage",
    "use_int8_inference",
    "use_int8_packed",
    "use_int8_storage",
    "use_int8_arithmetic",
)
_HALF = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic")


@dataclass(frozen=True)
class NcnnPort(Record):
    """An input or output of the graph that was converted: shape with None for free sizes, dtype as NumPy names it."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def port(self) -> Port:
        return Port(self.name, self.shape, np.dtype(self.dtype))


@dataclass(frozen=True)
class Network(Record):
    """A converted network but for its weights: the lines of ncnn's .param file, and the graph's inputs and outputs."""

    inputs: tuple[NcnnPort, ...]
    outputs: tuple[NcnnPort, ...]
    param: tuple[str, ...]


def read_network(data: Mapping[str, Any] | None, weights: Path) -> Network:
    """Inverse of ``Network.to_json``; ``weights`` is what errors name.

    Raises:
        BackendError: It is damaged, or of another version.
    """
    return from_json(
        Network,
        data or {},
        where=f"{weights}: the network that belongs to it is damaged, or that of another version of unet-rt",
        error=BackendError,
        way_out="build it again: unet-rt build model.onnx --overwrite",
    )


class NcnnSession(SessionBase):
    """A network in ncnn. Tiles of a batch run one after another: its arrays have no batch axis."""

    title = "ncnn"

    def __init__(self, network: Network, weights: Path, precision: str, device: str, threads: int) -> None:
        super().__init__(precision, device, threads)
        self._library = import_library()
        self._ports = tuple(one.port for one in network.inputs)
        self._outputs = tuple(one.port for one in network.outputs)
        self._net: Any = self._library.Net()
        self._set_options(self._net.opt)
        if device != "cpu":
            self._net.set_vulkan_device(vulkan_index(device))
        with captured_stderr() as said:
            failed = self._net.load_param_mem("\n".join(network.param) + "\n") != 0
            failed = failed or self._net.load_model(str(weights)) != 0
        if failed:
            raise BackendError(
                f"ncnn cannot load {weights.name}: {said[-1] if said else 'no reason is given'}; build the engine with "
                "another --backend"
            )

    def _set_options(self, options: Any) -> None:
        options.num_threads = self.threads
        options.use_vulkan_compute = self.device != "cpu"
        for name in _LOWER:
            setattr(options, name, self._precision == "fp16" and name in _HALF)

    @property
    def version(self) -> str:
        return f"ncnn {self._library.__version__}"

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        arrays = arrays_for(self._ports, inputs)
        rows = [self._run_one([array[k] for array in arrays]) for k in range(len(arrays[0]))]
        return [np.stack(outputs) for outputs in zip(*rows, strict=True)]

    def _run_one(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs of one sample, without the batch axis; memory of activations is given back after it."""
        extractor = self._net.create_extractor()
        for k, array in enumerate(arrays):
            extractor.input(f"in{k}", self._library.Mat(array))
        outputs = list[Array]()
        for k, port in enumerate(self._outputs):
            code, found = extractor.extract(f"out{k}")
            if code != 0 or found.dims != len(port.shape) - 1:
                shapes = ", ".join(size_text(a.shape) for a in arrays)
                raise BackendError(
                    f"ncnn fails on an input of {shapes} (code {code}); if memory is short, use a smaller --tile"
                )
            outputs.append(np.array(found))
        return outputs

    def _release(self) -> None:
        self._net.clear()
        self._net = None
