"""How long an engine takes beside the bare library: a number that holds on another machine, and tomorrow."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace

from ..backends.session import FunctionSession
from ..baseline.model import Model
from ..baseline.results import tile_of
from ..baseline.samples import SampleWindow
from ..engine.engine import Engine
from ..errors import ContractError
from ..system import timing
from ..system.json import Record

ROUNDS = 11  # of both in turns: the median of so many ratios holds to some per cent on a machine that is shared


@dataclass(frozen=True)
class Speed(Record):
    """An engine's time for a tile as a multiple of what ONNX Runtime alone takes for it, on the FP32 graph.

    Attributes:
        ratio: Median over the rounds; below 1 the engine is faster.
        low, high: 95 % interval of that median.
        bound: The largest ratio allowed.
        engine_ms, bare_ms: Medians, for people: they hold for this machine and this moment.
        tile: In pixels.
    """

    ratio: float
    low: float
    high: float
    bound: float
    engine_ms: float
    bare_ms: float
    tile: tuple[int, ...]

    @property
    def accepted(self) -> bool:
        """Whether the bound is kept. It is missed where all of the interval lies above it: noise alone misses nothing."""
        return self.low <= self.bound

    @property
    def sentence(self) -> str:
        """For people."""
        return (
            f"a tile takes {self.ratio:.2f} times as long as in ONNX Runtime alone (95 %: {self.low:.2f} to "
            f"{self.high:.2f}); {'inside' if self.accepted else 'ABOVE'} the bound of {self.bound:g}"
        )


def measure_speed(engine: Engine, model: Model, sample: SampleWindow, bound: float, threads: int) -> Speed:
    """Times one tile of the engine's, in turns with ONNX Runtime on the FP32 graph.

    Args:
        engine: What is judged; on a GPU the library runs on the CPU all the same.
        model: The FP32 graph.
        sample: Where the tile is taken from.
        bound: The largest ratio allowed.
        threads: Of both.

    Raises:
        ContractError: A bound that is not above 0.
    """
    if not bound > 0:
        raise ContractError(
            f"speed {bound:g} is no ratio; give how many times as long as ONNX Runtime it may take, e.g. 0.8"
        )
    from ..backends.onnxruntime import cpu as onnxruntime

    spec = replace(engine.spec, backend="onnxruntime", precision="fp32", device="cpu", settings=None)
    session = FunctionSession(onnxruntime.bare(model.graph, threads), "ONNX Runtime", threads)
    tile = engine.spec.tile
    with closing(Engine(spec, session)) as bare:
        x = tile_of(sample, engine.spec, tile, threads)
        ours, theirs = timing.interleave([lambda: engine.run(x), lambda: bare.run(x)], runs=ROUNDS, seconds=60.0)
    found = timing.ratio(ours, theirs)
    return Speed(
        found.median, found.low, found.high, bound, ours.median_s * 1e3, theirs.median_s * 1e3, tuple(tile)
    )  # fmt: skip
