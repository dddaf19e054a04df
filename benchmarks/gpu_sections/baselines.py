"""What unet-rt is held against: PyTorch eager, in half precision and in CUDA graphs; ONNX Runtime used directly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paper_net
import torch
from torch import Tensor, nn

from .pixels import network
from .section import Section
from .timing import Contender


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
