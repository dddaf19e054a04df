"""The cuDNN backend: what becomes of a graph, and the session.

Without a GPU the session runs on a device made of host memory (``host_device``): its kernels are the bodies of the CUDA
kernels where ``unet_rt._cuda_host`` was built, or what nvcc makes of them, interpreted; the convolutions are computed here
from what cuDNN would be given.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host_device
import numpy as np
import onnx
import onnxruntime
import ptx
import pytest
from device_kernels import Interpreter
from host_device import HostDevice, host
from onnx import TensorProto, helper, numpy_helper

import unet_rt
from unet_rt import backends, kernels
from unet_rt.backends import cudnn, cudnn_api, cudnn_plan, cudnn_session
from unet_rt.backends.cudnn_plan import Combine, Convolve, First, Head, Pool, Refused, Resize, compile_plan, read
from unet_rt.device import DeviceMemoryError
from unet_rt.errors import BackendError
from unet_rt.synthetic import microscopy

Array = np.ndarray[Any, np.dtype[Any]]

DATA = Path(unet_rt.__file__).parent / "data"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"
NUCLEI = DATA / "nuclei.onnx"


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.fixture(scope="session")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained valid-padded network of width 8: crops, 4 poolings, transposed convolutions."""
    torch = pytest.importorskip("torch")
    from unet_rt import models
    from unet_rt.export import export

    network = models.load_half(DATA / "paper_w8.npz").eval()
    from unet_rt.contract import Contract

    contract = Contract.from_json(json.loads((DATA / "paper_w8.json").read_text())["contract"])
    path = tmp_path_factory.mktemp("paper") / "paper.onnx"
    with torch.no_grad():
        export(network, path, contract=contract, sizes=[188, 204])
    return path


def network(name: str, request: pytest.FixtureRequest) -> Path:
    if name == "paper":
        found: Path = request.getfixturevalue("paper")
        return found
    path = {"nuclei": NUCLEI, "bioimage": SHARED / "nuclei" / "weights.onnx", "strain": SHARED / "strain" / "unet.onnx"}
    if not path[name].exists():
        pytest.skip(f"{path[name]} is not here")
    return path[name]


def model(nodes: Sequence[Any], shape: Sequence[int | str], weights: dict[str, Array], opset: int = 18) -> Any:
    """A graph from ``x`` to ``y``."""
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def f32(values: Any) -> Array:
    return np.asarray(values, np.float32)


def i64(values: Any) -> Array:
    return np.asarray(values, np.int64)


def drawn(seed: int, *shape: int) -> Array:
    """Weights as trained ones are: deviation sqrt(2 / fan-in)."""
    rng = np.random.default_rng(seed)
    fan = int(np.prod(shape[1:])) or 1
    return f32(rng.standard_normal(shape) * (2 / fan) ** 0.5)


def tile(batch: int, channels: int, y: int, x: int) -> Array:
    """Pixels of cells, normalised; every image another window."""
    image = microscopy((y + 16, x + 16), seed=3).image.astype(np.float32)
    image = (image - image.mean()) / image.std()
    rows = [image[k % 16 : k % 16 + y, (5 * k) % 16 : (5 * k) % 16 + x] for k in range(batch * channels)]
    return np.stack(rows).reshape(batch, channels, y, x)


