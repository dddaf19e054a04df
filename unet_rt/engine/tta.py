"""Test-time augmentation: the mean of a network's probabilities over flips and quarter turns of the image.

It is done tile by tile and means the canvas all the same: tile origins are multiples of the stride and the tile is congruent
to the canvas, so the tile of a flipped canvas is the flipped tile. Only the halo has to serve both directions.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ..errors import ContractError
from ..tiling.field import AxisField, OutputField
from .engine import Engine, EngineView

Array = npt.NDArray[Any]
Tta = Literal["none", "flip", "d4"]


class Augmented(EngineView):
    """An engine that runs every tile in several positions; its outputs are mean probabilities (values of a regression).

    ``spec`` says that outputs are probabilities, and has halos that serve every position.
    """

    def __init__(self, engine: Engine, how: Tta, *, raw: bool = False, output: int = 0) -> None:
        """
        Args:
            engine: The engine.
            raw: Average the network's own values instead. So it is where tiles are placed as nnU-Net does.
            output: The one that is predicted: its contract says what values mean.
            how: ``flip`` (2 positions per axis: 4 in 2-D, 8 in 3-D) or ``d4`` (2-D: flips and quarter turns, 8).

        Raises:
            ContractError: Unknown; quarter turns of a network that does not treat both axes alike.
        """
        if how not in get_args(Tta) or how == "none":
            raise ContractError(f"--tta {how} is unknown; use {', '.join(get_args(Tta))}")
        spec = engine.spec
        axes = range(spec.spatial)
        self._flips = list(chain.from_iterable(combinations(axes, n) for n in range(spec.spatial + 1)))
        self._turn = how == "d4"
        outputs = tuple(_both_ways(o) for o in spec.used_outputs())
        if self._turn:
            if spec.spatial != 2:
                raise ContractError(f"--tta d4 turns planes, and the network has {spec.spatial} axes; use --tta flip")
            if spec.sizes[0] != spec.sizes[1]:
                raise ContractError(
                    "--tta d4 needs a network that takes the same sizes along both axes; use --tta flip"
                )
            if not spec.free_size and spec.tile[0] != spec.tile[1]:
                raise ContractError("--tta d4 needs square tiles, and the engine's are not; use --tta flip")
            if not spec.exact and spec.tile[0] != spec.tile[1]:
                raise ContractError("--tta d4 needs square tiles where tiles are blended; use --tta flip")
            outputs = tuple(_both_axes(o) for o in outputs)
        contract = spec.contract_of(output)
        self._activation = (
            None
            if raw or spec.placement == "nnunet" or contract.output_is != "logits" or contract.task in (None, "regression")
            else "softmax" if contract.task == "multiclass" else "sigmoid"
        )  # fmt: skip
        if self._activation is not None:
            contract = replace(contract, output_is="probabilities")
        spec = replace(spec, contract=contract, outputs=outputs, halo_limit=None)
        super().__init__(engine, spec)

    @property
    def positions(self) -> int:
        return len(self._flips) * (2 if self._turn else 1)

    def run(self, batch: Array) -> list[npt.NDArray[np.float32]]:
        """As :meth:`Engine.run`: means over all positions, accumulated in float32 in one order."""
        total: list[npt.NDArray[np.float32]] | None = None
        for turned in (False, True)[: 1 + self._turn]:
            given = batch.swapaxes(-1, -2) if turned else batch
            for flips in self._flips:
                axes = tuple(2 + k for k in flips)
                outs = self._engine.run(np.ascontiguousarray(np.flip(given, axes)))
                back = [np.flip(self._activated(y), axes) for y in outs]
                if turned:
                    back = [y.swapaxes(-1, -2) for y in back]
                total = [y.copy() for y in back] if total is None else [a + y for a, y in zip(total, back, strict=True)]
        assert total is not None  # noqa: S101 - there is always the position as it is
        return [np.ascontiguousarray(y / np.float32(self.positions)) for y in total]

    def _activated(self, y: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self._activation == "softmax":
            e = np.exp(y - y.max(axis=1, keepdims=True))
            return np.asarray(e / e.sum(axis=1, keepdims=True), np.float32)
        if self._activation == "sigmoid":
            return np.asarray(0.5 * (1 + np.tanh(0.5 * y)), np.float32)  # the sigmoid, without overflow
        return y


def _both_ways(output: OutputField) -> OutputField:
    return replace(output, field=tuple(_symmetric(f) for f in output.field))


def _symmetric(f: AxisField) -> AxisField:
    if f.shrink[0] != f.shrink[1]:
        raise ContractError(
            f"--tta flips the image, and the network takes {f.shrink[0]} samples away in front and {f.shrink[1]} behind: "
            "flipped results would not lie over the others; leave --tta away"
        )
    return replace(f, halo=(max(f.halo),) * 2, reach=(max(f.reach),) * 2)


def _both_axes(output: OutputField) -> OutputField:
    a, b = output.field
    if (a.shrink, a.scale) != (b.shrink, b.scale):
        raise ContractError("--tta d4 turns the image, and the network treats its axes differently; use --tta flip")
    halo, reach = max(a.halo[0], b.halo[0]), max(a.reach[0], b.reach[0])
    return replace(output, field=tuple(replace(f, halo=(halo, halo), reach=(reach, reach)) for f in (a, b)))
