"""Everything that is measured on a GPU, in one script: roof, kernels, engines, end to end. At most ten minutes.

    python benchmarks/gpu.py [--only SECTION,...] [--skip SECTION,...] [--seconds 560] [--out FILE]
    python benchmarks/gpu.py --dry-run            # all of its logic on the CPU, at tiny sizes; the figures mean nothing

Every section runs in a process of its own with a time limit, and writes what it has after every step: a crash, an
illegal access or a hang of one costs the others nothing. One JSON at the end (sections that could not run say why), and
tables. The method is in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported, here by the bare baselines

import numpy as np  # noqa: E402
import paper_net  # noqa: E402
import record  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import unet_rt as urt  # noqa: E402
from unet_rt import backends
from unet_rt.contract.contract import Normalization  # noqa: E402
from unet_rt.drawing.microscopy import microscopy  # noqa: E402
from unet_rt.images.normalize import (
    affine,
    normalised,  # noqa: E402
)
from unet_rt.images.open import open_image  # noqa: E402
from unet_rt.kernels import calls as kernels
from unet_rt.kernels import native
from unet_rt.prediction.report import RunReport  # noqa: E402
from unet_rt.system import facts as machine
from unet_rt.system import limits  # noqa: E402

PRECISIONS = ("fp32", "fp16", "int8")
NETS = ("paper", "nuclei")
ROTATED_BYTES = 512 << 20  # what one round of a kernel's buffers takes: many times any L2
SAMPLE_S = 0.05  # one timed sample lasts at least this long


# ------------------------------------------------------------------------------------------------------------ a section


class DeviceLost(BaseException):
    """After an illegal access every call of the process fails; whoever is named here made it."""


def alive() -> bool:
    """Whether the device still answers this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@dataclass
class Section:
    """What a section knows and writes: ``figures`` goes to ``path`` after every step."""

    name: str
    dry: bool
    work: Path
    deadline: float
    without: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 4, 16)
    rounds: int = 7
    nets: tuple[str, ...] = NETS
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """``cuda:0``, or ``cpu`` in a dry run."""
        return "cpu" if self.dry else "cuda:0"

    @property
    def left(self) -> float:
        """Seconds until this section is stopped."""
        return self.deadline - time.time()

    def say(self, text: str) -> None:
        print(f"[{self.name} {time.strftime('%H:%M:%S')}] {text}", flush=True)

    def add(self, table: str, **row: Any) -> None:
        """A row of a table, written and printed at once."""
        self.figures.setdefault(table, []).append(row)
        self.say(", ".join(f"{k} {_short(v)}" for k, v in row.items() if not isinstance(v, dict | list)))
        self.save()

    def failed(self, what: str, error: BaseException | str) -> None:
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        if not isinstance(error, str):
            traceback.print_exception(error, limit=-4, file=sys.stdout)
        self.figures.setdefault("failed", []).append({"what": what, "why": text[:1500]})
        self.say(f"FAILED {what}: {text[:300]}")
        self.save()
        if not self.dry and not alive():
            raise DeviceLost(what)

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A step whose failure is recorded and ends nothing else."""
        if not self.dry:  # a crash leaves no other word
            self.figures["doing"] = what
            self.save()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the record
            self.failed(what, error)

    def save(self) -> None:
        path = self.work / f"section-{self.name}.json"
        path.with_suffix(".new").write_text(json.dumps(self.figures, indent=1, default=str), encoding="utf-8")
        path.with_suffix(".new").replace(path)

    def clocks(self, when: str) -> None:
        """What the driver says about clocks, temperature and power at this moment."""
        if not self.dry:
            self.figures.setdefault("clocks", []).append({"when": when, **smi()})


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value)


SMI = (
    "name,driver_version,compute_cap,memory.total,memory.used,pstate,clocks.sm,clocks.mem,clocks.max.sm,"
    "temperature.gpu,power.draw,power.limit,clocks_event_reasons.active"
)


def smi() -> dict[str, str]:
    """The first GPU's facts from ``nvidia-smi``; what it does not know is left out."""
    for asked in (SMI, SMI.replace(",clocks_event_reasons.active", "")):
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "--id=0"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"error": str(error)}
        if done.returncode == 0:
            values = done.stdout.strip().splitlines()[0].split(", ")
            return dict(zip(asked.split(","), values, strict=False))
    return {"error": (done.stdout + done.stderr).strip()[:300]}


def synchronize(device: str) -> None:
    """Waits for everything on the device, whatever library enqueued it (one primary context for all)."""
    if device != "cpu":
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------------------------------------- timing


@dataclass
class Contender:
    """Something to time: ``call`` enqueues one run, ``result`` is the output of the last one (N, K, *spatial)."""

    name: str
    call: Callable[[], object]
    result: Callable[[], Tensor]
    roof: str  # the GEMM it is held against: fp32, tf32, fp16, int8
    notes: dict[str, Any] = field(default_factory=dict)


