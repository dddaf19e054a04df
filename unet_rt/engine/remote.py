"""Tiling here, the network elsewhere: an engine whose graph runs behind a function of the user's.

``graph-*.onnx`` of a CPU engine runs in anything that serves ONNX files (Triton, KServe, another process). Windows are
read, gathered and stitched on the client; what the server sees is one batch of tiles after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends.session import Port, SessionBase, arrays_for
from ..errors import BackendError, EngineError, ParityError
from . import exam
from .engine import Engine
from .folder import read_folder
from .spec import EngineSpec

Array = npt.NDArray[Any]
Run = Callable[[list[Array]], Sequence[Array]]


class RemoteSession(SessionBase):
    """A session that hands its inputs to a function."""

    title = "remote"

    def __init__(self, run: Run, spec: EngineSpec, version: str) -> None:
        super().__init__(spec.precision, "cpu", 1)
        self._function, self._spec, self._version = run, spec, version
        self._ports = [Port(i.name, (None,) * len(i.axes), np.dtype(i.dtype)) for i in spec.inputs]

    @property
    def version(self) -> str:
        return self._version

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        inputs, outputs = arrays_for(self._ports, inputs), self._spec.outputs
        found = [np.asarray(y) for y in self._function(inputs)]
        if len(found) != len(outputs):
            raise BackendError(f"the remote run returned {len(found)} outputs, the graph has {len(outputs)}")
        for y, output in zip(found, outputs, strict=True):
            if y.ndim != len(output.axes):
                raise BackendError(
                    f"the remote run returned output {output.name} of shape {y.shape}, the graph's axes are "
                    f"{output.axes}; return it as the graph does"
                )
        given = _batches([i.axes for i in self._spec.inputs], inputs)
        batch = _batches([o.axes for o in outputs], found)
        if not batch <= (given or {1}):  # a graph without a batch axis takes one tile
            raise BackendError(
                f"the remote run returned batches of {', '.join(map(str, sorted(batch)))} for one of "
                f"{', '.join(map(str, given)) or 1}; return one result per tile, in order"
            )
        return found

    def _release(self) -> None:
        pass


def _batches(axes: Sequence[str], arrays: Sequence[Array]) -> set[int]:
    """Sizes of the batch axes, of the arrays that have one."""
    return {array.shape[a.index("N")] for a, array in zip(axes, arrays, strict=True) if "N" in a}


def connect(folder: str | Path, run: Run, *, version: str = "remote", accept_unverified: bool = False) -> Engine:
    """An engine whose graph ``run`` computes: for ``unet_rt.predict`` and everything else that takes an engine.

    The record of parity says nothing of a server, so the engine sits its exam through ``run`` first.

    Args:
        folder: The engine folder; the server runs its ``graph-*.onnx``.
        run: From the graph's inputs (a batch of tiles; axes, order and dtypes as in ``spec.inputs``) to its outputs, in
            graph order. Called by one thread at a time. What it raises ends the prediction, and no output is left.
        version: What reports call the server.
        accept_unverified: Do not sit the exam.

    Raises:
        EngineError: Damaged, unproven, or without an exam.
        ParityError: What the server computes is not what the engine's FP32 graph does, within the recorded budget.
    """
    opened = read_folder(folder)
    spec = opened.spec
    if not accept_unverified:
        exam.check_record(opened)
    engine = Engine(spec, RemoteSession(run, spec, version), opened)
    if accept_unverified:
        return engine
    tiles = opened.exam()
    if tiles is None:
        raise EngineError(
            f"{folder} carries no exam to prove the server by; build it without --no-exam, or connect with "
            "accept_unverified=True"
        )
    verdict = exam.sit(engine, tiles)
    if not verdict.accepted:
        raise ParityError(
            f"{folder}: fails its exam at the server: {'; '.join(verdict.reasons)}; serve the engine's own graph file"
        )
    return engine