def expected(path_or_model: Any, x: Array) -> list[Array]:
    """ONNX Runtime in float32 on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(path_or_model) if isinstance(path_or_model, Path) else path_or_model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    fixed = session.get_inputs()[0].shape[0]
    if isinstance(fixed, int):  # one image at a time
        parts = [session.run(None, {session.get_inputs()[0].name: row[None]}) for row in x]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]
    found: list[Array] = session.run(None, {session.get_inputs()[0].name: x})
    return found


def assert_close(found: Sequence[Array], wanted: Sequence[Array], layers: int) -> None:
    """Each layer rounds to 11 bits; errors of independent layers add up at most, and are far smaller on average."""
    for y, z in zip(found, wanted, strict=True):
        assert y.shape == z.shape
        scale = np.abs(z).max()
        error = np.abs(y.astype(np.float64) - z)
        assert error.max() <= layers * 2.0**-10 * scale
        assert error.mean() <= layers**0.5 * 2.0**-11 * scale


# ----------------------------------------------------------------------------------------------------------- the plan


def spans(plan: cudnn_plan.Plan) -> list[tuple[int, int, int, int]]:
    """(first step, last step, begin, end) of every buffer, from the steps alone."""
    found = []
    for index, buffer in enumerate(plan.buffers):
        used = [k for k, s in enumerate(plan.steps) if any(r.buffer == index for r in (*s.reads, *s.writes))]
        if used:
            size = 2 * plan.batch * buffer.channels * buffer.size[0] * buffer.size[1]
            found.append((min(used), max(used), buffer.offset, buffer.offset + size))
    return found


@pytest.mark.parametrize(("name", "size"), [("paper", 572), ("nuclei", 256), ("bioimage", 512), ("strain", 224)])
def test_live_buffers_never_share_memory(name: str, size: int, request: pytest.FixtureRequest) -> None:
    plan = compile_plan(read(network(name, request)), [(3, 1, size, size)])
    buffers = spans(plan)
    total = 0
    for k, (first, last, begin, end) in enumerate(buffers):
        assert begin % 256 == 0
        assert end <= plan.bytes
        total += end - begin
        for other_first, other_last, other_begin, other_end in buffers[:k]:
            apart_in_time = last < other_first or other_last < first
            assert apart_in_time or end <= other_begin or other_end <= begin
    assert plan.bytes < 0.6 * total  # memory is used again


def test_paper_network_has_no_copies(paper: Path) -> None:
    """Crops ride along with poolings, up-convolutions write into the concatenations, first and last layer are planar."""
    plan = compile_plan(read(paper), [(2, 1, 572, 572)])
    kinds = [type(step) for step in plan.steps]
    assert kinds.count(Convolve) == 17 + 4 * 4
    assert kinds.count(Pool) == 4
    assert kinds.count(First) == kinds.count(Head) == 1
    assert len(kinds) == 39
    pools = [step for step in plan.steps if isinstance(step, Pool)]
    assert [(p.start, p.crop.size if p.crop else None) for p in pools] == [
        ((88, 88), (392, 392)),
        ((40, 40), (200, 200)),
        ((16, 16), (104, 104)),
        ((4, 4), (56, 56)),
    ]
    assert plan.outputs == ((2, 2, 388, 388),)
    flops = sum(plan.flops(step) for step in plan.steps)
    assert flops == pytest.approx(2 * 300.9e9 / 64, rel=0.05)  # an eighth of the paper's width


def test_same_padded_networks_write_skips_where_they_are_read(request: pytest.FixtureRequest) -> None:
    plan = compile_plan(read(network("nuclei", request)), [(1, 1, 64, 64)])
    assert not any(isinstance(step, Combine) for step in plan.steps)
    assert all(step.crop is None for step in plan.steps if isinstance(step, Pool))
    assert sum(isinstance(step, Resize) for step in plan.steps) == 3


def conv(name: str, x: str, y: str, **attributes: Any) -> Any:
    return helper.make_node("Conv", [x, f"{name}.w"], [y], name=name, **attributes)


REFUSED: dict[str, tuple[list[Any], dict[str, Array], str]] = {
    "groups": ([conv("c", "x", "y", group=4)], {"c.w": drawn(0, 8, 1, 3, 3)}, "in 4 groups"),
    "big weights": ([conv("c", "x", "y")], {"c.w": drawn(0, 8, 4, 3, 3) * 1e6}, "beyond float16"),
    "too small": ([conv("c", "x", "y")], {"c.w": drawn(0, 8, 4, 40, 3)}, "at this tile"),
    "operator": ([helper.make_node("Erf", ["x"], ["y"], name="e")], {}, "'e' (Erf is not among its operators)"),
    "pool 3x3": (
        [helper.make_node("MaxPool", ["x"], ["y"], name="p", kernel_shape=[3, 3], strides=[2, 2])],
        {},
        "other than 2 x 2",
    ),
    "overlap": (
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="u", strides=[2, 2])],
        {"w": drawn(0, 4, 8, 3, 3)},
        "overlaps or is padded",
    ),
    "cubic": (
        [helper.make_node("Resize", ["x", "", "s"], ["y"], name="r", mode="cubic")],
        {"s": f32([1, 1, 2, 2])},
        "cubic",
    ),
    "scale": (
        [helper.make_node("Resize", ["x", "", "s"], ["y"], name="r", mode="linear")],
        {"s": f32([1, 1, 1.5, 1.5])},
        "by [",
    ),
    "channels": (
        [helper.make_node("Slice", ["x", "a", "b", "c"], ["y"], name="s")],
        {"a": i64([1]), "b": i64([3]), "c": i64([1])},
        "images or channels",
    ),
    "no layer": ([helper.make_node("Identity", ["x"], ["y"])], {}, "Identity"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_by_name(name: str) -> None:
    nodes, weights, message = REFUSED[name]
    with pytest.raises(Refused) as caught:
        compile_plan(read(model(nodes, ["N", 4, "H", "W"], weights)), [(1, 4, 32, 32)])
    assert message in str(caught.value)
    assert "another backend" in str(caught.value)


def test_shapes_that_do_not_fit_are_refused(paper: Path) -> None:
    proto = read(paper)
    with pytest.raises(Refused, match="2-D networks"):
        compile_plan(proto, [(1, 1, 8, 64, 64)])
    with pytest.raises(Refused, match="2 were given"):
        compile_plan(proto, [(1, 1, 572, 572)] * 2)
    with pytest.raises(Refused, match=r"takes \[0, 1"):
        compile_plan(proto, [(1, 3, 572, 572)])


# ----------------------------------------------------------------------------------------- a session on host memory


def strided(address: int, what: cudnn_api.Convolution, of: str) -> Array:
    """``x`` or ``y`` as cuDNN is told it lies: (N, Y, X, C)."""
    size, channels = (what.size, what.channels) if of == "x" else (what.out_size, what.filters)
    strides = what.x_strides if of == "x" else what.y_strides
    assert strides is not None
    assert address % 16 == 0
    assert all(s % 8 == 0 for s in strides)
    return np.asarray(
        SimpleNamespace(
            __array_interface__={
                "shape": (what.batch, *size, channels),
                "typestr": "<f2",
                "data": (address, False),
                "strides": (*(2 * s for s in strides), 2),
                "version": 3,
            }
        )
    )


def plain(address: int, shape: Sequence[int]) -> Array:
    view = {"shape": tuple(shape), "typestr": "<f2", "data": (address, False), "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=view))


def convolved(what: cudnn_api.Convolution, x: int, w: int, bias: int, y: int) -> None:
    """What cuDNN is asked for: float32 sums, rounded once."""
    import torch
    from torch.nn import functional as F

    weights = plain(w, (what.filters, *what.kernel, what.channels)).astype(np.float32).transpose(0, 3, 1, 2)
    image = strided(x, what, "x").astype(np.float32).transpose(0, 3, 1, 2)
    (top, left), (bottom, right) = what.before, what.after
    image = np.pad(image, ((0, 0), (0, 0), (top, bottom), (left, right)))
    shift = plain(bias, (what.filters,)).astype(np.float32)
    x1, w1, b1 = (torch.from_numpy(np.ascontiguousarray(a)) for a in (image, weights, shift))
    out = F.conv2d(x1, w1, b1, stride=what.strides, dilation=what.dilations)
    out = torch.relu(out) if what.activation == "relu" else out
    strided(y, what, "y")[...] = out.numpy().transpose(0, 2, 3, 1)


def spilling(what: cudnn_api.Convolution, x: int, w: int, bias: int, y: int) -> None:
    """Writes a value behind the channels of the first sample, too."""
    convolved(what, x, w, bias, y)
    plain(y + 2 * what.filters, (1,))[...] = 7


def erring(what: cudnn_api.Convolution, x: int, w: int, bias: int, y: int) -> None:
    """One value is wrong."""
    convolved(what, x, w, bias, y)
    strided(y, what, "y")[-1, -1, 0, -1] += 1


ENGINES = {"spilling": spilling, "erring": erring}  # all others are right
PROOF = ("steps_fill", "steps_count_wrong", "steps_count_beside")


class HostGraphs:
    """The step kernels on host memory, in the order of the stream, and graphs made of them.

    With an ``interpreter`` they are compiled ones, but for those of the proof, which would take minutes:
    test_cudnn_proof.py has them compiled.
    """

    def __init__(self, device: HostDevice, bodies: Any, interpreter: Interpreter | None = None) -> None:
        self.device, self.bodies, self.interpreter = device, bodies, interpreter
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launched: list[int] = []
        self.numbers = itertools.count(1)  # never twice: a driver's handles of graphs that live differ, too

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        if self.recording is not None:
            self.recording.append(work)
        else:
            self.device.streams[stream].enqueue(work)

    def __getattr__(self, name: str) -> Any:
        body = getattr(self.bodies, name)

        def compiled(*args: Any) -> None:
            assert self.interpreter is not None
            with self.interpreter.listening():
                body(*args)

        run = body if self.interpreter is None or name in PROOF else compiled
        return lambda *args: self.enqueue(args[-1], lambda: run(*args))

    def graph_begin(self, stream: int) -> None:
        self.recording = []

    def graph_end(self, stream: int) -> int:
        assert self.recording is not None
        number = next(self.numbers)
        self.graphs[number], self.recording = self.recording, None
        return number

    def graph_launch(self, graph: int, stream: int) -> None:
        self.launched.append(graph)
        for work in self.graphs[graph]:
            self.enqueue(stream, work)

    def graph_destroy(self, graph: int) -> None:
        del self.graphs[graph]


def watched(memory: ptx.Memory) -> type[host_device.HostMemory]:
    """Host memory of which compiled kernels may touch what was asked for, and no other."""

    class Watched(host_device.HostMemory):
        def __init__(self, device: HostDevice, size: int) -> None:
            super().__init__(device, size)
            self._region = memory.add(self.pointer, size)

        def free(self) -> None:
            if self._bytes is not None:
                memory.regions.remove(self._region)
            super().free()

    return Watched


@pytest.fixture
def on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """``open(graph)`` gives a session on host memory; ``kernels``: its kernels; ``engines``: names of the configurations
    that cuDNN proposes, the first of those that can run being the fastest.

    The kernels are bodies, or for a test with the parameter "compiled" what nvcc makes of them.
    """
    torch = pytest.importorskip("torch")
    bodies = pytest.importorskip("unet_rt._cuda_host", reason="built with UNET_RT_TEST_MODULES=ON")
    if not hasattr(bodies, "steps_fill"):
        pytest.skip("unet_rt._cuda_host is older than its sources; build it again")
    interpreter = None
    if getattr(request, "param", "bodies") == "compiled":
        interpreter = Interpreter("cudnn_steps")
        monkeypatch.setattr(host_device, "HostMemory", watched(interpreter.memory))
    device = HostDevice()
    graphs = HostGraphs(device, bodies, interpreter)
    engines = ["broken", "sloppy", "good", "other"]

    class Handle:
        def __init__(self, stream: int) -> None:
            self.stream = stream

        def close(self) -> None: ...

    class Plan:
        def __init__(self, configuration: Any, handle: Handle) -> None:
            if configuration.name == "broken":
                raise cudnn_api.CudnnError("it is broken")
            self.name, self.workspace, self.what = configuration.name, 64, configuration.what

        def bind(self, x: int, w: int, bias: int, y: int, workspace: int) -> Callable[[Handle], None]:
            assert workspace % 16 == 0
            assert workspace

            def launch(handle: Handle) -> None:
                engine = ENGINES.get(self.name, convolved)
                graphs.enqueue(handle.stream, lambda: engine(self.what, x, w, bias, y))

            return launch

    def configurations(what: cudnn_api.Convolution, modes: Sequence[str] = cudnn_api.MODES) -> list[Any]:
        return [SimpleNamespace(name=name, faithful=name != "sloppy", knobs=(), what=what) for name in engines]

    monkeypatch.setattr("unet_rt.device.Device.open", lambda index: device)
    monkeypatch.setattr(kernels, "_cuda", lambda: graphs)
    monkeypatch.setattr(cudnn_api, "library", lambda: SimpleNamespace(version=(9, 19, 0)))
    monkeypatch.setattr(cudnn_api, "Handle", Handle)
    monkeypatch.setattr(cudnn_api, "graph", lambda what, handle: what)
    monkeypatch.setattr(cudnn_api, "configurations", configurations)
    monkeypatch.setattr(cudnn_api, "Plan", Plan)
    monkeypatch.setattr(cudnn, "missing", lambda device="cpu": None)

    def opened(graph: Path | Any, **options: Any) -> cudnn_session.CudnnSession:
        return cudnn_session.CudnnSession(graph, "cuda:0", **options)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # convolutions are so small that threads would wait for each other most of the time
    yield SimpleNamespace(open=opened, device=device, kernels=graphs, engines=engines)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "size"), [("paper", 188), ("nuclei", 64), ("strain", 224)])
def test_networks_give_what_onnx_runtime_gives(
    name: str, size: int, request: pytest.FixtureRequest, on_host: SimpleNamespace
) -> None:
    path = network(name, request)
    x = tile(1 if size > 200 else 2, 1, size, size)
    if name == "strain":
        x = (x - x.min()) / (x.max() - x.min())
    with on_host.open(path) as session:
        assert_close(session.run([x]), expected(path, x), layers=24)
    assert on_host.device.held == 0


@pytest.mark.parametrize("on_host", ["compiled"], indirect=True)
def test_the_unpadded_network_compiled(paper: Path, on_host: SimpleNamespace) -> None:
    """Crops, transposed convolutions and concatenations by the step kernels as a device has them."""
    x = tile(1, 1, 188, 188)
    with on_host.open(paper) as session:
        assert_close(session.run([x]), expected(paper, x), layers=24)
    counts = on_host.kernels.interpreter.memory.counts
    assert counts["store", 16] > 0
    assert counts["read-only load", 16] > 0


def test_first_layer_has_two_ways(on_host: SimpleNamespace) -> None:
    x = tile(2, 1, 64, 64)
    results = []
    for direct in (True, False):
        with on_host.open(NUCLEI, direct=direct) as session:
            plan, _ = session.steps([x.shape])
            assert any(isinstance(step, First) for step in plan.steps) == direct
            results.append(session.run([x])[0].astype(np.float32))
    # Both sum in float32: in another order, then rounded alike.
    assert np.abs(results[0] - results[1]).max() <= 4 * 2.0**-10 * np.abs(results[0]).max()


def relu(x: str, y: str) -> Any:
    return helper.make_node("Relu", [x], [y])


def pool(x: str, y: str) -> Any:
    return helper.make_node("MaxPool", [x], [y], kernel_shape=[2, 2], strides=[2, 2])


def resize(x: str, y: str, **attributes: Any) -> Any:
    return helper.make_node("Resize", [x, "", "scales"], [y], **attributes)


BOUNDS = {"a": i64([3, 5]), "b": i64([-4, 21]), "ax": i64([2, 3])}

SMALL: dict[str, tuple[list[Any], dict[str, Array]]] = {
    # name: nodes from x (2, 3, 37, 45) to y, and weights
    "first, asymmetric padding, leave": ([conv("c", "x", "y", pads=[1, 0, 0, 2])], {"c.w": drawn(1, 12, 3, 3, 3)}),
    "strides and dilations": (
        [conv("c", "x", "h", strides=[2, 2], pads=[2, 2, 2, 2], dilations=[2, 2]), relu("h", "y")],
        {"c.w": drawn(2, 20, 3, 3, 3)},
    ),
    "odd pooling": (
        [conv("c", "x", "h", pads=[1, 1, 1, 1]), relu("h", "r"), pool("r", "y")],
        {"c.w": drawn(3, 16, 3, 3, 3)},
    ),
    "crop beside an odd pooling": (
        [
            conv("c", "x", "h"),  # 35 x 43
            pool("h", "p"),
            conv("d", "p", "q", pads=[1, 1, 1, 1]),
            helper.make_node("Slice", ["h", "a", "b", "ax"], ["s"]),  # 28 x 16: rows 3..31, columns 5..21
            helper.make_node("Slice", ["h", "a2", "b2", "ax"], ["t"]),  # to the last odd row and column
            helper.make_node("Concat", ["s", "t"], ["cat"], axis=1),
            conv("e", "cat", "u"),
            conv("f", "q", "v", kernel_shape=[1, 1]),
            helper.make_node("Slice", ["v", "z", "k", "ax"], ["w"]),
            helper.make_node("Slice", ["u", "z", "k", "ax"], ["o"]),
            helper.make_node("Add", ["w", "o"], ["sum"]),
            relu("sum", "y"),
        ],
        {
            "c.w": drawn(4, 10, 3, 3, 3),
            "d.w": drawn(5, 8, 10, 3, 3),
            "e.w": drawn(6, 16, 20, 3, 3),
            "f.w": drawn(7, 16, 8, 1, 1),
            **BOUNDS,
            "a2": i64([7, 27]),
            "b2": i64([35, 43]),
            "z": i64([0, 0]),
            "k": i64([11, 9]),
        },
    ),
    "transposed by 3, one class, sigmoid": (
        [
            conv("c", "x", "h"),
            helper.make_node("ConvTranspose", ["h", "u"], ["v"], strides=[3, 3]),
            helper.make_node("LeakyRelu", ["v"], ["l"], alpha=0.125),
            conv("d", "l", "z"),
            helper.make_node("Sigmoid", ["z"], ["y"]),
        ],
        {"c.w": drawn(8, 8, 3, 3, 3), "u": drawn(9, 8, 11, 3, 3), "d.w": drawn(10, 1, 11, 1, 1)},
    ),
    "bilinear, softmax": (
        [
            conv("c", "x", "h"),
            resize("h", "r", mode="linear"),
            conv("d", "r", "z"),
            helper.make_node("Softmax", ["z"], ["y"], axis=1),
        ],
        {"c.w": drawn(11, 9, 3, 3, 3), "d.w": drawn(12, 5, 9, 1, 1), "scales": f32([1, 1, 2, 2])},
    ),
    "nearest, wide head by cuDNN, softmax": (
        [
            conv("c", "x", "h"),
            resize("h", "r", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
            conv("d", "r", "z", pads=[1, 1, 1, 1]),
            helper.make_node("Softmax", ["z"], ["y"], axis=1),
        ],
        {"c.w": drawn(13, 9, 3, 3, 3), "d.w": drawn(14, 21, 9, 3, 3), "scales": f32([1, 1, 3, 3])},
    ),
    "input concatenated, then pooled": (
        [
            conv("c", "x", "h", pads=[1, 1, 1, 1]),
            helper.make_node("Concat", ["x", "h"], ["cat"], axis=1),
            pool("cat", "p"),
            helper.make_node("LeakyRelu", ["p"], ["l"]),
            conv("d", "l", "y"),
        ],
        {"c.w": drawn(15, 12, 3, 3, 3), "d.w": drawn(16, 4, 15, 1, 1)},
    ),
    "batch normalisation, dynamic crop": (
        [
            conv("c", "x", "h"),
            helper.make_node("BatchNormalization", ["h", "g", "be", "m", "va"], ["n"]),
            relu("n", "r"),
            helper.make_node("Shape", ["r"], ["shape"], start=2),
            helper.make_node("Sub", ["shape", "six"], ["stop"]),
            helper.make_node("Slice", ["r", "two", "stop", "ax"], ["s"]),
            conv("d", "s", "y"),
        ],
        {
            "c.w": drawn(17, 8, 3, 3, 3),
            "d.w": drawn(18, 2, 8, 3, 3),
            "g": f32(np.linspace(0.5, 2, 8)),
            "be": f32(np.linspace(-1, 1, 8)),
            "m": f32(np.linspace(-0.5, 0.5, 8)),
            "va": f32(np.linspace(0.2, 3, 8)),
            "six": i64([6, 6]),
            "two": i64([2, 2]),
            "ax": i64([2, 3]),
        },
    ),
}


@pytest.mark.parametrize("on_host", ["bodies", "compiled"], indirect=True)
@pytest.mark.parametrize("name", SMALL)
def test_every_step_gives_what_onnx_runtime_gives(name: str, on_host: SimpleNamespace, tmp_path: Path) -> None:
    nodes, weights = SMALL[name]
    proto = model(nodes, ["N", 3, "H", "W"], weights)
    path = tmp_path / "net.onnx"
    onnx.save(proto, str(path))
    x = tile(2, 3, 37, 45).astype(np.float16).astype(np.float32)
    with on_host.open(path) as session:
        assert_close(session.run([x]), expected(path, x), layers=len(nodes))


def test_arrays_of_the_device_are_recorded_once_they_stay(on_host: SimpleNamespace) -> None:
    x = tile(2, 1, 16, 24).astype(np.float16)
    with on_host.open(NUCLEI) as session:
        wanted = session.run([x])[0]
        shapes = session.output_shapes([x.shape])
        assert shapes == [(2, 2, 16, 24)]
        assert session.input_dtypes == session.output_dtypes == (np.dtype(np.float16),)
        given, taken = on_host.device.empty(x.shape, np.float16), on_host.device.empty(shapes[0], np.float16)
        launched = len(on_host.kernels.launched)
        for run in range(4):
            on_host.device.copy_in(given, x, session.stream)
            session.run_device([given], [taken])
            session.stream.synchronize()
            np.testing.assert_array_equal(host(taken), wanted)
            host(taken)[...] = 0
            assert len(on_host.kernels.launched) - launched == max(0, run)
        with pytest.raises(BackendError, match="float16"):
            session.run_device([on_host.device.empty(x.shape, np.float32)], [taken])
        for _ in range(40):  # addresses that never come back are not kept for ever
            session.run_device([given], [keep := on_host.device.empty(shapes[0], np.float16)])
            session.run_device([given], [keep])
            session.stream.synchronize()
        assert len(on_host.kernels.graphs) <= 20
        given.free()
        taken.free()
    assert not on_host.kernels.graphs


def test_memory_of_all_shapes_is_given_back_where_others_are_short(on_host: SimpleNamespace) -> None:
    with on_host.open(NUCLEI) as session:
        x = tile(1, 1, 16, 16)
        wanted = session.run([x])[0]
        weights = on_host.device.held - session.held_bytes
        assert 0 < weights < on_host.device.held
        session.give_back()
        assert (on_host.device.held, session.held_bytes) == (weights, 0)
        np.testing.assert_array_equal(session.run([x])[0], wanted)


def test_short_device_memory_is_told_by_its_status() -> None:
    library = object.__new__(cudnn_api.Library)
    library._library = SimpleNamespace(
        cudnnGetLastErrorString=lambda text, size: None, cudnnGetErrorString=lambda status: b"STATUS"
    )
    with pytest.raises(DeviceMemoryError, match="cuDNN fails in a call: STATUS; use a smaller --tile or --batch"):
        library.check(4004, "a call")
    with pytest.raises(cudnn_api.CudnnError, match=r"^cuDNN fails in a call: STATUS$"):
        library.check(4003, "a call")
    library.check(0, "a call")


def test_memory_of_old_shapes_is_given_back(on_host: SimpleNamespace) -> None:
    with on_host.open(NUCLEI) as session:
        for size in (16, 24, 32):
            session.run([tile(1, 1, size, size)])
        held = on_host.device.held
        for size in (24, 32, 16, 8, 40, 32):
            session.run([tile(1, 1, size, size)])
        assert on_host.device.held <= 2 * held
    assert on_host.device.held == 0
    with pytest.raises(BackendError, match="closed"):
        session.run([tile(1, 1, 32, 32)])


def test_build_puts_choices_on_record(on_host: SimpleNamespace, tmp_path: Path) -> None:
    graph = tmp_path / "graph.onnx"
    cudnn.build(NUCLEI, graph, precision="fp16", device="cuda:0", tiles=[(16, 24)], batches=(1, 2))
    entry = {p.key: p.value for p in onnx.load(str(graph)).metadata_props}[cudnn_session.RECORD]
    assert json.loads(entry)["direct"]  # no difference in time here
    names = json.loads(entry)["names"]
    assert len(names) >= 2 * 10
    assert set(names.values()) <= {"good", "other"}  # never what is broken, or loses bits
    with cudnn.load(graph, precision="fp16", device="cuda:0") as session:
        session.run([tile(2, 1, 16, 24)])
        assert not session.trials
        session.run([tile(1, 1, 32, 32)])
        assert all({t.name for t in trials} == {"broken", "good", "other"} for trials in session.trials.values())
    on_host.device.name = "another GPU"
    with cudnn.load(graph, precision="fp16", device="cuda:0") as session:
        session.run([tile(2, 1, 16, 24)])
        assert session.trials


# ------------------------------------------------------------------------------------------ engines that are wrong


@pytest.fixture
def transposed(tmp_path: Path) -> tuple[Path, Array]:
    """A network whose transposed convolution writes every third sample, and an input."""
    path = tmp_path / "net.onnx"
    onnx.save(model(SMALL[TRANSPOSED][0], ["N", 3, "H", "W"], SMALL[TRANSPOSED][1]), str(path))
    return path, tile(2, 3, 37, 45).astype(np.float16).astype(np.float32)


TRANSPOSED = "transposed by 3, one class, sigmoid"


def strided_key(session: cudnn_session.CudnnSession, x: Array) -> str:
    """Of the transposed convolution, all of whose parts have one geometry."""
    keys = {cudnn_session.key_of(s.convolution) for s in session.steps([x.shape])[0].steps if isinstance(s, Convolve)}
    assert len(keys) == 1
    return keys.pop()


@pytest.mark.parametrize("most", [0, 1, 6])
def test_the_fastest_engine_that_is_right_is_taken(
    most: int, transposed: tuple[Path, Array], on_host: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where more have to be timed than was asked."""
    on_host.engines[:] = ["spilling", "broken", "erring", "good", "other"]
    path, x = transposed
    with caplog.at_level(logging.INFO, "unet_rt"), on_host.open(path, most=most) as session:
        assert_close(session.run([x]), expected(path, x), layers=5)
        key = strided_key(session, x)
        assert session.choices.names == {key: "good"}
        trials = {t.name: t for t in session.trials[key]}
    outputs = 2 * 35 * 43 * 16
    assert trials["spilling"].note == f"wrong: 0 of {outputs} outputs, 1 values beside them"
    assert trials["erring"].note == f"wrong: 1 of {outputs} outputs, 0 values beside them"
    assert trials["broken"].note == "it is broken"
    assert trials["good"].note == ""
    assert ("other" in trials) == (most != 1)
    assert trials["erring"].ms is not None
    passed = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert [name for line in passed for name in ("spilling", "erring") if name in line] == ["spilling", "erring"]


