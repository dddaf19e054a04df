"""Another output of a network in the place of the first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import Engine, EngineView


class Headed(EngineView):
    """An engine whose first output is the one called ``name``, with the contract of that one; the others follow.

    All outputs stay, so that tiles and canvas are those that parity was judged on.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        """
        Raises:
            ContractError: The engine has no output called ``name``.
        """
        spec = engine.spec
        first = spec.head(name)
        self._order = [first, *(k for k in range(len(spec.outputs)) if k != first)]
        outputs = tuple(spec.outputs[k] for k in self._order)
        spec = replace(spec, contract=spec.contract_of(first), outputs=outputs)
        super().__init__(engine, spec)

    def run(self, batch: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
        """As :meth:`Engine.run`, in the order of this engine's outputs."""
        results = self._engine.run(batch)
        return [results[k] for k in self._order]
