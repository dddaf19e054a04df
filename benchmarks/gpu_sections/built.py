"""Engines of unet-rt: built by sections of their own, found and run with arrays on the device by the others."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paper_net
import torch
from torch import Tensor

import unet_rt as urt
from unet_rt import backends

from .pixels import drawn, network, tile_px
from .section import Section, synchronize

PRECISIONS = ("fp32", "fp16", "int8")


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
    settings: dict[str, Any] | None = None  # of a direct one, as its backend measured them

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
    section.add("built", **{k: v for k, v in vars(entry).items() if k not in ("path", "settings")})


def build_direct(
    section: Section, net: paper_net.Net, net_name: str, backend: str, precision: str, fixed: dict[str, Any]
) -> Made:
    module = backends.get(backend)
    graph = section.work / f"{net_name}-{backend}-{precision}.onnx"
    options = accepted(module.build, blob=graph.with_suffix(".engine"), **fixed)
    begun = time.perf_counter()
    settings = module.build(net.onnx, graph, precision=precision, device=section.device, **options)
    seconds, note = time.perf_counter() - begun, "without its proof"
    return Made(net_name, backend, precision, "direct", str(graph), seconds, note, settings)


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
    options = accepted(module.load, blob=blob if blob.exists() else None, settings=entry.settings)
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
