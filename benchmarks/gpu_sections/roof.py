"""Sections before anything is timed in earnest: the machine, networks made once, the largest rates it reaches."""

from __future__ import annotations

import json
import statistics
import time

import torch
from torch import Tensor

from unet_rt import backends
from unet_rt.kernels import native
from unet_rt.system import facts

from .baselines import fp16_onnx
from .pixels import batch_of, flops_of, network, tile_px
from .section import Section, smi
from .timing import Contender, interleave


def section_machine(section: Section) -> None:
    names = (
        "torch numpy onnx onnxruntime onnxruntime-gpu pycuda cupy-cuda13x cupy-cuda12x cupy triton tensorrt tensorrt-cu13 "
        "tensorrt-rtx tensorrt-rtx-cu13 tensorrt-lean-cu13 nvidia-cudnn-cu13 nvidia-cublas cuda-python"
    )
    found = {name: facts.package_version(name) for name in names.split()}
    figures = section.figures
    figures["versions"] = {name: version for name, version in found.items() if version is not None}
    figures["cuda_kernels"] = native.cuda_status()
    figures["torch_cuda"] = torch.version.cuda
    with section.part("cuDNN's version"):
        figures["cudnn"] = torch.backends.cudnn.version()
    figures["smi"] = smi()
    figures["driver_says"] = vars(facts.cuda())
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
