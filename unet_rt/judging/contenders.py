"""What a benchmark of a user's network runs: engines, bare libraries, eager PyTorch, tiles by hand, MONAI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import backends
from ..baseline.results import raw_result
from ..baseline.samples import ReadOptions, SampleWindow
from ..building.job import Say
from ..contract.contract import Contract
from ..engine import parity as parity_module
from ..engine.engine import Engine
from ..engine.spec import EngineSpec
from ..errors import BackendError, ParityError
from ..images.normalize import normalize_pixels
from ..prediction.run import run
from ..prediction.work import Computation, Work
from ..tiling.decision import decide
from ..tiling.grid import TileGrid
from ..tiling.placement import blend_weight

Array = npt.NDArray[Any]

LIBRARIES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "eager": "eager PyTorch"}
MONAI = {"monai": "constant", "monai-gaussian": "gaussian"}  # name -> MONAI's mode
MONAI_OVERLAP = 0.25  # MONAI's default
BASELINES = (*LIBRARIES, *MONAI)


@dataclass(frozen=True)
class Entry:
    """What a process needs to open one that is measured; it can be pickled.

    Attributes:
        title: Its name in the table.
        spec: Of an engine, or of the library: contract, halo and overlap.
        threads: Of everybody.
        folder: The engine; None: a library used directly.
        library: Of ``LIBRARIES``, where it is none.
        graph: The graph that it runs.
        module: For eager PyTorch: the module, or a function without arguments that makes it.
        monai: Mode of MONAI's sliding window over the library; None: tiles by hand.
    """

    title: str
    spec: EngineSpec
    threads: int
    folder: Path | None = None
    library: str = ""
    graph: Path | None = None
    module: Any = None
    monai: str | None = None

    @property
    def is_engine(self) -> bool:
        """Whether it is an engine of unet-rt."""
        return self.folder is not None


@dataclass(frozen=True)
class Contender:
    """One that is measured: an engine, or a library used directly.

    ``run``: (1, C, *tile) -> (1, K, *tile_out); ``tiled``: network's own values (K, *spatial) of a window in tiles.
    """

    name: str
    spec: EngineSpec
    run: Callable[[Array], Array]
    labels: Callable[[SampleWindow, TileGrid], Array]
    tiled: Callable[[SampleWindow, TileGrid], Array]


def why_missing(name: str, module: Any) -> str | None:
    """Why a baseline cannot be run, None if it can.

    Raises:
        BackendError: No baseline of this name.
    """
    if name not in BASELINES:
        raise BackendError(f"there is no baseline {name!r}; choose from {', '.join(BASELINES)}")
    from ..backends import eager

    if name in MONAI:
        return eager.monai_missing()
    reason = backends.get(name).missing()
    if reason is None and name == "eager" and module is None:
        return "a graph has no module to run; give the network's checkpoint with --checkpoint"
    return reason


@dataclass(frozen=True)
class EngineOptions:
    """How engines of an ONNX file are built to be measured.

    Attributes:
        samples: Images to build lower precisions from; None: FP32 alone.
        contract: The input contract, as far as the model does not declare it.
        read: How images are to be read.
        tile: In pixels per axis; None: chosen by build.
        threads: Of backend and kernels; 0: by affinity and quota.
    """

    samples: Any
    contract: Contract | None
    read: ReadOptions
    tile: Sequence[int] | None
    threads: int


def build_engines(path: Path, options: EngineOptions, work: Path, say: Say) -> tuple[list[Entry], dict[str, str]]:
    """One engine per backend and precision of an ONNX file; and of those that there are none of, why, by title.

    Raises:
        The error of the first, where none could be built.
    """
    from ..building.build import build

    engines, skipped = list[Entry](), dict[str, str]()
    failed: list[BackendError | ParityError] = []
    precisions = ("fp32", "bf16", "int8") if options.samples is not None else ("fp32",)
    for name, precision in product(backends.require("cpu"), precisions):
        title = f"unet-rt {name} {precision}"
        say(f"building {title}")
        if precision not in backends.get(name).precisions("cpu"):
            skipped[title] = f"{name} has no {precision} on this CPU"
            continue
        try:
            folder = work / f"{name}-{precision}.urt"
            with build(
                path,
                samples=options.samples,
                out=folder,
                contract=options.contract,
                backend=name,
                device="cpu",
                precision=precision,
                tile=options.tile,
                threads=options.threads,
                axes=options.read.axes,
                channels=options.read.channels,
                say=say,
            ) as engine:
                engines.append(Entry(title, engine.spec, options.threads, folder))
        except (BackendError, ParityError) as error:
            skipped[title] = str(error)
            failed.append(error.with_traceback(None))  # whose frames would keep all that the build held
    if not engines:
        raise failed[0]
    return engines, skipped


def engine_contender(name: str, engine: Engine, threads: int) -> Contender:
    """An engine as what is measured, run as ``predict`` runs it."""
    contract = engine.spec.contract
    # where the task was left open, the values are all there is
    decision = decide(contract, engine.spec.outputs[0].channels, None if contract.has_labels else "raw")

    def labels(sample: SampleWindow, grid: TileGrid) -> Array:
        lead = (decision.channels,) if decision.channels else ()
        result = np.empty((*lead, *grid.out_shape(0)), decision.dtype)

        def keep(work: Work, start: int, band: Array) -> None:
            rows = slice(start, start + band.shape[len(lead)])
            (result[:, rows] if lead else result[rows])[...] = band

        batch = engine.spec.run_batch
        with sample.source(engine.spec.contract) as source:
            made = Computation(engine, source, decision, sample.affines, batch=batch, threads=threads)
            run(made, [Work(0, grid)], keep)
        return result

    def tiled(sample: SampleWindow, grid: TileGrid) -> Array:
        return raw_result(engine, sample, grid, threads)

    return Contender(name, engine.spec, lambda x: engine.run(x)[0], labels, tiled)


def baseline_entries(
    names: Sequence[str], graph: Path, spec: EngineSpec, module: Any, threads: int
) -> tuple[list[Entry], dict[str, str]]:
    """The libraries used directly, eager PyTorch first, where it is: its speed is 1; and why others are not run.

    Args:
        names: Out of :data:`BASELINES`.
        graph: What they run.
        spec: Of an engine of it: its contract, halo and overlap.
        module: The network for eager PyTorch, or a function that makes it; None: none.
        threads: Of everybody.
    """
    spec = replace(spec, precision="fp32", device="cpu")
    libraries = [name for name in LIBRARIES if name in names]
    libraries.sort(key=lambda name: name != "eager")
    entries = [
        Entry(LIBRARIES[n] + (" FP32" if n == "eager" else " FP32, bare"), spec, threads, None, n, graph, module)
        for n in libraries
    ]
    skipped = dict[str, str]()
    for name in (n for n in MONAI if n in names):
        if any(f.scale != 1 or any(f.shrink) for f in spec.outputs[0].field):
            skipped[name] = "the output is not of the input's size, and MONAI's sliding window would resample it"
        elif not libraries:
            skipped[name] = "it needs a network to run; name one of eager, onnxruntime, openvino beside it"
        else:
            title = f"MONAI sliding window ({MONAI[name]}), {LIBRARIES[libraries[0]]} FP32"
            entries.append(replace(entries[0], title=title, monai=MONAI[name]))
    return entries, skipped


def open_contender(entry: Entry, resources: ExitStack) -> Contender:
    """Loads what is measured; ``resources`` close it.

    Raises:
        UnetRtError: It cannot be loaded, as its message says.
    """
    if entry.folder is not None:
        from ..engine.load import load

        opened = resources.enter_context(load(entry.folder, threads=entry.threads or None))
        return engine_contender(entry.title, opened, entry.threads)
    from ..backends import eager, openvino
    from ..backends.onnxruntime import cpu as onnxruntime
    from ..backends.session import FunctionSession, SessionBase

    module = None
    if entry.library == "eager":
        module = entry.module if hasattr(entry.module, "state_dict") else entry.module()
        session: SessionBase = eager.load(module, threads=entry.threads)
    else:
        bare = onnxruntime.bare if entry.library == "onnxruntime" else openvino.bare
        session = FunctionSession(bare(Path(entry.graph or ""), entry.threads), LIBRARIES[entry.library], entry.threads)
    engine = resources.enter_context(Engine(replace(entry.spec, backend=entry.library), session))
    if entry.monai is not None:
        return _monai(entry.title, entry.monai, engine, module)
    return _by_hand(entry.title, engine)


def _by_hand(name: str, engine: Engine, tiled: Callable[[SampleWindow, TileGrid], Array] | None = None) -> Contender:
    contract = engine.spec.contract
    values = tiled or (lambda sample, grid: tiles_by_hand(engine, sample, grid))

    def labels(sample: SampleWindow, grid: TileGrid) -> Array:
        raw = values(sample, grid)
        return parity_module.labels(raw, contract) if contract.has_labels else raw

    return Contender(name, engine.spec, lambda x: engine.run(x)[0], labels, values)


def tiles_by_hand(engine: Engine, sample: SampleWindow, grid: TileGrid) -> Array:
    """What a script does with a library: pad, normalise, run one tile after the other, put the results together.

    Returns:
        The network's own values (K, *spatial), float32.
    """
    spec = engine.spec
    width = [(a.canvas.before, a.canvas.size - a.canvas.before - a.canvas.image) for a in grid.axes]
    how: dict[str, Any] = {"mirror": "reflect", "edge": "edge", "constant": "constant"}
    border = spec.contract.border or "mirror"
    if border == "zero":
        canvas = np.pad(normalize_pixels(sample.pixels, sample.numbers), [(0, 0), *width])
    else:
        canvas = normalize_pixels(np.pad(sample.pixels, [(0, 0), *width], mode=how[border]), sample.numbers)
    result = np.zeros((spec.outputs[0].channels, *grid.out_shape(0)), np.float32)
    total = np.zeros(grid.out_shape(0), np.float32)
    weight = blend_weight(grid.tile_out_shape(0), spec.blend, spec.placement) if grid.blended else None
    for index in grid.rows():
        place = grid.placement(index, 0)
        origins = grid.origins(index) + [a.canvas.before for a in grid.axes]
        for origin, source, target, size in zip(origins, place.source, place.target, place.size, strict=True):
            tile = canvas[(slice(None), *(slice(o, o + t) for o, t in zip(origin, grid.tile, strict=True)))]
            values = engine.run(tile[None])[0][0]
            kept = tuple(slice(a, a + n) for a, n in zip(source, size, strict=True))
            there = tuple(slice(a, a + n) for a, n in zip(target, size, strict=True))
            if weight is None:
                result[(slice(None), *there)] = values[(slice(None), *kept)]
            else:
                result[(slice(None), *there)] += values[(slice(None), *kept)] * weight[kept]
                total[there] += weight[kept]
    return result if weight is None else result / total


def _monai(name: str, mode: str, engine: Engine, module: Any) -> Contender:
    from ..backends import eager

    predictor = module if module is not None else (lambda x: engine.run(x)[0])

    def tiled(sample: SampleWindow, grid: TileGrid) -> Array:
        if grid.count == 1:
            return tiles_by_hand(engine, sample, grid)  # untiled: nothing of MONAI is in it
        x = normalize_pixels(sample.pixels, sample.numbers)[None]
        values: Array = eager.sliding_window(predictor, x, grid.tile, overlap=MONAI_OVERLAP, mode=mode)[0]
        return values

    return _by_hand(name, engine, tiled)
