"""Tiles through everything that can run a network, in turns: engines of unet-rt, eager, compiled, bare libraries."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paper_net
import torch
from torch import Tensor, nn

from .baselines import (
    BARE,
    BareOnnxRuntime,
    bare_session,
    eager_contender,
    graph_contender,
    half_input,
    half_module,
)
from .built import DeviceRun, Made, made, open_made
from .pixels import batch_of, flops_of, network, tile_px
from .section import Section, synchronize
from .timing import SAMPLE_S, Contender, interleave, spread


@dataclass
class Field:
    """All that can run a network, opened once for every size; ``bare`` and ``sessions`` hold what could be opened."""

    section: Section
    name: str
    net: paper_net.Net
    eager: nn.Module
    half: nn.Module
    last_channels: nn.Module
    bare: dict[str, BareOnnxRuntime] = field(default_factory=dict)
    sessions: dict[str, tuple[Made, Any]] = field(default_factory=dict)


@dataclass
class Heat:
    """The contenders at one size, tiles (N, 1, tile, tile) before them; ``runs`` hold arrays to be freed."""

    section: Section
    x: Tensor
    contenders: list[Contender] = field(default_factory=list)
    runs: list[DeviceRun] = field(default_factory=list)

    def offer(self, label: str, make: Callable[[], Contender]) -> bool:
        """Makes a contender and runs it once; one that fails is recorded and left out."""
        begun, had = time.perf_counter(), len(self.contenders)
        with self.section.part(f"{label}, batch {len(self.x)}"):
            contender = make()
            contender.call()
            synchronize(self.section.device)
            contender.notes["first_s"] = round(time.perf_counter() - begun, 2)
            self.contenders.append(contender)
        return len(self.contenders) > had


def section_engines(section: Section, name: str) -> None:
    """Tiles of a network through everything that can run it, interleaved, per batch size and tile."""
    tile = tile_px(name, section.dry)
    sizes = [(tile, b) for b in section.batches]
    if name == "nuclei":
        sizes = [(96, 1), (96, 2)] if section.dry else [(t, b) for t in (tile, 2 * tile) for b in (1, 16)]
    rivals = open_field(section, name)
    for k, (size, batch) in enumerate(sizes):
        if section.left < 10:
            section.failed(f"{name}, tile {size}, batch {batch}", "no time was left")
            continue
        with section.part(f"{name}, tile {size}, batch {batch}"):
            measure_size(rivals, size, batch, k + 1, section.left / (len(sizes) - k))


def open_field(section: Section, name: str) -> Field:
    """Modules of PyTorch, sessions of ONNX Runtime used directly, engines that were built."""
    net, device = network(name, section.dry), section.device
    eager, half = net.module().to(device), half_module(net, device)
    last_channels = net.module().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = Field(section, name, net, eager, half, last_channels)
    for label in BARE:
        if (section.dry and label != BARE[0]) or any(word in label for word in section.without):
            continue
        for graph in (False,) if section.dry else (True, False):
            with section.part(f"{label}, {'with' if graph else 'without'} CUDA graph"):
                found.bare[label] = bare_session(section, name, label, graph=graph)
                break
    for entry in made(section, name):
        with section.part(f"loading {entry.name}"):
            begun = time.perf_counter()
            found.sessions[entry.name] = (entry, open_made(section, entry))
            section.say(f"{entry.name} loaded in {time.perf_counter() - begun:.1f} s")
    return found


def measure_size(rivals: Field, size: int, batch: int, key: int, share: float) -> None:
    """One size of tile and batch: everybody in turns, for ``share`` seconds; ``key`` names its CUDA graphs."""
    section = rivals.section
    heat = Heat(section, batch_of(rivals.net, batch, size, section.device))
    offer_eager(rivals, heat)
    offer_bare(rivals, heat, key)
    offer_engines(rivals, heat)
    report_contenders(section, rivals.name, rivals.net, size, batch, heat.contenders, share)
    for run in heat.runs:
        run.free()
    heat.contenders.clear()
    if not section.dry:
        torch.cuda.empty_cache()
    section.clocks(f"after tile {size}, batch {batch}")


def offer_eager(rivals: Field, heat: Heat) -> None:
    """PyTorch in FP32, TF32, autocast and FP16; the first one is what the others' labels are held against."""
    x, xh = heat.x, half_input(heat.x)
    xl = x.contiguous(memory_format=torch.channels_last)
    for label, module, given, options in (
        ("eager FP32", rivals.eager, x, {"roof": "fp32"}),
        ("eager TF32", rivals.eager, x, {"roof": "tf32", "tf32": True}),
        ("autocast FP16 channels_last", rivals.last_channels, xl, {"roof": "fp16", "autocast": True}),
        ("FP16 channels_last", rivals.half, xh, {"roof": "fp16"}),
        ("FP16 channels_last, cudnn.benchmark", rivals.half, xh, {"roof": "fp16", "benchmark": True}),
    ):
        heat.offer(label, functools.partial(eager_contender, label, module, given, **options))
    if not heat.section.dry and "CUDA graph" not in heat.section.without:
        label = "FP16 channels_last, cudnn.benchmark, CUDA graph"
        heat.offer(label, functools.partial(graph_contender, label, rivals.half, xh, roof="fp16"))
        torch.cuda.empty_cache()


def offer_bare(rivals: Field, heat: Heat, key: int) -> None:
    """ONNX Runtime used directly; where its CUDA graph fails, once more without, and from then on."""
    section, x = heat.section, heat.x
    with torch.inference_mode():  # asked of no contender: any of them may have failed
        shape = tuple(rivals.net.module().to("meta")(torch.empty_like(x, device="meta")).shape)
    for label, library in list(rivals.bare.items()):
        roof = "fp16" if "FP16" in label else "fp32"
        ran = heat.offer(label, functools.partial(library.contender, label, x, shape, roof, key))
        if not ran and library.graph:
            with section.part(f"{label}, without CUDA graph"):
                plain = rivals.bare[label] = bare_session(section, rivals.name, label, graph=False)
                heat.offer(label, functools.partial(plain.contender, label, x, shape, roof, key))


def offer_engines(rivals: Field, heat: Heat) -> None:
    """Engines of unet-rt, tiles and results on the device."""
    for label, (entry, (_, session)) in rivals.sessions.items():

        def ours(entry: Made = entry, session: Any = session, label: str = label) -> Contender:
            run = DeviceRun(heat.section, session, heat.x)
            heat.runs.append(run)
            return Contender(label, run.call, run.result, entry.precision, {"kind": entry.kind, "note": entry.note})

        heat.offer(label, ours)


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
