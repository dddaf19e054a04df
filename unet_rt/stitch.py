"""From tile outputs to finished bands of the result: place or blend, then decide (softmax, argmax, threshold).

Bands are handed on in order along the first spatial axis; nothing of an earlier band is kept, so memory does not grow
with the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, prod
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .contract.contract import Contract
from .errors import ContractError, TileError
from .kernels import calls
from .tiles import Ints, TileGrid

OutputKind = Literal["mask", "probability", "raw"]
Blend = Literal["gaussian", "constant"]
Op = Literal["copy", "softmax", "sigmoid", "argmax", "threshold"]


@dataclass(frozen=True)
class Decision:
    """What becomes of the network's numbers.

    Attributes:
        op: The kernel's operation.
        channels: Channels of the result; 0 where it has no channel axis.
        dtype: Of the result.
        threshold: Per channel, on the network's own values (a probability of 0.5 is the logit 0).
        values: uint8 value of every class in a mask.
    """

    op: Op
    channels: int
    dtype: np.dtype[Any]
    threshold: tuple[float, ...] = ()
    values: tuple[int, ...] = ()


def default_output(contract: Contract) -> OutputKind:
    """Masks for classes, the values themselves for regression."""
    return "raw" if contract.task == "regression" else "mask"


def decide(
    contract: Contract, channels: int, output: OutputKind | None = None, mask_values: tuple[int, ...] = ()
) -> Decision:
    """The decision for an output of ``channels`` channels.

    Args:
        contract: Its task, output_is and threshold must be declared, but for ``raw``.
        channels: Channels of the network's output.
        output: ``mask`` (uint8), ``probability`` (float32) or ``raw`` (float32). None: by the task.
        mask_values: Value per class (multiclass), or (off, on); empty: 0, 1, 2, ...

    Raises:
        ContractError: A mask or probability of a regression, a mask of more than 256 classes, or the wrong number of
            mask values or thresholds.
    """
    task, kind = contract.task, output or default_output(contract)
    if kind == "raw":
        return Decision("copy", channels, np.dtype(np.float32))
    if task is None:
        raise ContractError(
            f"what the network's values mean was left open, so that they make no {kind}; use --output raw, or build again "
            "with --task binary, multiclass, multilabel or regression (for a further output: heads of the contract)"
        )
    if contract.output_is is None and task != "regression":
        raise ContractError(f"nothing says whether the {task} output is logits or probabilities; pass --output-is")
    if task == "regression":
        raise ContractError(f"a regression has no {kind}; use --output raw")
    logits = contract.output_is == "logits"
    if kind == "probability":
        op: Op = "copy" if not logits else "softmax" if task == "multiclass" else "sigmoid"
        return Decision(op, channels, np.dtype(np.float32))
    labels = channels if task == "multiclass" else 2
    if labels > 256:
        raise ContractError(f"{labels} classes do not fit a uint8 mask; use --output raw and take the argmax yourself")
    values = mask_values or tuple(range(labels))
    if len(values) != labels or not all(0 <= v <= 255 and v == int(v) for v in values):
        raise ContractError(
            f"--mask-values {','.join(map(str, values))} must be {labels} numbers of 0 to 255, one per label"
        )
    if labels > 1 and len(set(values)) == 1:
        raise ContractError(
            f"--mask-values {','.join(map(str, values))} gives every label the same value; use e.g. 0,255"
        )
    values = tuple(int(v) for v in values)
    if task == "multiclass":
        return Decision("argmax", 0, np.dtype(np.uint8), values=values)
    threshold = contract.threshold or (0.5,)
    threshold = threshold * channels if len(threshold) == 1 else threshold
    if len(threshold) != channels:
        raise ContractError(f"{len(threshold)} thresholds for {channels} channels; pass one, or one per channel")
    raw = tuple(_logit(t) if logits else float(t) for t in threshold)
    return Decision("threshold", channels if task == "multilabel" else 0, np.dtype(np.uint8), raw, values)


def _logit(p: float) -> float:
    if not 0 < p < 1:
        raise ContractError(f"threshold {p} is not between 0 and 1 (exclusive), as probabilities are")
    return log(p / (1 - p))


def blend_weight(shape: tuple[int, ...], blend: Blend) -> npt.NDArray[np.float32]:
    """Weight of every sample of a tile's output, float32, never zero.

    ``gaussian``: sigma = an eighth of the tile per axis, as nnU-Net and MONAI weigh tiles; smallest weights are raised to
    1e-3 of the largest, so that a corner that one tile alone covers is divided by a sound number.

    Raises:
        TileError: An unknown ``blend``.
    """
    if blend not in get_args(Blend):
        raise TileError(f"blend {blend!r} is unknown; use {' or '.join(get_args(Blend))}")
    weight = np.ones(shape, dtype=np.float64)
    if blend == "gaussian":
        for k, n in enumerate(shape):
            profile = np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2)
            weight *= profile.reshape([-1 if j == k else 1 for j in range(len(shape))])
        weight = np.maximum(weight, 1e-3 * weight.max())
    return weight.astype(np.float32)


def decision_arguments(decision: Decision) -> dict[str, Any]:
    """A decision in the words of the kernels."""
    return {
        "op": decision.op,
        "threshold": np.array(decision.threshold, dtype=np.float32) if decision.threshold else None,
        "values": np.array(decision.values, dtype=np.uint8) if decision.values else None,
    }


def uncovered_error(samples: int, start: int, stop: int) -> TileError:
    """What is raised for rows [start, stop) of a blended result with samples that no tile holds."""
    return TileError(f"{samples} samples of rows {start} to {stop} lie in no tile; use a larger overlap between tiles")


class BandStitcher:
    """Collects the tiles of one tile row after another and returns the finished band of each.

    Use per plane and output: for every row, ``begin(k)``, ``add(tiles, index)`` any number of times, ``finish()``.
    """

    def __init__(self, grid: TileGrid, output: int, decision: Decision, blend: Blend = "gaussian", threads: int = 0):
        self._grid, self._output, self._decision, self._threads = grid, output, decision, threads
        self._width = grid.out_shape(output)[1:]
        self._row = 0
        self._missing = 0  # tiles of this row that were not added yet
        self._band: npt.NDArray[Any] | None = None
        if grid.blended:
            tile = grid.tile_out_shape(output)
            self._weight = blend_weight(tile, blend)
            rows = min(tile[0], grid.out_shape(output)[0])
            channels = grid.outputs[output].channels
            self._total = np.zeros((channels, rows, *self._width), dtype=np.float32)
            self._weights = np.zeros((rows, *self._width), dtype=np.float32)
            self._top = 0  # row of the result that the accumulators' first row stands for

    def begin(self, row: int) -> None:
        self._row = row
        self._missing = prod(self._grid.shape[1:])
        start, stop = self._grid.band(row, self._output)
        if not self._grid.blended:
            self._band = self._new_band(stop - start)

    def add(self, tiles: npt.NDArray[Any], index: Ints) -> None:
        """``tiles`` (N, K, *tile_out) are the outputs of the tiles at grid indices ``index`` (N, axes) of this row.

        Raises:
            TileError: More tiles than the row lacks, or not as many as indices.
        """
        if len(index) > self._missing:
            raise TileError(f"{len(index)} tiles for row {self._row}, which lacks {self._missing}; begin the next row")
        self._missing -= len(index)
        place = self._grid.placement(index, self._output)
        target = place.target.copy()
        if self._grid.blended:
            target[:, 0] -= self._top
            calls.tile_blend(
                tiles, place.source, target, place.size, self._weight, self._total, self._weights, threads=self._threads
            )
        else:
            target[:, 0] -= self._grid.band(self._row, self._output)[0]
            calls.tile_stitch(
                tiles,
                place.source,
                target,
                place.size,
                self._band,
                threads=self._threads,
                **decision_arguments(self._decision),
            )

    def finish(self) -> tuple[int, npt.NDArray[Any]]:
        """(first row of the band in the result, band). Shape ([channels,] rows, ...); an empty band has 0 rows.

        Raises:
            TileError: Tiles of the row are missing, or leave gaps: nothing is made up in their place.
        """
        if self._missing:
            tiles = prod(self._grid.shape[1:])
            raise TileError(
                f"only {tiles - self._missing} of {tiles} tiles of row {self._row} were added; add them all"
            )
        start, stop = self._grid.band(self._row, self._output)
        if not self._grid.blended:
            band, self._band = self._band, None
            if band is None:
                raise TileError("finish() without begin()")
        else:
            rows = stop - start
            band = self._new_band(rows)
            if rows:
                total = np.ascontiguousarray(self._total[:, :rows])
                weights = self._weights[:rows]
                bare = calls.blend_finish(
                    total, weights, band, threads=self._threads, **decision_arguments(self._decision)
                )
                if bare:
                    raise uncovered_error(bare, start, stop)
                self._shift(rows)
            self._top = stop
        return start, band[0] if self._decision.channels == 0 and band.ndim > 1 + len(self._width) else band

    def _new_band(self, rows: int) -> npt.NDArray[Any]:
        # argmax has no channel axis; a binary threshold has one of length 1 until finish() takes it away
        lead = () if self._decision.op == "argmax" else (max(self._decision.channels, 1),)
        return np.empty((*lead, rows, *self._width), dtype=self._decision.dtype)

    def _shift(self, rows: int) -> None:
        """Moves the unfinished rows of the accumulators to the front."""
        for rows_first in (np.moveaxis(self._total, 1, 0), self._weights):
            left = len(rows_first) - rows
            rows_first[:left] = rows_first[rows:].copy()
            rows_first[left:] = 0
