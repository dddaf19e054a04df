"""Measuring: interleaved runs, warm-up, medians with spread, ratios with intervals, memory. Returns numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import BackendError
from .system import facts

if TYPE_CHECKING:
    from .engine.engine import Engine


class DeviceRun:
    """One batch on a GPU, ready to be timed: arrays stay on the device, and a call returns when the run has ended.

    Attributes:
        grown: Device memory that the arrays and the first runs took, in bytes.
    """

    def __init__(self, engine: Engine, batch: npt.NDArray[Any]):
        """``batch`` (N, C, *tile), normalised pixels; runs it twice. One that the engine does not take is padded."""
        from .kernels.device import Device

        session = engine.device_session
        if session is None:
            raise BackendError(f"{engine.spec.backend} runs on {engine.spec.device}, not on a GPU")
        device = Device.open(facts.cuda_index(engine.spec.device))
        free = device.memory()[0]
        short = engine.batch_for(len(batch)) - len(batch)
        arrays = engine.graph_inputs(np.concatenate([batch, np.repeat(batch[-1:], max(0, short), axis=0)]))
        self._session, self._inputs, self._outputs = session, list[Any](), list[Any]()
        try:
            for array, dtype in zip(arrays, session.input_dtypes, strict=True):
                pinned = device.pinned(array.shape, dtype)
                np.copyto(pinned, array, casting="unsafe")
                self._inputs.append(device.empty(array.shape, dtype))
                device.copy_in(self._inputs[-1], pinned, session.stream)
                session.stream.synchronize()
            shapes = session.output_shapes([array.shape for array in arrays])
            for shape, dtype in zip(shapes, session.output_dtypes, strict=True):
                self._outputs.append(device.empty(shape, dtype))
            for _ in range(2):
                self()
        except BaseException:
            self.close()
            raise
        self.grown = max(0, free - device.memory()[0])

    def __call__(self) -> None:
        self._session.run_device(self._inputs, self._outputs)
        self._session.stream.synchronize()

    def close(self) -> None:
        """Gives the arrays back."""
        for array in (*self._inputs, *self._outputs):
            array.free()