def test_an_engine_is_tried_at_every_place(
    transposed: tuple[Path, Array], on_host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of a transposed convolution share an engine."""
    path, x = transposed
    first: list[int] = []

    def right_once(what: cudnn_api.Convolution, x: int, w: int, bias: int, y: int) -> None:
        first[:] = first or [y]
        (convolved if y == first[0] else erring)(what, x, w, bias, y)

    monkeypatch.setitem(ENGINES, "elsewhere", right_once)
    on_host.engines[:] = ["elsewhere", "good"]
    with on_host.open(path) as session:
        assert session.choices.names == {}
        assert strided_key(session, x) in session.choices.names
        assert set(session.choices.names.values()) == {"good"}


def test_no_engine_that_is_wrong_is_run(transposed: tuple[Path, Array], on_host: SimpleNamespace) -> None:
    on_host.engines[:] = ["broken", "spilling", "erring"]
    path, x = transposed
    with on_host.open(path) as session, pytest.raises(BackendError) as caught:
        session.run([x])
    for part in ("no engine of cuDNN computes it", "1 values beside them", "another backend"):
        assert part in str(caught.value)


def test_an_engine_on_record_that_is_wrong_is_replaced(
    transposed: tuple[Path, Array], on_host: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    on_host.engines[:] = ["spilling", "good"]
    path, x = transposed
    with on_host.open(path) as session:
        key = strided_key(session, x)
    with caplog.at_level(logging.WARNING, "unet_rt"), on_host.open(path, names={key: "spilling"}) as session:
        assert_close(session.run([x]), expected(path, x), layers=5)
        assert session.choices.names == {key: "good"}
        assert [t.ms is None for t in session.trials[key]] == [True, False]
    assert [r.getMessage().count("spilling, on record for") for r in caplog.records] == [1]


def test_memory_is_zero_after_the_trials(transposed: tuple[Path, Array], on_host: SimpleNamespace) -> None:
    path, x = transposed
    with on_host.open(path) as session:
        session.steps([x.shape])
        session.stream.synchronize()
        (ready,) = session._ready.values()
        assert not host(ready.block).any()


def test_other_precisions_are_refused(on_host: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no fp32"):
        cudnn.build(NUCLEI, tmp_path / "g.onnx", precision="fp32", device="cuda:0")
    with pytest.raises(BackendError, match="no int8"):
        cudnn.load(NUCLEI, precision="int8", device="cuda:0")


def test_a_cpu_is_refused() -> None:
    assert "GPUs alone" in str(cudnn.missing("cpu"))
    with pytest.raises(BackendError, match="GPUs alone"):
        cudnn.load(NUCLEI, precision="fp16", device="cpu")


# ---------------------------------------------------------------------------------------------------- cuDNN, no GPU

H200 = {
    "cudaDeviceId": 0, "deviceName": "NVIDIA H200", "deviceVer": 900, "driverVer": 13000, "isTccDriver": 0,
    "l2CacheSize": 62914560, "maxCtasPerSM": 32, "maxRegistersPerSM": 65536, "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048,
    "memClockRateKHz": 3201000, "multiProcessorCount": 132, "pciDeviceId": 0, "regsPerBlock": 65536,
    "reservedSharedMemoryPerBlock": 1024, "smClockRateKHz": 1980000, "supportCoopLaunch": 1,
    "totalGlobalMem": 150754820096, "warpSize": 32, "maxBlockSize": [1024, 1024, 64],
    "maxGridSize": [2147483647, 65535, 65535],
}  # fmt: skip


@pytest.mark.parametrize("name", ["paper", "nuclei"])
def test_cudnn_has_engines_for_every_convolution(name: str, request: pytest.FixtureRequest) -> None:
    """Asked for a GPU that is described, so that none is needed."""
    if not _importable("nvidia.cudnn") or not _importable("nvidia.cu13"):
        pytest.skip("cuDNN or cuBLAS is not installed (nvidia-cudnn-cu13, nvidia-cublas)")
    device = cudnn_api.described_device(H200)
    plan = compile_plan(read(network(name, request)), [(16, 1, 188, 188) if name == "paper" else (4, 1, 64, 64)])
    for what in {step.convolution for step in plan.steps if isinstance(step, Convolve)}:
        found = cudnn_api.configurations(cudnn_api.graph(what, None), device=device)
        good = [c for c in found if c.faithful]
        assert good
        assert len({c.name for c in found}) == len(found)
        assert cudnn_api.Plan(good[0], None, device).workspace >= 0


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# ----------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nuclei", "paper"])
def test_gpu_gives_what_onnx_runtime_gives(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path, graph = network(name, request), tmp_path / "graph.onnx"
    size = 256 if name == "nuclei" else 252
    cudnn.build(path, graph, precision="fp16", device="cuda:0", tiles=[(size, size)], batches=(1, 2, 16))
    with cudnn.load(graph, precision="fp16", device="cuda:0") as session:
        for batch in (1, 2, 16):
            x = tile(batch, 1, size, size)
            found = session.run([x])
            assert_close(found, expected(path, x), layers=24)
            rows = session.run([np.repeat(x[:1], batch, axis=0)])[0]
            assert all(np.array_equal(rows[0], row) for row in rows)
            for _ in range(3):  # recorded
                np.testing.assert_array_equal(session.run([x])[0], found[0])
        assert not session.trials  # what build chose is used


@pytest.mark.gpu
def test_gpu_arrays_give_what_arrays_of_the_host_give(tmp_path: Path) -> None:
    from unet_rt.device import Device

    gpu = Device.open(0)
    x = tile(4, 1, 128, 128).astype(np.float16)
    for direct in (True, False):
        with cudnn_session.CudnnSession(NUCLEI, "cuda:0", direct=direct) as session:
            wanted = session.run([x])[0]
            assert_close([wanted], expected(NUCLEI, x.astype(np.float32)), layers=24)
            given, taken = gpu.empty(x.shape, np.float16), gpu.empty(wanted.shape, np.float16)
            for _ in range(4):
                gpu.copy_in(given, x, session.stream)
                gpu.zero(taken, session.stream)
                session.run_device([given], [taken])
                np.testing.assert_array_equal(taken.to_host(session.stream), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_gpu_every_step_gives_what_onnx_runtime_gives(name: str, tmp_path: Path) -> None:
    nodes, weights = SMALL[name]
    path = tmp_path / "net.onnx"
    onnx.save(model(nodes, ["N", 3, "H", "W"], weights), str(path))
    x = tile(2, 3, 37, 45).astype(np.float16).astype(np.float32)
    with cudnn_session.CudnnSession(path, "cuda:0") as session:
        assert_close(session.run([x]), expected(path, x), layers=len(nodes))


@pytest.mark.gpu
def test_gpu_backend_is_there_for_those_who_ask_for_it() -> None:
    assert cudnn.missing("cuda:0") is None
    assert "cudnn" not in backends.usable("cuda:0")
