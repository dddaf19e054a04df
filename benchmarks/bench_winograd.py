"""FP32 by Winograd's convolutions: ncnn against ONNX Runtime and OpenVINO, on networks of many kinds.

    python benchmarks/bench_winograd.py [--nets paper,same-32,...] [--shared ../shared] [--seconds 60] [--out FILE]

Per network one engine of each backend in FP32, built on drawn micrographs, then one interleaved run after a warm-up round;
medians with the fastest and slowest run. Beside the speed: parity with the baseline, how equal tiles are to the whole, and
memory per tile pixel. Networks marked "drawn weights" have He-initialised weights, as no trained ones are at hand: their
speed counts, their labels do not. MNN is measured where it is installed, used directly: it is no backend of unet-rt.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import paper_net
import record
import torch
from bench_engine import tile_of
from torch import nn

import unet_rt as urt
from unet_rt.system import limits
from unet_rt.system.timing import interleave, ratio

BACKENDS = ("onnxruntime", "openvino", "ncnn")


@dataclass(frozen=True)
class Case:
    """A network to measure: its file, the tile, how pixels are normalised and what it is."""

    graph: Path
    tile: int
    contract: urt.Contract
    about: str


class Res34(nn.Module):
    """A U-Net over an encoder of ResNet-34's shape: a 7 x 7 convolution of stride 2, then 3, 4, 6, 3 residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 64, 128, 256, 512)
        self.stem = nn.Sequential(nn.Conv2d(1, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.levels = nn.ModuleList(
            nn.Sequential(*[_Residual(a if k == 0 else b, b, 2 if k == 0 and a != b else 1) for k in range(n)])
            for a, b, n in zip(widths[:-1], widths[1:], (3, 4, 6, 3), strict=True)
        )
        ups = [(512 + 256, 256), (256 + 128, 128), (128 + 64, 64), (64 + 64, 32), (32, 16)]
        self.ups = nn.ModuleList(_double(a, b) for a, b in ups)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [self.stem(x)]
        x = self.pool(skips[0])
        for level in self.levels:
            x = level(x)
            skips.append(x)
        skips.pop()
        for up in self.ups:
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = up(torch.cat([x, skips.pop()], 1) if skips else x)
        return self.head(x)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        same = stride == 1 and before == after
        self.short = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


def _double(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((before, after), (after, after)):
        layers += [nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


class Plain(nn.Module):
    """A U-Net of given widths: nnU-Net's default with instance norm and strided convolutions, or one with poolings."""

    def __init__(self, widths: tuple[int, ...], up: str, *, nnunet: bool, dims: int = 2) -> None:
        super().__init__()
        self.up = up
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        transposed = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        norm = nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d

        def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
            layers: list[nn.Module] = []
            for a, b, s in ((before, after, stride), (after, after, 1)):
                layers.append(conv(a, b, 3, s, 1))
                layers += [norm(b, affine=True), nn.LeakyReLU(0.01)] if nnunet else [nn.ReLU()]
            return nn.Sequential(*layers)

        pairs = list(pairwise(widths))
        self.first = block(1, widths[0])
        self.down = nn.ModuleList(block(a, b, 2 if nnunet else 1) for a, b in pairs)
        self.pool = nn.Identity() if nnunet else (nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2))
        self.ups = nn.ModuleList(
            transposed(b, a, 2, 2) if up == "transposed" else conv(b, a, 1) for a, b in pairs[::-1]
        )
        self.join = nn.ModuleList(block(2 * a, a) for a, _ in pairs[::-1])
        self.head = conv(widths[0], 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [self.first(x)]
        for level in self.down:
            skips.append(level(self.pool(skips[-1])))
        x = skips.pop()
        for up, join in zip(self.ups, self.join, strict=True):
            if self.up != "transposed":
                x = nn.functional.interpolate(x, scale_factor=2.0, mode=self.up)
            x = join(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def cases(names: list[str], folder: Path, shared: Path | None) -> dict[str, Case]:
    """The networks that were asked for, written where they have to be."""
    made: dict[str, Callable[[], Case]] = {
        "paper": lambda: _kept(paper_net.paper(), 572, "the paper's, valid, 31 M parameters"),
        "same-48": lambda: _kept(paper_net.nuclei(widen=4), 512, "same padding, depth 3, width 48"),
        "nuclei": lambda: _kept(paper_net.nuclei(), 512, "the one that ships: width 12"),
        "nnunet": lambda: _drawn(Plain((32, 64, 128, 256, 512, 512), "transposed", nnunet=True), 256, folder, "nnunet"),
        "res34": lambda: _drawn(Res34(), 512, folder, "res34"),
        "bilinear-32": lambda: _drawn(
            Plain((32, 64, 128, 256, 512), "bilinear", nnunet=False), 512, folder, "bilinear"
        ),
        "fcn8s": lambda: _drawn(urt.models.FCN8s(urt.models.FCN8sSpec(width=32)), 512, folder, "fcn8s"),
        "segnet": lambda: _drawn(urt.models.SegNet(urt.models.SegNetSpec(width=32)), 512, folder, "segnet"),
        "volume": lambda: _drawn(Plain((16, 32, 64), "transposed", nnunet=False, dims=3), 64, folder, "volume"),
    }
    if shared is not None:
        strain = next((shared / "models" / "strain").glob("*.onnx"), None)
        if strain is not None:
            made["strain"] = lambda: Case(strain, 256, urt.Contract(), "of ../shared/models")
    return {name: build() for name, build in made.items() if name in names or not names}


def _kept(net: paper_net.Net, tile: int, about: str) -> Case:
    return Case(net.onnx, tile, net.contract, about)


def _drawn(network: nn.Module, tile: int, folder: Path, name: str) -> Case:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
    dims = 3 if any(isinstance(m, nn.Conv3d) for m in network.modules()) else 2
    path = folder / f"{name}.onnx"
    axes = {0: "n", **{k + 2: f"s{k}" for k in range(dims)}}
    torch.onnx.export(
        network.eval(), (torch.zeros(1, 1, *[64] * dims),), path, dynamo=False, input_names=["image"],
        output_names=["logits"], dynamic_axes={"image": axes, "logits": dict(axes)},
    )  # fmt: skip
    contract = urt.Contract(normalization=urt.Normalization("zscore"), task="multiclass", output_is="logits")
    return Case(path, tile, contract, "drawn weights")


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=60)
    parser.add_argument("--nets", default="", metavar="NAME,..", help="default: all")
    parser.add_argument("--shared", type=Path, help="folder of real networks")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args(argv)
    if args.quick:
        args.nets, args.runs, args.seconds = "volume", 1, 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for name, case in cases([n for n in args.nets.split(",") if n], Path(work), args.shared).items():
            rows += measured(name, case, Path(work), args)
    for row in rows:
        print(
            f"{row['net']:12s} {row['name']:24s} "
            + (f"not run: {row['note']}" if "note" in row else
               f"{row['median_ms']:7.0f} ms ({row['low_ms']:.0f} to {row['high_ms']:.0f})  {row['speed']:.2f} x the faster "
               f"of ONNX Runtime and OpenVINO  {row['parity']}  {row['equal']}  {row['bytes_per_px']:.0f} bytes per px")
        )  # fmt: skip
    print(record.write("winograd", {"threads": limits.threads(), "rows": rows}, args.out, quick=args.quick))
    return 0


def measured(name: str, case: Case, work: Path, args: Any) -> list[dict[str, Any]]:
    """The rows of one network: an engine per backend, MNN used directly."""
    dims = 3 if name == "volume" else 2
    tile = (case.tile,) * dims
    samples = [paper_net.drawn(1, 96)[0][None].repeat(80, 0)] if dims == 3 else paper_net.drawn(2, 300)
    engines: dict[str, urt.Engine] = {}
    rows: list[dict[str, Any]] = []
    for backend in BACKENDS:
        try:
            engines[f"unet-rt {backend}"] = urt.build(
                case.graph, samples=samples, out=work / f"{name}-{backend}.urt", backend=backend, precision="fp32",
                contract=case.contract, tile=tile, device="cpu", overwrite=True,
            )  # fmt: skip
        except urt.UnetRtError as error:
            rows.append({"net": name, "name": f"unet-rt {backend}", "note": str(error)})
    if not engines:
        return rows
    some = next(iter(engines.values()))
    x = np.repeat(tile_of(some.spec.contract, case.tile)[..., None, :, :], case.tile, 2) if dims == 3 else None
    x = tile_of(some.spec.contract, case.tile) if x is None else x
    contenders: dict[str, Callable[[], Any]] = {n: lambda e=e: e.run(x) for n, e in engines.items()}  # type: ignore[misc]
    mnn = _mnn(case.graph, work / f"{name}.mnn", x, some)
    if mnn is not None:
        contenders["MNN, bare"] = mnn
    timings = dict(
        zip(contenders, interleave(list(contenders.values()), runs=args.runs, seconds=args.seconds), strict=True)
    )
    direct = [t for n, t in timings.items() if n in ("unet-rt onnxruntime", "unet-rt openvino")]
    fastest = min(direct or timings.values(), key=lambda t: t.median_s)
    wanted = some.run(x)[0]
    for title, timing in timings.items():
        found, engine = contenders[title](), engines.get(title)
        error = np.abs(np.asarray(found[0]) - wanted).max() / np.ptp(wanted)
        verdict = (
            engine.folder.parity["verdict"] if engine is not None and engine.folder and engine.folder.parity else {}
        )
        rows.append(
            {
                "net": name, "about": case.about, "name": title, "tile": case.tile, **record.spread(timing),
                "speed": ratio(fastest, timing).median, "speed_low": ratio(fastest, timing).low,
                "speed_high": ratio(fastest, timing).high,
                "parity": f"{verdict.get('label_change') or 0:.4%} of labels" if verdict else f"error {error:.1e}",
                "error": float(error),
                "equal": "" if engine is None or engine.spec.equal is None else engine.spec.equal.text,
                "bytes_per_px": 0.0 if engine is None else engine.spec.bytes_per_px,
            }
        )  # fmt: skip
    for engine in engines.values():
        engine.close()
    return rows


def _mnn(graph: Path, converted: Path, x: np.ndarray, engine: urt.Engine) -> Callable[[], Any] | None:
    """MNN on a tile, in FP32; None where it is not installed, or does not convert the graph.

    Its converter's command reports its use to a server; the function below it, in a process of its own, does not.
    """
    try:
        from MNN import expr
        from MNN import nn as module
    except ImportError:
        return None
    words = ["mnnconvert", "-f", "ONNX", "--modelFile", str(graph), "--MNNModel", str(converted), "--bizCode", "none"]
    process = multiprocessing.get_context("spawn").Process(target=_convert, args=(words,))
    process.start()
    process.join(300)
    if not converted.exists():
        return None
    names = [one.name for one in engine.spec.inputs], [one.name for one in engine.spec.outputs]
    manager = module.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": limits.threads()},))
    net = module.load_module_from_file(str(converted), *names, runtime_manager=manager)

    def run() -> Any:
        found = net.forward([expr.const(x, list(x.shape), expr.NCHW)])
        return [np.array(expr.convert(found[0], expr.NCHW).read())]

    return run


def _convert(words: list[str]) -> None:
    import _tools

    _tools.mnnconvert(words)


if __name__ == "__main__":
    raise SystemExit(main())
