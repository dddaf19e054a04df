"""Build, step 4: engines of one build, each made for a backend and a precision; they and their files are looked after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from .. import backends
from ..backends.beside import run_beside
from ..backends.session import Session
from ..baseline.model import Model
from ..baseline.results import tile_of
from ..engine.engine import Engine
from ..engine.spec import EngineSpec, Precision
from ..errors import size_text
from ..graph.passes.half import half
from ..system import facts
from ..tiling.grid import square_tile
from .activations import find_overflows, list_tensors, probe
from .job import BuildJob
from .report import Kind
from .tiling import Tiling

GPU_BATCHES = (1, 4, 16)  # tiles per run that are tried on a GPU
SMALL_PX = 48  # an axis of tiles that graphs are converted at
CALIBRATION_PX = 320 * 320  # tile area at which activations are looked at


@dataclass(frozen=True)
class EngineFiles:
    """The graph that an engine was loaded from, and what the backend compiled or converted it into, if it did."""

    graph: Path
    compiled: Path | None


class Engines:
    """Makes engines, knows their files, and closes those that are left at the end.

    Attributes:
        files: Of every engine that was made and not dropped.
    """

    def __init__(self, job: BuildJob, tiling: Tiling, kind: Kind):
        self.files: dict[Engine, EngineFiles] = {}
        self._job, self._tiling, self._kind = job, tiling, kind
        self._count = 0  # of engines whose graph was made by a pass

    def make(
        self,
        name: str,
        precision: Precision,
        tile: tuple[int, ...],
        batches: Sequence[int],
        source: Path | None = None,
        smaller: tuple[int, ...] | None = None,
    ) -> Engine:
        """The model built for one backend and precision, loaded; a plan takes these tiles and batches alone.

        Args:
            name: The backend.
            precision: Of the engine.
            tile: In pixels.
            batches: Tiles per run.
            source: The graph where a pass has lowered its precision already; None: the model's.
            smaller: A smaller tile that a plan is to take as well; None: none.

        Raises:
            BackendError, GraphError, TileError: The backend cannot be built, or loaded, with this graph at these shapes.
        """
        job, spec = self._job, self._tiling.spec
        backend, stem = backends.get(name), f"{name}-{precision}-{size_text(tile)}"
        if precision == "fp16" and name != "ncnn":  # which stores FP32 graphs in half precision itself
            source = self._half_with_islands
        if source is not None:
            self._count += 1
            stem += f"-{self._count}"
        tiles = (tile,) if smaller is None else (tile, smaller)
        if backend.any_tile:
            tiles = (*tiles, *_two_small(spec))
        stem += "" if smaller is None else f"-{size_text(smaller)}"
        graph, blob = job.work / f"{stem}.onnx", job.work / f"{stem}.bin"
        settings = backend.build(
            source or job.model.graph,
            graph,
            precision=precision,
            device=spec.device,
            blob=blob,
            tiles=tiles,
            batches=batches,
        )
        compiled = blob if blob.exists() else None
        session = backend.load(
            graph, precision=precision, device=spec.device, threads=job.threads, blob=compiled, settings=settings
        )
        spec = replace(spec, backend=name, precision=precision, tile=tile, settings=settings)
        if not backend.any_tile:
            sizes = tuple(replace(s, fixed=t) for s, t in zip(spec.sizes, tile, strict=True))
            spec = replace(spec, sizes=sizes, batches=tuple(batches), tiles=tiles)
        engine = Engine(spec, session)
        self.files[engine] = EngineFiles(graph, compiled)
        return engine

    def with_streams(self, engine: Engine, streams: int) -> Engine:
        """An engine that was made, loaded again to run ``streams`` tiles beside each other."""
        spec, files = engine.spec, self.files[engine]
        backend = backends.get(spec.backend)

        def load_threads(count: int) -> Session:
            return backend.load(
                files.graph,
                precision=spec.precision,
                device=spec.device,
                threads=count,
                blob=files.compiled,
                settings=spec.settings,
            )

        many = Engine(replace(spec, streams=streams), run_beside(load_threads, streams, self._job.threads))
        self.files[many] = files
        return many

    def drop(self, engine: Engine) -> None:
        """Closes an engine that is of no more use, and removes its graph."""
        engine.close()
        files = self.files.pop(engine)
        for path in (files.graph, files.compiled):  # as large as the network, and there may be dozens
            if path is not None:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Gives back what every engine holds."""
        for engine in self.files:
            engine.close()

    @cached_property
    def _half_with_islands(self) -> Path | None:
        """The graph in FP16 with FP32 islands where activations of the samples leave FP16's range; None if none do."""
        if self._kind != "samples":
            return None
        import onnx

        job, spec = self._job, self._tiling.spec
        proto = onnx.load(str(job.model.graph))
        tile = calibration_tile(spec)
        tiles = (
            job.baseline.graph_inputs(tile_of(s, spec, tile, job.threads)) for s in self._tiling.results.samples[:4]
        )
        islands = find_overflows(proto, probe(proto, list_tensors(proto), tiles, threads=job.threads))
        if not islands:
            return None
        path = job.work / "half-with-islands.onnx"
        half(proto, islands=islands)
        onnx.save_model(proto, str(path))
        count = f"{len(islands)} node{'s' * (len(islands) != 1)}"
        job.remarks.notes.append(f"FP16 keeps {count} in FP32, where activations of the samples leave its range")
        return path


def _two_small(spec: EngineSpec) -> list[tuple[int, ...]]:
    """Two small tiles that the graph accepts, the larger first; none where it takes one size alone."""
    low = tuple(s.at_least(s.fixed or SMALL_PX) for s in spec.sizes)
    high = tuple(s.at_least(s.fixed or n + 1) for n, s in zip(low, spec.sizes, strict=True))
    return [] if low == high else [high, low]


def calibration_tile(spec: EngineSpec) -> tuple[int, ...]:
    """The tile at which activations are looked at: the model's own where it is part of the model."""
    if spec.runs_whole:
        return square_tile(spec.sizes, spec.outputs, CALIBRATION_PX)
    return spec.tile


def batches_to_try(model: Model, spec: EngineSpec) -> tuple[int, ...]:
    """Tiles per run to try: one on a CPU, whose cores one tile keeps busy; several on an NVIDIA GPU, as memory allows.

    What the graph does not leave free is as it is on either.
    """
    if spec.batch_sizes:
        return spec.batch_sizes
    if not facts.is_cuda(spec.device):
        return (1,)
    return tuple(n for n in GPU_BATCHES if n == 1 or fits(model, spec.device, spec.tile, n))


def fits(model: Model, device: str, tile: Sequence[int], batch: int, held: int = 0) -> bool:
    """Whether a GPU has the memory for a batch: live activations, twice, for workspaces and the network itself.

    ``held``: bytes of its memory that are not free and will be by then.
    """
    from ..kernels.device import Device

    free = Device.open(facts.cuda_index(device)).memory()[0]
    return 2 * model.report.activation_bytes(tile, batch) < free + held
