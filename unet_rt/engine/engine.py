"""The engine: a graph built for one backend and precision, with all that tiling, decisions and proof need.

The two lines of data meet here: ``build.py`` writes engine folders, ``predict.py`` runs engines. Reading one needs neither
torch nor onnx.

An engine folder holds ``spec.json`` and files named by content, which ``spec.json`` lists with their SHA-256::

    spec.json              what this module's EngineSpec holds; written last, so that a reader sees a whole engine or none
    model-<hash>.onnx      the FP32 graph as given: baseline of ``verify``, source of every rebuild
    graph-<hash>.onnx      the graph as built
    parity-<hash>.json     what was measured, on what, against what, with which versions
    engine-<hash>.bin      the backend's own plan, where it compiles one ahead of time
    calibration-<hash>.json  activation ranges, where the graph was quantised
    exam-<hash>.npz        a few real tiles and the baseline's outputs (absent with ``--no-exam``)

Beside them, ``row-<graph>-<machine>.json`` is what the exam gave on another machine: written there, no part of the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, size_text
from .folder import EngineFolder
from .spec import EngineSpec

if TYPE_CHECKING:
    from ..backends.session import DeviceSession, Session
    from ..tiling.field import OutputField


log = logging.getLogger("unet_rt")


@dataclass(frozen=True)
class LoadOptions:
    """What :func:`load` was asked for, so that other processes can load the same; ``threads`` are theirs to choose."""

    device: str | None = None
    accept_unverified: bool = False


class Engine:
    """A loaded engine: ``spec``, ``run``, ``close``. Use it in a ``with`` block; one thread runs it at a time."""

    def __init__(
        self,
        spec: EngineSpec,
        session: Session,
        folder: EngineFolder | None = None,
        options: LoadOptions = LoadOptions(),
    ):
        self.spec = spec
        self.folder = folder
        self.options = options
        self._session = session

    @property
    def session_version(self) -> str:
        """Version of the backend's library."""
        return self._session.version

    @property
    def device_session(self) -> DeviceSession | None:
        """The session where it takes arrays on a GPU, else None."""
        return self.gpu_session

    @property
    def gpu_session(self) -> DeviceSession | None:
        """The session where it runs on a GPU, wherever this form of the engine takes its tiles from; else None."""
        from ..backends.session import on_device

        return self._session if on_device(self._session) else None

    def batch_for(self, tiles: int) -> int:
        """The batch size to run ``tiles`` tiles with: theirs, or the smallest that the engine takes and that holds them."""
        sizes = self.spec.batch_sizes
        return next((n for n in sizes if n >= tiles), sizes[-1]) if sizes else tiles

    def fewer(self, batch: int) -> int:
        """The batch size to try next where memory does not hold ``batch`` tiles; ``batch`` itself where none is less."""
        sizes = self.spec.batch_sizes
        return max((n for n in sizes if n < batch), default=batch) if sizes else max(1, batch // 2)

    def run(self, batch: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
        """Runs tiles through the network.

        Args:
            batch: (N, C, *tile), normalised pixels; any N (graphs of a fixed batch are padded and trimmed).

        Returns:
            One float32 array (N, K, *tile_out) per output, whatever axes the graph itself uses.
        """
        n = len(batch)
        if n > 1 and (many := self._run_beside(batch)) is not None:
            return many
        if self.batch_for(n) == n:
            return self._run(batch)
        parts, k = [], 0
        while k < n:
            size = self.batch_for(n - k)
            part = batch[k : k + size]
            short = size - len(part)
            if short:
                part = np.concatenate([part, np.repeat(part[-1:], short, axis=0)])
            parts.append([out[: size - short] for out in self._run(part)])
            k += size
        return [np.concatenate(outs) for outs in zip(*parts, strict=True)]

    def _run_beside(self, batch: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]] | None:
        """Every tile of a batch in a run of its own, several at once; None where the engine does not."""
        from ..backends.session import takes_many

        if not takes_many(self._session):
            return None
        rows = self._session.run_many([self.graph_inputs(batch[k : k + 1]) for k in range(len(batch))])
        one = (1, *batch.shape[1:])
        return [np.concatenate(outputs) for outputs in zip(*(self._outputs_of(row, one) for row in rows), strict=True)]

    def run_graph(self, inputs: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The graph's own outputs for its own inputs, both in its order and axes: for those who tile elsewhere."""
        return self._session.run(inputs)

    def graph_inputs(self, batch: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """(N, C, *tile) as the graph's own inputs: channels dealt out, axes in its order, C-contiguous."""
        inputs, first = [], 0
        for spec in self.spec.inputs:
            x = batch[:, first : first + spec.channels]
            first += spec.channels
            inputs.append(np.ascontiguousarray(_to_axes(x, spec.axes)))
        return inputs

    def _run(self, batch: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
        outputs = self._session.run(self.graph_inputs(batch))  # it casts, and refuses to cut values
        return self._outputs_of(outputs, batch.shape)

    def _outputs_of(self, outputs: list[npt.NDArray[Any]], given: tuple[int, ...]) -> list[npt.NDArray[np.float32]]:
        """What a session returned for tiles of a shape (N, C, *tile) as (N, K, *tile_out), float32."""
        if len(outputs) != len(self.spec.outputs):
            raise BackendError(
                f"the engine returned {len(outputs)} outputs, and its spec names {len(self.spec.outputs)}; build it again"
            )
        for y, output in zip(outputs, self.spec.outputs, strict=True):
            self._check_shape(y, output, given)
        return [_from_axes(y, o.axes) for y, o in zip(outputs, self.spec.outputs, strict=True)]

    def _check_shape(self, y: npt.NDArray[Any], output: OutputField, given: tuple[int, ...]) -> None:
        """BackendError where a library returned an output of another shape than the graph's; sizes that it accepts only."""
        if not all(sizes.accepts(n) for sizes, n in zip(self.spec.sizes, given[2:], strict=True)):
            return
        spatial = iter([field.out_size(n) for field, n in zip(output.field, given[2:], strict=True)])
        wanted = tuple({"N": given[0], "C": output.channels}.get(axis) or next(spatial) for axis in output.axes)
        if y.shape != wanted:
            raise BackendError(
                f"{self.spec.backend} returned {output.name} as {size_text(y.shape)} for tiles of {size_text(given)}, "
                f"the graph has {size_text(wanted)}; use another --backend"
            )

    def close(self) -> None:
        self._session.close()

    def under(self, spec: EngineSpec) -> Engine:
        """The same session under another spec; who opened this engine closes it."""
        return Engine(spec, self._session, self.folder, self.options)

    def __reduce__(self) -> NoReturn:
        """Engines stay in their process."""
        where = "its folder" if self.folder is None else str(self.folder.path)
        raise TypeError(
            f"an engine holds a running library and is not pickled; send {where}, and load it in each process"
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EngineView(Engine):
    """An engine in another form, over the session of ``engine``, which stays as it is: who opened that one closes it.

    Subclasses say in :meth:`run` what they make of its results. Engines on a GPU take tiles from the host here.
    """

    def __init__(self, engine: Engine, spec: EngineSpec):
        super().__init__(spec, engine._session, engine.folder, engine.options)
        self._engine = engine

    @property
    def device_session(self) -> None:
        return None

    def close(self) -> None:
        """Leaves the engine as it is: who opened it closes it."""


def _to_axes(x: npt.NDArray[Any], axes: str) -> npt.NDArray[Any]:
    """(N, C, *spatial) to the order of ``axes``; a graph without N or C gets its single sample or channel."""
    spatial = [a for a in axes if a not in "NC"]
    order = ["N", "C", *spatial]
    for axis in "CN":
        if axis not in axes:
            x = x.take(0, axis=order.index(axis))
            order.remove(axis)
    return x.transpose([order.index(a) for a in axes])


def _from_axes(y: npt.NDArray[Any], axes: str) -> npt.NDArray[np.float32]:
    spatial = [a for a in axes if a not in "NC"]
    order = [a for a in ("N", "C", *spatial) if a in axes]
    y = y.transpose([axes.index(a) for a in order])
    for position, axis in enumerate("NC"):
        if axis not in axes:
            y = np.expand_dims(y, position)
    return y.astype(np.float32, copy=False)