def interleave(
    contenders: Sequence[Contender], device: str, *, rounds: int, seconds: float, sample_s: float = SAMPLE_S
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per call of every contender, in turns; and those that failed, with the reason.

    A sample is as many calls enqueued back to back as fill ``sample_s``, between two waits for the whole device: the
    wait is less than a thousandth of it. Three calls warm up, the last of them gives the number per sample. The order
    of the contenders is drawn anew every round, so that nobody always follows the one who heats the chip.
    """
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    failed: dict[str, str] = {}
    counts: dict[str, int] = {}
    begun = time.perf_counter()

    def sample(contender: Contender, count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            contender.call()
        synchronize(device)
        return (time.perf_counter() - start) / count

    order = list(contenders)
    shuffle = random.Random(0).shuffle
    for turn in range(-1, rounds):
        if turn >= 2 and time.perf_counter() - begun > seconds:
            break
        for contender in order:
            if contender.name in failed:
                continue
            try:
                if turn < 0:
                    sample(contender, 2)
                    once = sample(contender, 1)
                    counts[contender.name] = max(1, min(2000, math.ceil(sample_s / max(once, 1e-7))))
                else:
                    times[contender.name].append(sample(contender, counts[contender.name]))
            except Exception as error:
                failed[contender.name] = f"{type(error).__name__}: {error}"
                if device != "cpu" and not alive():
                    raise DeviceLost(contender.name) from error
        shuffle(order)
    return {name: found for name, found in times.items() if found and name not in failed}, failed


def spread(times: Sequence[float]) -> dict[str, Any]:
    """Median, fastest and slowest in milliseconds."""
    return {
        "median_ms": statistics.median(times) * 1e3,
        "low_ms": min(times) * 1e3,
        "high_ms": max(times) * 1e3,
        "rounds": len(times),
    }


# ------------------------------------------------------------------------------------------- networks, pixels, engines


@functools.cache
def network(name: str, dry: bool) -> paper_net.Net:
    """The paper's U-Net (trained weights, widened to 31.03 M parameters) or the small one that ships."""
    if name == "nuclei":
        return paper_net.nuclei()
    return paper_net.paper(widen=1) if dry else paper_net.paper()


def tile_px(name: str, dry: bool) -> int:
    if name == "paper":
        return 252 if dry else 572
    return 160 if dry else 512


@functools.cache
def drawn(side: int) -> np.ndarray:
    """(side, side) uint8: drawn microscopy; sides beyond 2048 px repeat a block of 2048, mirrored so that it joins."""
    block = microscopy((min(side, 2048),) * 2, seed=4242, dtype=np.uint8).image
    if side <= 2048:
        return block
    times = -(-side // 2048)
    row = np.concatenate([block[:, :: (-1) ** k] for k in range(times)], axis=1)[:, :side]
    return np.ascontiguousarray(np.concatenate([row[:: (-1) ** k] for k in range(times)], axis=0)[:side])


def numbers_of(net: paper_net.Net, pixels: np.ndarray) -> Any:
    """The whole image's normalisation in numbers."""
    assert net.contract.normalization is not None
    with open_image(pixels, net.contract, spatial=2) as source:
        return affine(net.contract.normalization, source).plane(0)


def batch_of(net: paper_net.Net, count: int, tile: int, device: str) -> Tensor:
    """(count, 1, tile, tile) float32, contiguous: different windows of one drawn image, normalised by its statistics."""
    pixels = drawn(max(tile + 64, min(2048, 2 * tile)))
    numbers = numbers_of(net, pixels)
    room = len(pixels) - tile
    corners = np.random.default_rng(7).integers(0, room + 1, (count, 2))
    windows = [normalised(pixels[None, y : y + tile, x : x + tile], numbers) for y, x in corners]
    return torch.from_numpy(np.stack(windows)).contiguous().to(device)


@functools.cache
def flops_of(checkpoint: Path, tile: int) -> int:
    """Operations of one tile, a multiply-add counted as two: counted by torch on tensors without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    module = paper_net.load_checkpoint(checkpoint)[0].to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(1, 1, tile, tile, device="meta"))
    return int(counter.get_total_flops())


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those options that ``function`` takes."""
    known = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return options
    return {name: value for name, value in options.items() if name in known}


@dataclass(frozen=True)
class Made:
    """An engine that a build section left behind: a folder (``engine``), or a graph without its proof (``direct``)."""

    net: str
    backend: str
    precision: str
    kind: str
    path: str
    seconds: float
    note: str = ""

    @property
    def name(self) -> str:
        return f"unet-rt {self.backend} {self.precision}"


def made(section: Section, net: str) -> list[Made]:
    """Every engine of a network that the build sections made."""
    found = []
    for path in sorted(section.work.glob(f"made-{net}-*.json")):
        entry = Made(**json.loads(path.read_text(encoding="utf-8")))
        if entry.backend not in section.without:
            found.append(entry)
    return sorted(found, key=lambda m: (m.backend, PRECISIONS.index(m.precision)))


def build_one(section: Section, net_name: str, backend: str, precision: str) -> None:
    """One engine by ``unet_rt.build``; by the backend alone where build refuses and the precision needs no samples."""
    net = network(net_name, section.dry)
    tile = tile_px(net_name, section.dry)
    side = tile + 64
    pixels = drawn(side if section.dry else 2048)
    corners = (
        [(0, 0)] if section.dry else [(y, x) for y in (0, 2048 - side) for x in (0, (2048 - side) // 2, 2048 - side)]
    )
    samples = [np.ascontiguousarray(pixels[y : y + side, x : x + side]) for y, x in corners]
    out = section.work / f"{net_name}-{backend}-{precision}.urt"
    wanted = dict(backend=backend, precision=precision, device=section.device, overwrite=True)
    sizes = (tile,) if net_name == "paper" or section.dry else (tile, 2 * tile)
    fixed = dict(tiles=tuple((s, s) for s in reversed(sizes)), batches=section.batches)
    plans = backend.startswith("tensorrt")
    one_tile = net_name == "paper" or section.dry
    options = accepted(urt.build, tile=(tile, tile) if one_tile else None, **(fixed if plans else {}))
    if section.dry:
        options["halo"] = "exact"  # measuring one takes seconds
    budgets = [None, urt.Budget(label_change=0.02, dice=0.9)]
    note = ""
    begun = time.perf_counter()
    for budget in budgets:
        try:
            minutes = max(0.2, (section.left - 10) / 60)  # what is stopped writes nothing
            built = urt.build(
                net.onnx, samples=samples, out=out, budget=budget, search_minutes=minutes, say=section.say,
                **wanted, **options,
            )  # fmt: skip
            built.close()
            entry = Made(net_name, backend, precision, "engine", str(out), time.perf_counter() - begun, note)
            break
        except urt.ParityError as error:
            note = f"outside the default budget ({error})"[:600]
            section.failed(f"build {net_name} {backend} {precision}, default budget", error)
        except Exception as error:  # noqa: BLE001 - recorded, and the backend is tried alone
            section.failed(f"build {net_name} {backend} {precision}", error)
            if precision == "int8":
                return
            entry = build_direct(section, net, net_name, backend, precision, fixed)
            break
    else:
        return
    (section.work / f"made-{net_name}-{backend}-{precision}.json").write_text(json.dumps(vars(entry)))
    section.add("built", **{k: v for k, v in vars(entry).items() if k != "path"})


def build_direct(
    section: Section, net: paper_net.Net, net_name: str, backend: str, precision: str, fixed: dict[str, Any]
) -> Made:
    module = backends.get(backend)
    graph = section.work / f"{net_name}-{backend}-{precision}.onnx"
    options = accepted(module.build, blob=graph.with_suffix(".engine"), **fixed)
    begun = time.perf_counter()
    module.build(net.onnx, graph, precision=precision, device=section.device, **options)
    return Made(net_name, backend, precision, "direct", str(graph), time.perf_counter() - begun, "without its proof")


class HostSession:
    """The face of a device session over a session on the CPU: lets a dry run take the same way."""

    def __init__(self, session: Any):
        self._session = session
        self.input_dtypes = self.output_dtypes = (np.dtype(np.float32),)

    def output_shapes(self, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [a.shape for a in self._session.run([np.zeros(s, np.float32) for s in shapes])]

    def run_device(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        for out, result in zip(outputs, self._session.run(list(inputs)), strict=True):
            out[...] = result


def open_made(section: Section, entry: Made) -> tuple[Any, Any]:
    """(engine or None, device session)."""
    if entry.kind == "engine":
        engine = urt.load(entry.path, device=section.device)
        session = HostSession(engine._session) if section.dry else engine.device_session
        if session is None:
            raise RuntimeError(f"{entry.name} has no device session on {engine.spec.device}")
        return engine, session
    module = backends.get(entry.backend)
    blob = Path(entry.path).with_suffix(".engine")
    options = accepted(module.load, blob=blob if blob.exists() else None)
    session = module.load(Path(entry.path), precision=entry.precision, device=section.device, **options)
    return None, HostSession(session) if section.dry else session


class DeviceRun:
    """One of our sessions with input and output on the device: ``call`` enqueues, and copies nothing."""

    def __init__(self, section: Section, session: Any, x: Tensor):
        shapes = session.output_shapes([tuple(x.shape)])
        self.session = session
        if section.dry:
            self.inputs: list[Any] = [np.empty(x.shape, session.input_dtypes[0])]
            self.outputs: list[Any] = [np.empty(s, d) for s, d in zip(shapes, session.output_dtypes, strict=True)]
        else:
            from unet_rt.kernels.device import Device

            device = Device.open(0)
            self.inputs = [device.empty(tuple(x.shape), session.input_dtypes[0])]
            self.outputs = [device.empty(s, d) for s, d in zip(shapes, session.output_dtypes, strict=True)]
        view = torch.as_tensor(self.inputs[0], device=x.device)
        view.copy_(x)
        synchronize(section.device)
        self._result = torch.as_tensor(self.outputs[0], device=x.device)

    def call(self) -> None:
        self.session.run_device(self.inputs, self.outputs)

    def result(self) -> Tensor:
        return self._result

    def free(self) -> None:
        synchronize("cpu" if isinstance(self.session, HostSession) else "cuda:0")
        if hasattr(self.session, "forget"):  # what was recorded for these addresses
            self.session.forget([*self.inputs, *self.outputs])
        for array in (*self.inputs, *self.outputs):
            if hasattr(array, "free"):
                array.free()


# ------------------------------------------------------------------------------------------------------------ baselines


def eager_contender(
    name: str,
    module: nn.Module,
    x: Tensor,
    *,
    roof: str,
    tf32: bool = False,
    benchmark: bool = False,
    autocast: bool = False,
) -> Contender:
    """``module(x)`` as PyTorch runs it; the switches are set for every call, because others set them too."""
    last: list[Tensor] = []
    kind = "cpu" if x.device.type == "cpu" else "cuda"
    dtype = torch.bfloat16 if kind == "cpu" else torch.float16

    def call() -> None:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = benchmark
        last.clear()  # as in a loop that is done with the result before
        with torch.inference_mode(), torch.autocast(kind, dtype=dtype, enabled=autocast):
            last.append(module(x))

    return Contender(name, call, lambda: last[0], roof)


def graph_contender(name: str, module: nn.Module, x: Tensor, *, roof: str) -> Contender:
    """The same captured in a CUDA graph, replayed: PyTorch without the cost of its launches."""
    if x.device.type == "cpu":
        raise RuntimeError("CUDA graphs need a GPU")
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            y = module(x)
    return Contender(name, graph.replay, lambda: y, roof)


def half_module(net: paper_net.Net, device: str) -> nn.Module:
    """FP16 weights, channels last (BF16 on a CPU, where FP16 is not to be had everywhere)."""
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    return net.module().to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def half_input(x: Tensor) -> Tensor:
    dtype = torch.bfloat16 if x.device.type == "cpu" else torch.float16
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def fp16_onnx(section: Section, name: str) -> Path:
    """The network exported from an FP16 module: what someone without unet-rt gives to ONNX Runtime."""
    import warnings

    path = section.work / f"{name}-bare-fp16.onnx"
    if path.exists():
        return path
    module = network(name, section.dry).module().half().to(section.device)  # FP16 takes minutes on CPUs
    side = module.spec.size_at_least(1)
    x = torch.zeros(1, 1, side, side, dtype=torch.float16, device=section.device)
    axes = {"x": {0: "n", 2: "h", 3: "w"}, "y": {0: "n", 2: "u", 3: "v"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (x,),
            str(path),
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=axes,
            opset_version=18,
            dynamo=False,
        )
    return path


class BareOnnxRuntime:
    """ONNX Runtime used directly: its CUDA provider, buffers bound on the device, no wait after a run."""

    def __init__(self, path: Path, device: str, *, nhwc: bool, fused: bool, graph: bool):
        import onnxruntime

        self._library, self.device, self.graph = onnxruntime, device, graph
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        settings = {
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "cudnn_conv_use_max_workspace": "1",
            "use_tf32": str(int("fp16" in path.name)),  # 0 takes all tensor cores away, from FP16 too
            "prefer_nhwc": str(int(nhwc)),
            "fuse_conv_bias": str(int(fused)),
            "enable_cuda_graph": str(int(graph)),
        }
        provider = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=[provider if device == "cpu" else (provider, settings)]
        )
        if self.session.get_providers()[0] != provider:
            raise RuntimeError(f"ONNX Runtime took {self.session.get_providers()}, {provider} was asked")

    def contender(self, name: str, x: Tensor, out_shape: Sequence[int], roof: str, key: int) -> Contender:
        source, target = self.session.get_inputs()[0], self.session.get_outputs()[0]
        dtype = torch.float16 if "16" in source.type else torch.float32
        x = x.to(dtype).contiguous()
        y = torch.empty(tuple(out_shape), dtype=dtype, device=x.device)
        element = np.float16 if dtype == torch.float16 else np.float32
        kind = x.device.type
        io = self.session.io_binding()
        io.bind_input(source.name, kind, 0, element, tuple(x.shape), x.data_ptr())
        io.bind_output(target.name, kind, 0, element, tuple(y.shape), y.data_ptr())
        options = self._library.RunOptions()
        if self.device != "cpu":
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.graph:
            options.add_run_config_entry("gpu_graph_id", str(key))
        held = [x, y]  # the binding knows pointers only

        def call() -> None:
            self.session.run_with_iobinding(io, options)

        return Contender(name, call, lambda: held[1], roof)


BARE = (
    "ONNX Runtime FP32, bare",
    "ONNX Runtime FP16, bare",
    "ONNX Runtime FP16 NHWC, bare",
    "ONNX Runtime FP16 NHWC fused bias, bare",
)


def bare_session(section: Section, net: str, label: str, *, graph: bool) -> BareOnnxRuntime:
    path = fp16_onnx(section, net) if "FP16" in label else network(net, section.dry).onnx
    return BareOnnxRuntime(path, section.device, nhwc="NHWC" in label, fused="fused" in label, graph=graph)


# ------------------------------------------------------------------------------------------------------------- sections


def section_machine(section: Section) -> None:
    names = (
        "torch numpy onnx onnxruntime onnxruntime-gpu pycuda cupy-cuda13x cupy-cuda12x cupy triton tensorrt tensorrt-cu13 "
        "tensorrt-rtx tensorrt-rtx-cu13 tensorrt-lean-cu13 nvidia-cudnn-cu13 nvidia-cublas cuda-python"
    )
    found = {name: machine.package_version(name) for name in names.split()}
    figures = section.figures
    figures["versions"] = {name: version for name, version in found.items() if version is not None}
    figures["cuda_kernels"] = native.cuda_status()
    figures["torch_cuda"] = torch.version.cuda
    with section.part("cuDNN's version"):
        figures["cudnn"] = torch.backends.cudnn.version()
    figures["smi"] = smi()
    figures["driver_says"] = vars(machine.cuda())
    for name in backends.names():
        with section.part(f"asking {name}"):
            figures.setdefault("backends", {})[name] = backends.get(name).missing(section.device) or "usable"
    if not section.dry:
        properties = torch.cuda.get_device_properties(0)
        figures["gpu"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "capability": f"{properties.major}.{properties.minor}",
        }
    section.say(json.dumps({k: figures[k] for k in ("versions", "cuda_kernels") if k in figures}))
    section.save()


def section_prepare(section: Section) -> None:
    """Makes networks once, so that no other section's time holds it."""
    for name in section.nets:
        begun = time.perf_counter()
        net = network(name, section.dry)
        tile = tile_px(name, section.dry)
        x = batch_of(net, 1, tile, "cpu")
        with torch.inference_mode():
            labels = net.module()(x).argmax(1)
        section.add(
            "networks",
            net=name,
            parameters=net.parameters,
            tile=tile,
            gflop_per_tile=flops_of(net.checkpoint, tile) / 1e9,
            foreground=float(labels.float().mean()),
            seconds=time.perf_counter() - begun,
        )
        with section.part(f"exporting {name} from an FP16 module"):
            fp16_onnx(section, name)


def section_roof(section: Section) -> None:
    """Largest measured rates: matrix products of 8192, a copy of a gigabyte; random numbers, never zeros."""
    device, n = section.device, 256 if section.dry else 8192
    contenders, flops = [], 2 * n**3
    kinds = [("fp32", torch.float32, False), ("tf32", torch.float32, True), ("bf16", torch.bfloat16, False)]
    kinds += [] if section.dry else [("fp16", torch.float16, False)]
    for name, dtype, tf32 in kinds:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

        def call(a: Tensor = a, b: Tensor = b, tf32: bool = tf32) -> None:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.mm(a, b)

        contenders.append(Contender(name, call, lambda a=a: a, name))
    with section.part("int8 product"):
        ints = [torch.randint(-128, 127, (n, n), device=device, dtype=torch.int32).to(torch.int8) for _ in range(2)]
        right = ints[1].t()  # cuBLAS takes the second one transposed
        torch._int_mm(ints[0], right)
        contenders.append(Contender("int8", lambda: torch._int_mm(ints[0], right), lambda: ints[0], "int8"))
    size = 1 << (22 if section.dry else 31)
    x = torch.randint(0, 255, (size,), device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    contenders.append(Contender("copy", lambda: y.copy_(x), lambda: y, "copy"))
    times, failed = interleave(contenders, device, rounds=section.rounds, seconds=section.left - 5)
    for name, found in times.items():
        median = statistics.median(found)
        if name == "copy":
            section.figures["copy_gb_s"] = 2 * size / median / 1e9
        else:
            section.figures[f"{name}_tflops"] = flops / median / 1e12
    for name, why in failed.items():
        section.failed(name, why)
    torch.backends.cuda.matmul.allow_tf32 = False
    section.clocks("after products and copies")
    section.say(json.dumps({k: round(v, 1) for k, v in section.figures.items() if isinstance(v, float)}))


# ---- kernels

NUMPY_OF = {
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.uint8: "|u1",
    torch.int8: "|i1",
    torch.int16: "<u2",
    torch.int64: "<u8",
}


class Raw:
    """A torch tensor for dtypes that torch names in no array interface: int16 as uint16, int64 as uint64."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": NUMPY_OF[tensor.dtype],
            "data": (tensor.data_ptr(), False),
            "strides": tuple(s * tensor.element_size() for s in tensor.stride()),
            "version": 3,
            "stream": None,
        }


def shared(tensor: Tensor) -> Any:
    """What the kernels are given: the tensor itself, or one that says it is unsigned; NumPy arrays on the CPU."""
    unsigned = tensor.dtype in (torch.int16, torch.int64)
    if tensor.device.type == "cpu":
        array = tensor.numpy()
        return array.view(array.dtype.str.replace("i", "u")) if unsigned else array
    return Raw(tensor) if unsigned else tensor


@dataclass
class Case:
    """A kernel on one set of arrays: ``make(seed)`` gives a launcher; ``touched`` bytes are read and written by one."""

    name: str
    touched: int
    make: Callable[[int], Callable[[dict[str, Any]], object]]


def kernel_cases(device: str, dry: bool) -> Iterator[Case]:
    """As the pipeline calls them: 64 tiles of 572 px (388 kept) of the paper's network, and 16 of them."""
    tile, kept, step, side = (60, 20, 16, 2) if dry else (572, 388, 384, 8)

    def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype.is_floating_point:
            return torch.randn(*shape, device=device).to(dtype)
        high = {torch.uint8: 255, torch.int8: 127, torch.int16: 32767}[dtype]
        return torch.randint(0, high, shape, device=device, dtype=torch.int32).to(dtype)

    def grid(n: int, pitch: int, start: int = 0) -> np.ndarray:
        return np.array([[start + pitch * i, start + pitch * j] for i in range(n) for j in range(n)], np.int64)

    # gather: the window of a grid of overlapping tiles, mirrored 92 px (not a multiple of 16 bytes) at two edges
    margin = (tile - kept) // 2
    bytes_of = {torch.uint8: 1, torch.int16: 2, torch.float32: 4, torch.float16: 2}
    said = {torch.uint8: "uint8", torch.int16: "uint16", torch.float32: "float32", torch.float16: "float16"}
    for n, apart, what in ((side, tile, "side by side"), (side, step, "overlapping"), (side // 2, step, "overlapping")):
        for source, target in (
            (torch.uint8, torch.float32),
            (torch.uint8, torch.float16),
            (torch.int16, torch.float32),
            (torch.int16, torch.float16),
        ):
            if (apart == tile or n != side) and source == torch.int16:
                continue
            width = (n - 1) * apart + tile - margin
            starts = grid(n, apart, -margin)
            out_bytes = n * n * tile * tile * bytes_of[target]

            def gather(
                _: int,
                width: int = width,
                starts: np.ndarray = starts,
                source: torch.dtype = source,
                target: torch.dtype = target,
            ) -> Callable[[dict[str, Any]], object]:
                window = shared(rand(1, width, width, dtype=source))
                out = shared(torch.empty(len(starts), 1, tile, tile, device=device, dtype=target))
                return lambda options: kernels.tile_gather(window, starts, out, offset=31.7, divisor=57.3, **options)

            yield Case(
                f"tile_gather {said[source]} to {said[target]}, {n * n} tiles {what}",
                width * width * bytes_of[source] + out_bytes,
                gather,
            )

    # stitch and blend: cores of network outputs to their places in a band of the canvas
    kept_start = (kept - step) // 2
    for dtype in (torch.float16, torch.float32):
        for op, channels in (
            ("copy", 2),
            ("softmax", 2),
            ("sigmoid", 1),
            ("argmax", 2),
            ("threshold", 1),
            ("argmax", 5),
        ):
            n, label = side, op in ("argmax", "threshold")
            tables = (np.full((n * n, 2), kept_start), grid(n, step), np.full((n * n, 2), step))
            shape = (n * step, n * step) if op == "argmax" else (channels, n * step, n * step)
            item = bytes_of[dtype]
            written = math.prod(shape) * (1 if label else 4)

            def stitch(
                _: int,
                n: int = n,
                channels: int = channels,
                dtype: torch.dtype = dtype,
                op: Any = op,
                tables: Any = tables,
                shape: Any = shape,
            ) -> Callable[[dict[str, Any]], object]:
                tiles = shared(rand(n * n, channels, kept, kept, dtype=dtype))
                kind = torch.uint8 if op in ("argmax", "threshold") else torch.float32
                out = shared(torch.empty(shape, device=device, dtype=kind))
                bound = 0.0 if op == "threshold" else None
                return lambda options: kernels.tile_stitch(tiles, *tables, out, op=op, threshold=bound, **options)

            yield Case(
                f"tile_stitch {op}, {channels} x {said[dtype]}, {n * n} tiles",
                channels * (n * step) ** 2 * item + written,
                stitch,
            )
        tables = (np.zeros((side * side, 2), np.int64), grid(side, kept), np.full((side * side, 2), kept))
        area = (side * kept) ** 2

        def blend(_: int, dtype: torch.dtype = dtype, tables: Any = tables) -> Callable[[dict[str, Any]], object]:
            tiles = shared(rand(side * side, 2, kept, kept, dtype=dtype))
            weight = shared(rand(kept, kept).abs() + 0.1)
            total = shared(torch.zeros(2, side * kept, side * kept, device=device))
            weights = shared(torch.zeros(side * kept, side * kept, device=device))
            return lambda options: kernels.tile_blend(tiles, *tables, weight, total, weights, **options)

        yield Case(
            f"tile_blend, 2 x {said[dtype]}, {side * side} tiles",
            2 * area * bytes_of[dtype] + 4 * kept * kept + 2 * 3 * area * 4,
            blend,
        )

    wide = side * kept
    for op, written in (("argmax", 1), ("softmax", 8)):

        def finish(_: int, op: Any = op) -> Callable[[dict[str, Any]], object]:
            total, weights = shared(rand(2, wide, wide)), shared(rand(wide, wide).abs() + 0.1)
            shape = (wide, wide) if op == "argmax" else (2, wide, wide)
            kind = torch.uint8 if op == "argmax" else torch.float32
            out = shared(torch.empty(shape, device=device, dtype=kind))
            count = {} if device == "cpu" else {"uncovered": shared(torch.zeros(1, device=device, dtype=torch.int64))}
            return lambda options: kernels.blend_finish(total, weights, out, op=op, **count, **options)

        yield Case(f"blend_finish {op}, 2 channels", wide * wide * (3 * 4 + written), finish)

    # the first skip connection of the paper's network: 568 px cropped to 392, 64 + 64 channels
    s, u, c = (24, 16, 8) if dry else (568, 392, 64)
    for dtype, item in ((torch.float32, 4), (torch.float16, 2), (torch.int8, 1)):
        for layout in (torch.contiguous_format, torch.channels_last):
            n = 1 if dry else 4

            def concat(_: int, dtype: torch.dtype = dtype, layout: Any = layout, n: int = n) -> Any:
                skip = shared(rand(n, c, s, s, dtype=dtype).contiguous(memory_format=layout))
                up = shared(rand(n, c, u, u, dtype=dtype).contiguous(memory_format=layout))
                out = torch.empty(n, 2 * c, u, u, device=device, dtype=dtype).contiguous(memory_format=layout)
                kept_out = shared(out)
                return lambda options: kernels.crop_concat(skip, up, kept_out, **options)

            name = "channels last" if layout == torch.channels_last else "NCHW"
            yield Case(
                f"crop_concat {str(dtype).removeprefix('torch.')} {name}, batch {n}", 4 * c * u * u * n * item, concat
            )


def section_kernels(section: Section) -> None:
    """Each kernel against a copy of the same bytes, launched from Python and replayed from a CUDA graph."""
    for case in kernel_cases(section.device, section.dry):
        if case.name.startswith(section.without):
            continue
        if section.left < 8:
            section.failed(case.name, "no time was left")
            continue
        with section.part(case.name):
            section.add("rows", **measure_kernel(section, case))
            if not section.dry:
                torch.cuda.empty_cache()
    section.clocks("after the kernels")


def measure_kernel(section: Section, case: Case) -> dict[str, Any]:
    sets = 2 if section.dry else max(3, min(64, math.ceil(ROTATED_BYTES / case.touched)))
    launches = [case.make(k) for k in range(sets)]
    half = case.touched // 2
    sources = [torch.randint(0, 255, (half,), device=section.device, dtype=torch.uint8) for _ in range(sets)]
    targets = [torch.empty_like(s) for s in sources]
    options: dict[str, Any] = {}

    def all_kernels() -> None:
        for launch in launches:
            launch(options)

    def all_copies() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    row: dict[str, Any] = {"name": case.name, "bytes": case.touched, "sets": sets}
    if section.dry:
        passes: dict[str, Callable[[], object]] = {"kernel": all_kernels, "copy": all_copies}
        clock: Callable[[Callable[[], object]], float] = _wall
    else:
        stream = torch.cuda.Stream()
        options["stream"] = stream.cuda_stream
        torch.cuda.synchronize()  # the arrays are filled
        with torch.cuda.stream(stream):
            all_kernels()
            all_copies()
            stream.synchronize()
            passes = {"kernel": all_kernels, "copy": all_copies}
            for name, work in list(passes.items()):
                with section.part(f"{case.name}: {name} in a CUDA graph"):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=stream):
                        work()
                    passes[f"{name}_graph"] = graph.replay
        clock = functools.partial(_events, stream)
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(3 if section.dry else 12):
        for name, work in passes.items():
            spent = clock(work)
            if turn >= 2 or section.dry:
                times[name].append(spent / sets)
    us = {name: statistics.median(found) * 1e6 for name, found in times.items()}
    row |= {f"{name}_us": value for name, value in us.items()}
    row["share"] = us["copy"] / us["kernel"]
    row["gb_s"] = case.touched / us["kernel"] / 1e3
    if "kernel_graph" in us:
        copied = min(us[name] for name in ("copy", "copy_graph") if name in us)
        row |= {"share_graph": copied / us["kernel_graph"], "gb_s_graph": case.touched / us["kernel_graph"] / 1e3}
    return row


def _wall(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _events(stream: Any, work: Callable[[], object]) -> float:
    """Seconds on the device for one pass over all buffer sets, repeated for 5 ms at least."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for count in (1, 0):
            repeats = count or max(1, min(200, math.ceil(5 / max(begin.elapsed_time(end), 1e-3))))
            begin.record(stream)
            for _ in range(repeats):
                work()
            end.record(stream)
            end.synchronize()
    return begin.elapsed_time(end) / repeats / 1e3


# ---- engines


def section_build(section: Section, backend: str) -> None:
    reason = backends.get(backend).missing(section.device)
    if reason is not None:
        section.failed(f"build with {backend}", reason)
        return
    tries = 0
    for precision in ("fp32", "fp16") if section.dry else ("fp16", "int8", "fp32"):  # what matters most first
        for net in section.nets:
            known = backends.get(backend).precisions(section.device)
            if precision not in known:
                section.failed(f"build {net} {backend} {precision}", f"{backend} has {', '.join(known)} here")
                continue
            if section.left < 10:
                section.failed(f"build {net} {backend} {precision}", "no time was left")
                continue
            if tries >= 2 and not section.figures.get("built"):
                section.failed(f"build {net} {backend} {precision}", f"not tried: {backend} failed {tries} times here")
                continue
            tries += 1
            with section.part(f"build {net} {backend} {precision}"):
                build_one(section, net, backend, precision)
            if not section.dry:
                torch.cuda.empty_cache()


def section_engines(section: Section, name: str) -> None:
    """Tiles of a network through everything that can run it, interleaved, per batch size and tile."""
    tile = tile_px(name, section.dry)
    sizes = [(tile, b) for b in section.batches]
    if name == "nuclei":
        sizes = [(96, 1), (96, 2)] if section.dry else [(t, b) for t in (tile, 2 * tile) for b in (1, 16)]
    net = network(name, section.dry)
    device = section.device
    eager, half = net.module().to(device), half_module(net, device)
    last_channels = net.module().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    bare: dict[str, BareOnnxRuntime] = {}
    for label in BARE:
        if (section.dry and label != BARE[0]) or any(word in label for word in section.without):
            continue
        for graph in (False,) if section.dry else (True, False):
            with section.part(f"{label}, {'with' if graph else 'without'} CUDA graph"):
                bare[label] = bare_session(section, name, label, graph=graph)
                break
    sessions: dict[str, tuple[Made, Any, Any]] = {}
    for entry in made(section, name):
        with section.part(f"loading {entry.name}"):
            begun = time.perf_counter()
            engine, session = open_made(section, entry)
            sessions[entry.name] = (entry, engine, session)
            section.say(f"{entry.name} loaded in {time.perf_counter() - begun:.1f} s")

    def one_size(size: int, batch: int, key: int, share: float) -> None:
        x = batch_of(net, batch, size, device)
        contenders: list[Contender] = []

        def offer(label: str, make: Callable[[], Contender], to: list[Contender] = contenders, b: int = batch) -> None:
            """Makes a contender and runs it once; one that fails is recorded and left out."""
            begun = time.perf_counter()
            with section.part(f"{label}, batch {b}"):
                contender = make()
                contender.call()
                synchronize(device)
                contender.notes["first_s"] = round(time.perf_counter() - begun, 2)
                to.append(contender)

        first = eager_contender("eager FP32", eager, x, roof="fp32")
        offer("eager FP32", lambda c=first: c)
        tf32 = functools.partial(eager_contender, "eager TF32", eager, x, roof="tf32", tf32=True)
        offer("eager TF32", tf32)
        label = "autocast FP16 channels_last"
        xl = x.contiguous(memory_format=torch.channels_last)
        offer(label, functools.partial(eager_contender, label, last_channels, xl, roof="fp16", autocast=True))
        xh = half_input(x)
        label = "FP16 channels_last"
        offer(label, functools.partial(eager_contender, label, half, xh, roof="fp16"))
        label = "FP16 channels_last, cudnn.benchmark"
        offer(label, functools.partial(eager_contender, label, half, xh, roof="fp16", benchmark=True))
        if not section.dry and "CUDA graph" not in section.without:
            label = "FP16 channels_last, cudnn.benchmark, CUDA graph"
            offer(label, functools.partial(graph_contender, label, half, xh, roof="fp16"))
            torch.cuda.empty_cache()
        with torch.inference_mode():  # asked of no contender: any of them may have failed
            shape = tuple(net.module().to("meta")(torch.empty_like(x, device="meta")).shape)
        for label, library in list(bare.items()):
            roof = "fp16" if "FP16" in label else "fp32"
            made_one = functools.partial(library.contender, label, x, shape, roof, key)
            had = len(contenders)
            offer(label, made_one)
            if len(contenders) == had and library.graph:  # once more without the graph
                with section.part(f"{label}, without CUDA graph"):
                    plain = bare[label] = bare_session(section, name, label, graph=False)
                    offer(label, functools.partial(plain.contender, label, x, shape, roof, key))
        runs: list[DeviceRun] = []
        for label, (entry, _, session) in sessions.items():

            def ours(entry: Made = entry, session: Any = session, label: str = label) -> Contender:
                run = DeviceRun(section, session, x)
                runs.append(run)
                return Contender(label, run.call, run.result, entry.precision, {"kind": entry.kind, "note": entry.note})

            offer(label, ours)
        report_contenders(section, name, net, size, batch, contenders, share)
        for run in runs:
            run.free()
        contenders.clear()
        if not section.dry:
            torch.cuda.empty_cache()
        section.clocks(f"after tile {size}, batch {batch}")

    for k, (size, batch) in enumerate(sizes):
        if section.left < 10:
            section.failed(f"{name}, tile {size}, batch {batch}", "no time was left")
            continue
        with section.part(f"{name}, tile {size}, batch {batch}"):
            one_size(size, batch, k + 1, section.left / (len(sizes) - k))


def report_contenders(
    section: Section, name: str, net: paper_net.Net, size: int, batch: int, contenders: list[Contender], seconds: float
) -> None:
    """Times contenders in turns, holds their labels against the first one's that ran, adds a row for each."""
    times, failed = interleave(
        contenders,
        section.device,
        rounds=2 if section.dry else section.rounds,
        seconds=seconds,
        sample_s=0.001 if section.dry else SAMPLE_S,
    )
    for label, why in failed.items():
        section.failed(f"{name}, batch {batch}: {label}", why)
    ran = [c for c in contenders if c.name in times]
    baseline: Tensor | None = None
    if ran:
        with section.part(f"{name}, batch {batch}: labels to hold others against"):
            baseline = ran[0].result().float()
    flops = flops_of(net.checkpoint, size)
    for contender in ran:
        figures = spread(times[contender.name])
        with section.part(f"labels of {contender.name}"):
            if baseline is not None:
                result = contender.result().float()
                figures["label_agreement"] = float((result.argmax(1) == baseline.argmax(1)).double().mean())
                figures["max_abs_error"] = float((result - baseline).abs().max())
                figures["held_against"] = ran[0].name
        per_tile = statistics.median(times[contender.name]) / batch
        section.add(
            "rows",
            name=contender.name,
            tile=size,
            batch=batch,
            tiles_per_s=1 / per_tile,
            tflops=flops / per_tile / 1e12,
            roof=contender.roof,
            **figures,
            **contender.notes,
        )


def section_compile(section: Section, mode: str) -> None:
    """torch.compile of the FP16 module, beside eager FP16 and the fastest engine, in one interleaved run."""
    name, device = "paper", section.device
    net, tile = network(name, section.dry), tile_px(name, section.dry)
    eager, half = net.module().to(device), half_module(net, device)
    least = 170 if mode == "max-autotune" else 40  # it took 130 to 150 s, and 4 to 9, on an H200
    for batch in [b for b in (16, 1, 4) if b in section.batches]:
        if section.left < least and not section.dry:
            section.failed(f"{mode}, batch {batch}", f"{section.left:.0f} s were left")
            continue
        x = batch_of(net, batch, tile, device)
        xh = half_input(x)
        contenders = [eager_contender("eager FP32", eager, x, roof="fp32")]
        label = "FP16 channels_last, cudnn.benchmark"
        contenders.append(eager_contender(label, half, xh, roof="fp16", benchmark=True))
        with section.part(f"compile {mode}, batch {batch}"):
            torch._dynamo.reset()
            how: dict[str, Any] = {"backend": "eager"} if section.dry else {"mode": mode}
            compiled = torch.compile(half, dynamic=False, **how)
            begun = time.perf_counter()
            label = f"torch.compile FP16 channels_last, {mode}"
            contender = eager_contender(label, compiled, xh, roof="fp16", benchmark=True)
            contender.call()
            synchronize(device)
            contender.notes["compile_s"] = time.perf_counter() - begun
            contenders.append(contender)
        for entry in made(section, name):
            if entry.precision == "fp16" or section.dry:
                with section.part(f"loading {entry.name}"):
                    run = DeviceRun(section, open_made(section, entry)[1], x)
                    contenders.append(Contender(entry.name, run.call, run.result, entry.precision))
        report_contenders(section, name, net, tile, batch, contenders, max(10.0, section.left / 3))
        section.clocks(f"after batch {batch}")


# ---- end to end


def section_predict(section: Section, name: str) -> None:
    """Host image to host mask, and a CUDA tensor to a CUDA tensor, against the engine's own time for the same tiles."""
    net = network(name, section.dry)
    best = [m for m in made(section, name) if m.kind == "engine"]
    order = {"fp16": 0, "int8": 1, "fp32": 2}
    best.sort(key=lambda m: order[m.precision])
    if not best:
        section.failed(f"{name} end to end", "no engine was built")
        return
    sides = (260, 320) if section.dry else (4096, 16384)
    for entry in best:
        if section.left < 20 and not section.dry:
            section.failed(f"{entry.name} end to end", "no time was left")
            continue
        with section.part(f"{entry.name} end to end"):
            engine, session = open_made(section, entry)
            spent = 0.0
            for side in sides:
                if side == sides[1] and not section.dry and 16 * spent > section.left - 10:
                    section.failed(f"{entry.name}, {side} x {side} px", f"{16 * spent:.0f} s would be needed")
                    continue
                begun = time.perf_counter()
                with section.part(f"{entry.name}, {side} x {side} px"):
                    end_to_end(section, net, entry, engine, session, side)
                spent = time.perf_counter() - begun
            engine.close()


def end_to_end(section: Section, net: paper_net.Net, entry: Made, engine: Any, session: Any, side: int) -> None:
    """One image size, in turns: normalised by its own statistics (as the network declares) or by declared numbers, which
    need no pass over the image before the first tile; and, with the latter, a CUDA tensor that stays on its device."""
    device, pixels = section.device, drawn(side)
    begun = time.perf_counter()
    numbers = numbers_of(net, pixels)
    statistics_s = time.perf_counter() - begun
    own = engine.spec
    mean, std = (tuple(float(n) for n in values) for values in (numbers.offset, numbers.divisor))
    fixed = replace(own, contract=replace(own.contract, normalization=Normalization("fixed", mean=mean, std=std)))
    tensor = None if section.dry else torch.from_numpy(pixels).to(device)
    last: dict[str, Any] = {}
    reports: dict[str, list[RunReport]] = {"own": [], "fixed": []}

    def host(name: str) -> None:
        engine.spec = own if name == "own" else fixed
        last[name] = np.asarray(urt.predict(engine, pixels, report=reports[name].append))

    def stays() -> None:  # without a report: it would count labels on the host
        engine.spec = fixed
        last["device"] = urt.predict(engine, tensor)
        synchronize(device)

    ways: dict[str, Callable[[], None]] = {k: functools.partial(host, k) for k in ("fixed", "own")}
    if tensor is not None:
        ways["device"] = stays
    times: dict[str, list[float]] = {}
    for turn in range(2 if section.dry else 4):
        for name, work in list(ways.items()):
            try:
                spent = _wall(work)
            except Exception as error:  # noqa: BLE001 - recorded; the others go on
                section.failed(f"{entry.name}, {side} x {side} px, {name}", error)
                del ways[name]
                continue
            if turn:
                times.setdefault(name, []).append(spent)
    engine.spec = own
    report = (reports["fixed"] or reports["own"])[-1]
    batch = report.batch
    # the engine alone: the same number of tiles, in the batches of the run
    x = batch_of(net, batch, max(report.tile), device)[:, :, : report.tile[0], : report.tile[1]]
    run = DeviceRun(section, session, x.contiguous())
    alone, failed = interleave(
        [Contender("engine", run.call, run.result, entry.precision)],
        device,
        rounds=5,
        seconds=10,
        sample_s=0.001 if section.dry else 0.1,
    )
    run.free()
    if failed:
        section.failed(f"{entry.name}: engine alone", failed["engine"])
    engine_s = statistics.median(alone["engine"]) / batch * report.tiles if alone else math.nan
    row: dict[str, Any] = {"engine": entry.name, "side": side, "engine_s": engine_s, "statistics_s": statistics_s}
    for name, found in times.items():
        median = statistics.median(found)
        row[f"{name}_s"], row[f"{name}_low_s"], row[f"{name}_high_s"] = median, min(found), max(found)
        row[f"{name}_ratio"] = median / engine_s
        row[f"{name}_mpx_per_s"] = side * side / median / 1e6
    row |= {
        "tile": list(report.tile),
        "tiles": report.tiles,
        "batch": batch,
        "stages": report.stages,
        "notes": list(report.notes),
    }
    with section.part(f"labels of {entry.name}, {side} x {side} px"):
        mask = last["own"]
        row["changed_labels"], row["labels_compared"] = changed_labels(net, pixels, numbers, mask, device)
        row["foreground"] = float((mask != 0).mean())
        row["fixed_equal"] = bool(np.array_equal(last["fixed"], mask))
        if "device" in last:
            row["device_result"] = type(last["device"]).__name__
            back = torch.as_tensor(last["device"], device=device).cpu().numpy()
            row["device_equal"] = bool(np.array_equal(back, last["fixed"]))
    section.add("rows", **row)
    section.clocks(f"after {side} x {side} px")


def changed_labels(
    net: paper_net.Net, pixels: np.ndarray, numbers: Any, mask: np.ndarray, device: str
) -> tuple[float, int]:
    """Share of labels that eager FP32 on one large window changes; and how many were compared.

    The window begins at a multiple of the network's stride on the canvas (the canvas of an unpadded network begins
    ``margin`` pixels outside the image), lies inside the image, and of a padded network only what is further than its
    reach from the window's edge is compared.
    """
    module = net.module().to(device)
    spec = module.spec
    valid = spec.padding == "valid"
    side = len(pixels)
    stride = 2**spec.depth
    if valid:
        size = spec.size_at_least(min(1536, side - 2 * stride) - 40)
        while size > side:
            size = spec.size_at_least(size - 2 * stride)
        margin = (size - spec.out_size(size)) // 2
        # On the canvas the image begins at `margin`, so that a tile from image pixel y has origin y + margin.
        first = (side - size) // 2
        first -= (first + margin) % stride
        first += stride if first < 0 else 0
    else:
        margin = 128 if side > 512 else 64
        size = min(1536, side) // stride * stride
        first = (side - size) // 2 // stride * stride
    window = normalised(pixels[None, first : first + size, first : first + size], numbers)[None]
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        truth = module(torch.from_numpy(window).to(device))[0].argmax(0).to(torch.uint8).cpu().numpy()
    inner = slice(None) if valid else slice(margin, size - margin)
    start = first + margin
    truth = truth[inner, inner]
    found = mask[start : start + len(truth), start : start + len(truth)]
    return float((found != truth).mean()), truth.size


def section_repeat(section: Section) -> None:
    """Small predictions, many times: device memory and resident memory before and after."""
    count, name = (4, "nuclei") if section.dry else (1000, "nuclei")
    entries = [m for m in made(section, name) if m.kind == "engine"]
    pixels = drawn(256 if section.dry else 1024)[:256, :256]
    for entry in entries:
        if section.left < 8:
            section.failed(f"{entry.name}, repeated", "no time was left")
            continue
        with section.part(f"{entry.name}, repeated"):
            engine, _ = open_made(section, entry)
            for _ in range(2 if section.dry else 20):
                first = np.asarray(urt.predict(engine, pixels))
            synchronize(section.device)
            free, rss = _free_bytes(section), limits.rss_bytes()
            begun, done = time.perf_counter(), 0
            for _ in range(count):
                last = np.asarray(urt.predict(engine, pixels))
                done += 1
                if section.left < 5:
                    break
            spent = time.perf_counter() - begun
            section.add(
                "rows",
                engine=entry.name,
                runs=done,
                ms=spent / done * 1e3,
                device_grown_bytes=free - _free_bytes(section),
                resident_grown_bytes=limits.rss_bytes() - rss,
                same=bool(np.array_equal(first, last)),
            )
            engine.close()


def _free_bytes(section: Section) -> int:
    return 0 if section.dry else int(torch.cuda.mem_get_info()[0])


# ------------------------------------------------------------------------------------------------------- orchestration

# OpenVINO has no CUDA devices. The last one was refused by one of the cards at hand: it may not keep the others waiting.
GPU_BACKENDS = sorted((n for n in backends.names() if n != "openvino"), key=lambda n: (n == "tensorrt", n))

SECTIONS: dict[str, tuple[Callable[[Section], None], float]] = {  # function and most seconds
    "machine": (section_machine, 60),
    "prepare": (section_prepare, 120),
    "roof": (section_roof, 40),
    "kernels": (section_kernels, 75),
    **{f"build-{name}": (functools.partial(section_build, backend=name), 130) for name in GPU_BACKENDS},
    "paper": (functools.partial(section_engines, name="paper"), 150),
    "predict-paper": (functools.partial(section_predict, name="paper"), 70),
    "compile-default": (functools.partial(section_compile, mode="default"), 90),
    "nuclei": (functools.partial(section_engines, name="nuclei"), 80),
    "predict-nuclei": (functools.partial(section_predict, name="nuclei"), 60),
    "repeat": (section_repeat, 40),
    "compile-max": (functools.partial(section_compile, mode="max-autotune"), 400),
}


def run_section(section: Section) -> None:
    """A section in this process; whatever it raises is recorded."""
    begun = time.time()
    section.say(f"begins, {section.left:.0f} s at most")
    try:
        if not section.dry:
            if (why := machine.cuda().missing) is not None:
                section.figures["no_device"] = why
                section.say(f"no device: {why}")
                return
            torch.cuda.init()
        SECTIONS[section.name][0](section)
        section.figures.pop("doing", None)
    except DeviceLost as lost:
        section.figures["doing"] = str(lost)
        section.say(f"the device no longer answers after: {lost}")
        raise SystemExit(70) from lost
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the record
        section.figures.setdefault("failed", []).append(
            {"what": section.name, "why": f"{type(error).__name__}: {error}"}
        )
        traceback.print_exception(error, file=sys.stdout)
    finally:
        section.figures["seconds"] = round(time.time() - begun, 1)
        section.save()
        section.say(f"ends after {section.figures['seconds']} s")


def child(args: argparse.Namespace, name: str, limit: float, without: Sequence[str]) -> tuple[int, str]:
    """Runs a section in a process of its own: (return code, what the parent has to say about it)."""
    command = [sys.executable, "-u", str(Path(__file__).resolve()), "--section", name, "--work", str(args.work)]
    command += ["--limit", str(limit), "--batches", args.batches, "--rounds", str(args.rounds)]
    command += ["--nets", args.nets, "--without", ",".join(without)] + (["--dry-run"] if args.dry_run else [])
    # of its own group: what it started (compilers, autotuners) ends with it
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=limit + 10), ""
    except subprocess.TimeoutExpired:
        return -1, f"stopped after {limit + 10:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def collect(args: argparse.Namespace, name: str, notes: Sequence[str]) -> dict[str, Any]:
    path = args.work / f"section-{name}.json"
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if notes:
        figures["ended"] = "; ".join(notes)
    return figures


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sections asked for, each within what is left of the time; the JSON is written after each."""
    chosen = [name for name in SECTIONS if not args.only or any(_meant(name, w) for w in args.only.split(","))]
    chosen = [name for name in chosen if not any(_meant(name, w) for w in args.skip.split(",") if w)]
    begun = time.time()
    results: dict[str, Any] = {}
    for name in chosen:
        left = args.seconds - (time.time() - begun)
        limit = min(SECTIONS[name][1], left - 12)
        if limit < 5:
            results[name] = {"ended": f"not begun: {left:.0f} s were left of {args.seconds}"}
            continue
        notes: list[str] = []
        if args.in_process:
            run_section(_section(args, name, limit, ()))
        else:
            without: list[str] = []
            for _ in range(3):
                left = args.seconds - (time.time() - begun)
                if without and left < 40:
                    break
                code, note = child(args, name, min(limit, left - 12), without)
                if code == 0 or note:
                    notes += [note] if note else []
                    break
                found = collect(args, name, ())
                doing = str(found.get("doing", ""))
                notes.append(
                    f"ended with {code} in: {doing}; " + "; ".join(f["why"][:300] for f in found.get("failed", [])[-1:])
                )
                guilty = next((word for word in SUSPECTS if word in doing and word not in without), None)
                if guilty is None:
                    break
                without.append(guilty)
                notes.append(f"run again without {guilty}")
        results[name] = collect(args, name, notes)
        write(args, results)
    return results


# What can be left out of a section that it ended, in the order of suspicion.
SUSPECTS = (
    *GPU_BACKENDS,
    "fused bias",
    "bare",
    "CUDA graph",
    "tile_gather",
    "tile_stitch",
    "tile_blend",
    "blend_finish",
    "crop_concat",
)


def _meant(name: str, word: str) -> bool:
    return name == word or name.startswith(word + "-")


def _section(args: argparse.Namespace, name: str, limit: float, without: Sequence[str]) -> Section:
    batches = (1, 2) if args.dry_run else tuple(int(b) for b in args.batches.split(","))
    deadline = time.time() + limit
    return Section(
        name, args.dry_run, args.work, deadline, tuple(without), batches, args.rounds, tuple(args.nets.split(","))
    )


def write(args: argparse.Namespace, results: dict[str, Any]) -> Path:
    figures: dict[str, Any] = {"dry_run": args.dry_run, "sections": results}
    if args.commit:
        figures["commit"] = args.commit
    name = "gpu-dry-run" if args.dry_run else "gpu"
    return record.write(name, figures, args.out)


# --------------------------------------------------------------------------------------------------------------- tables


WAYS = {
    "fixed": "host to host, declared numbers",
    "own": "host to host, the image's own statistics",
    "device": "CUDA tensor to CUDA tensor, declared numbers",
}


def tables(results: dict[str, Any]) -> str:
    """Everything worth reading, as text; sections without figures say why."""
    lines: list[str] = []
    roof = results.get("roof", {})
    lines.append("== roof: " + ", ".join(f"{k} {v:.1f}" for k, v in roof.items() if k.endswith(("_tflops", "gb_s"))))
    rows = results.get("kernels", {}).get("rows", [])
    if rows:
        lines.append(
            "== kernels (share of copy bandwidth on the same bytes: launched from Python | replayed from a graph)"
        )
    for r in rows:
        graph = f"{r['share_graph']:6.2f} {r['gb_s_graph']:7.0f} GB/s" if "share_graph" in r else ""
        lines.append(f"  {r['name']:58s} {r['kernel_us']:9.1f} us  {r['share']:6.2f} | {graph}")
    for name in ("paper", "nuclei", "compile-default", "compile-max"):
        rows = results.get(name, {}).get("rows", [])
        for key in dict.fromkeys((r["tile"], r["batch"]) for r in rows):
            lines.append(f"== {name}: tile {key[0]} px, batch {key[1]}")
            group = [r for r in rows if (r["tile"], r["batch"]) == key]
            slowest = next((r["median_ms"] for r in group if r["name"] == "eager FP32"), math.nan)
            for r in group:
                peak = roof.get(f"{r['roof']}_tflops")
                share = f"{r['tflops'] / peak:5.1%} of {r['roof']}" if peak else ""
                other = r.get("held_against", "eager FP32")
                lines.append(
                    f"  {r['name']:48s} {r['median_ms']:9.3f} ms ({r['low_ms']:.3f} to {r['high_ms']:.3f})"
                    f" {r['tiles_per_s']:8.1f} tiles/s {slowest / r['median_ms']:6.2f} x  {r['tflops']:6.1f} TFLOP/s"
                    f" {share}  labels equal {r.get('label_agreement', math.nan):.4%}"
                    + (f" to {other}" if other != "eager FP32" else "")
                )
    for name in ("predict-paper", "predict-nuclei"):
        for r in results.get(name, {}).get("rows", []):
            lines.append(
                f"== {name}: {r['engine']}, {r['side']} px: {r['tiles']} tiles of {r['tile']}, {r['batch']} per run; engine "
                f"alone {r['engine_s']:.3f} s, statistics {r['statistics_s']:.3f} s; labels changed "
                f"{r.get('changed_labels', math.nan):.5%} of {r.get('labels_compared', 0):,}; stages {r['stages']}"
            )
            for way, said in WAYS.items():
                if f"{way}_s" in r:
                    lines.append(
                        f"     {said:44s} {r[f'{way}_s']:8.3f} s ({r[f'{way}_low_s']:.3f} to {r[f'{way}_high_s']:.3f}), "
                        f"{r[f'{way}_mpx_per_s']:7.0f} Mpx/s, {r[f'{way}_ratio']:.3f} of the engine alone"
                        + (f", equal to the first: {r[f'{way}_equal']}" if f"{way}_equal" in r else "")
                    )
    for r in results.get("repeat", {}).get("rows", []):
        lines.append(
            f"== repeat: {r['engine']}: {r['runs']} runs of {r['ms']:.2f} ms, device memory grew by "
            f"{r['device_grown_bytes']:,} bytes, resident by {r['resident_grown_bytes']:,}; same result: {r['same']}"
        )
    for name, figures in results.items():
        for built in figures.get("built", []):
            lines.append(
                f"== built {built['net']} {built['backend']} {built['precision']}: {built['kind']}, "
                f"{built['seconds']:.1f} s {built['note'][:120]}"
            )
        if "no_device" in figures:
            lines.append(f"== {name}: no device: {figures['no_device']}")
        if "ended" in figures:
            lines.append(f"== {name}: {figures['ended']}")
        for failure in figures.get("failed", []):
            lines.append(f"!! {name}: {failure['what']}: {failure['why'][:400]}")
    seconds = ", ".join(f"{name} {f.get('seconds', '?')}" for name, f in results.items())
    return "\n".join([*lines, f"== seconds: {seconds}"])


def parser() -> argparse.ArgumentParser:
    made_parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made_parser.add_argument("--only", default="", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    made_parser.add_argument("--skip", default="")
    made_parser.add_argument("--seconds", type=float, default=560, help="for everything")
    made_parser.add_argument("--batches", default="1,4,16", help="of the paper's network")
    made_parser.add_argument("--rounds", type=int, default=7)
    made_parser.add_argument("--nets", default=",".join(NETS), help="for which engines are built")
    made_parser.add_argument("--out", type=Path)
    made_parser.add_argument("--work", type=Path, help="folder for engines; kept, so that a later call finds them")
    made_parser.add_argument("--commit", default="", help="what is measured, where there is no checkout to ask")
    made_parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny: figures mean nothing")
    made_parser.add_argument("--in-process", action="store_true", help="sections in this process, without isolation")
    made_parser.add_argument("--section", help=argparse.SUPPRESS)
    made_parser.add_argument("--limit", type=float, default=60, help=argparse.SUPPRESS)
    made_parser.add_argument("--without", default="", help=argparse.SUPPRESS)
    return made_parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parser().parse_args(argv)
    if args.section:
        run_section(_section(args, args.section, args.limit, [w for w in args.without.split(",") if w]))
        return {}
    with contextlib.ExitStack() as stack:
        if args.work is None:
            args.work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unet-rt-gpu-")))
        args.work.mkdir(parents=True, exist_ok=True)
        results = measure(args)
        path = write(args, results)
    print(tables(results))
    print(path, flush=True)
    return results


if __name__ == "__main__":
    main()
