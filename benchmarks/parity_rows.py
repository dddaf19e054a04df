"""Parity of every backend and precision on trained networks and images that neither calibrated nor chose anything.

    python benchmarks/parity_rows.py --shared ../shared [--net nuclei ...] [--checkpoint fcn=runs/FCN8s-w8.pt ...]

Each network is built once per backend and precision on one part of its images (the search, its calibration and its verdict
see nothing else) and then held against its FP32 graph on the rest: changed labels, Dice against the FP32 mask, and Dice
against the truth of both, where there is one. FP16 graphs and the INT8 form of TensorRT, which no CPU backend takes, run in
plain ONNX Runtime on the CPU, for their numbers: INT8 node by node, as the graph says (fused for a CPU without VNNI, sums of
two products overflow 16 bits there, which no GPU does). Nothing here is a time.

``--shared``: ``data/dsb2018``, ``data/isbi2012`` (``image`` and ``label`` folders) and ``models/nuclei``, ``models/strain``.
``--checkpoint NAME=FILE``: a checkpoint of ``unet-rt train`` or ``membranes.py``, measured on the slices of ISBI 2012.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import record

import unet_rt as urt
from unet_rt import backends
from unet_rt.baseline.model import baseline_engine, open_model
from unet_rt.baseline.results import raw_result
from unet_rt.baseline.samples import ReadOptions, draw
from unet_rt.baseline.tiles import judged_tile, whole_grid
from unet_rt.building.calibration import Calibration
from unet_rt.building.report import BuildReport
from unet_rt.cli.demo import shipped_model
from unet_rt.engine import parity
from unet_rt.engine.engine import Engine
from unet_rt.engine.folder import read_folder
from unet_rt.engine.remote import connect
from unet_rt.graph.passes import qdq
from unet_rt.graph.passes.half import half

TILE = 256  # small: every window has seams, and builds are quick
TRAINING_SLICES = 18  # of ISBI 2012; membranes.py trains on them


@dataclass(frozen=True)
class Subject:
    """A network and its images: ``samples`` for the build, ``others`` held back."""

    name: str
    model: Path
    contract: urt.Contract
    data: str
    samples: Sequence[Path]
    others: Sequence[Path]
    labels: Path | None = None
    channels: str | None = None
    tile: tuple[int, ...] | None = (TILE, TILE)


def fluorescence(folder: Path) -> list[Path]:
    """Grey images of dsb2018 with a dark background (those of 1024 x 1024 are bright field)."""
    entries = json.loads((folder / "index.json").read_text())
    return [folder / "image" / e["file"] for e in entries if e["kind"] == "gray" and tuple(e["hw"]) != (1024, 1024)]


def subjects(shared: Path, checkpoints: dict[str, Path], work: Path) -> Iterator[Subject]:
    dsb, isbi, models = shared / "data" / "dsb2018", shared / "data" / "isbi2012", shared / "models"
    nuclei = fluorescence(dsb)
    halves = {"data": "dsb2018", "samples": nuclei[::2], "others": nuclei[1::2], "labels": dsb / "label"}
    zscore = urt.Contract(normalization=urt.Normalization("zscore"), task="binary", output_is="logits")
    yield Subject("nuclei (bioimage.io)", models / "nuclei" / "weights.onnx", zscore, **halves)
    yield Subject("nuclei (ships)", shipped_model(), urt.Contract(), **halves)
    yield Subject("paper, width 8 (ships)", paper(), urt.Contract(), tile=(380, 380), **halves)
    pairs = sorted((models / "strain" / "input").iterdir())
    values = urt.Contract(task="regression", output_is="values", normalization=urt.Normalization("scale", scale=255.0))
    yield Subject(
        "strain", models / "strain" / "unet.onnx", values, "its authors'", pairs[::2], pairs[1::2],
        channels="luma", tile=(224, 224),
    )  # fmt: skip
    slices = sorted((isbi / "image").iterdir())
    parts: dict[str, Any] = {
        "data": "isbi2012",
        "samples": slices[:TRAINING_SLICES],
        "others": slices[TRAINING_SLICES:],
    }
    parts["labels"] = isbi / "label"
    yield Subject("membranes (ships)", shipped_model("membranes"), urt.Contract(), tile=(380, 380), **parts)
    for name, checkpoint in checkpoints.items():
        yield Subject(name, exported(checkpoint, work / f"{name}.onnx"), urt.Contract(), tile=None, **parts)


def paper() -> Path:
    import paper_net

    return paper_net.paper(widen=1).onnx


def exported(checkpoint: Path, out: Path) -> Path:
    from unet_rt.models.source import open_module
    from unet_rt.training.export import export

    opened = open_module(checkpoint)
    export(opened.module, out, contract=opened.contract, metadata=opened.metadata)
    return out


def measured(
    subject: Subject, work: Path, backend: str, precision: str, count: int, minutes: float
) -> list[dict[str, Any]]:
    """Rows of one backend and precision: as built, and plain INT8's verdict where it was not what was chosen."""
    folder, reports = work / f"{backend}-{precision}.urt", list[BuildReport]()
    row: dict[str, Any] = {"net": subject.name, "data": subject.data, "backend": backend, "precision": precision}
    print(f"{subject.name}: {backend} {precision}", flush=True)
    options: dict[str, Any] = {
        "samples": list(subject.samples),
        "contract": subject.contract,
        "channels": subject.channels,
    }
    try:
        urt.build(
            subject.model, out=folder, backend=backend, precision=precision, device="cpu", tile=subject.tile,
            halo="exact", search_minutes=minutes, report=reports.append, **options,
        ).close()  # fmt: skip
    except urt.UnetRtError as error:
        return [{**row, "note": str(error)}]
    report = reports[0]
    chosen, plain = report.candidates[report.chosen], report.candidates[0]
    found = urt.verify(folder, list(subject.others), labels=subject.labels, channels=subject.channels, count=count)
    row |= {"variant": chosen.variant, "built_on": figures(chosen.verdict), "held_back": figures(found.verdict)}
    row["accepted"] = found.accepted
    if plain is not chosen:
        row["plain"] = figures(plain.verdict)
    if found.truth is not None:
        row["truth"] = vars(found.truth)
    return [row]


def figures(verdict: parity.Verdict | None) -> dict[str, Any] | None:
    """What a record says of a verdict, labels per million."""
    if verdict is None:
        return None
    worst, mean = verdict.label_change, verdict.mean_label_change
    return {
        "images": len(verdict.images),
        "labels_ppm_worst": None if worst is None else 1e6 * worst,
        "labels_ppm_mean": None if mean is None else 1e6 * mean,
        "dice_lowest": verdict.dice,
        "max_abs": verdict.max_abs,
        "mean_abs": float(np.mean([image.mean_abs for image in verdict.images])),
        "relative": verdict.relative,
        "worst_image": max(verdict.images, key=lambda i: i.label_change or i.relative).name,
        "reasons": list(verdict.reasons),
    }


def in_onnxruntime(subject: Subject, work: Path, count: int) -> list[dict[str, Any]]:
    """FP16, and INT8 as TensorRT gets it, in plain ONNX Runtime: graphs of the engines that the other rows built."""
    rows = []
    folder = work / "onnxruntime-fp32.urt"
    if not folder.exists():
        return []
    opened = open_model(subject.model, made(work / "model"), options=subject.contract)
    prepared = onnx.load(opened.graph)
    half(prepared, keep_io=True)
    graphs = {"fp16": prepared}
    quantised = work / "onnxruntime-int8.urt"
    if quantised.exists():
        engine = read_folder(quantised)
        calibration = Calibration.from_json(json.loads(engine.file("calibration").read_text()))
        ranges = calibration.ranges[engine.spec.options["int8"]["method"]]
        made_for = qdq.quantise(qdq.prepare_graph(onnx.load(opened.graph)), ranges, "tensorrt", means=calibration.means)
        graphs["int8 as for TensorRT"] = made_for.model
    for precision, graph in graphs.items():
        print(f"{subject.name}: {precision} in plain ONNX Runtime", flush=True)
        options = onnxruntime.SessionOptions()
        if precision != "fp16":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]

        def run(inputs: list[Any], session: Any = session, names: list[str] = names) -> Any:
            return session.run(None, dict(zip(names, inputs, strict=True)))

        with connect(folder, run, accept_unverified=True) as engine_there:
            spec = replace(engine_there.spec, precision="int8" if "int8" in precision else "fp16")
            engine_there.spec = spec
            verdict = judged(subject, opened, engine_there, count)
        row = {"net": subject.name, "data": subject.data, "backend": "onnxruntime (bare)", "precision": precision}
        rows.append({**row, "held_back": figures(verdict), "accepted": verdict.accepted})
    return rows


def judged(subject: Subject, model: Any, engine: Engine, count: int) -> parity.Verdict:
    """An engine against FP32, whole image, on what was held back."""
    spec = engine.spec
    samples = draw(
        list(subject.others), spec.contract, spatial=spec.spatial, network_channels=spec.channels,
        read=ReadOptions(channels=subject.channels),
        count=count,
    )  # fmt: skip
    images = []
    with baseline_engine(model, spec) as reference:
        for sample in samples:
            small = spec.grid(sample.shape, judged_tile(spec, sample.shape))
            grid = whole_grid(spec, sample.shape) if spec.exact and spec.free_size else small
            wanted, got = raw_result(reference, sample, grid), raw_result(engine, sample, small)
            images.append(parity.compare(wanted, got, spec.contract, sample.name))
    return parity.judge(images, urt.Budget().of(spec.precision))


def merged(rows: Sequence[dict[str, Any]], out: str | None) -> list[dict[str, Any]]:
    """Rows of an earlier run, those replaced that this one measured anew, and the others of this one."""
    path = Path(out) if out is not None else record.RESULTS / "parity.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    return list({(row["net"], row["backend"], row["precision"]): row for row in [*earlier, *rows]}.values())


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--checkpoint", metavar="NAME=FILE", nargs="+", default=[])
    parser.add_argument("--net", metavar="WORD", nargs="+", help="only networks whose name holds one of these")
    parser.add_argument("--backend", nargs="+", default=backends.usable("cpu"))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--samples", type=int, default=20, help="images that are built on")
    parser.add_argument("--count", type=int, default=20, help="windows held back that are judged")
    parser.add_argument("--search-minutes", type=float, default=10, help="of each build, at most")
    parser.add_argument(
        "--bare", action="store_true", help="rows of graphs in plain ONNX Runtime alone; keep the others"
    )
    parser.add_argument("--out")
    args = parser.parse_args()
    checkpoints = {name: Path(path) for name, _, path in (entry.partition("=") for entry in args.checkpoint)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for k, subject in enumerate(subjects(args.shared, checkpoints, Path(temporary))):
            if args.net and not any(word in subject.name for word in args.net):
                continue
            subject = replace(subject, samples=list(subject.samples)[: args.samples])
            work = made(Path(temporary) / str(k))
            for backend in args.backend:
                for precision in args.precision:
                    found = measured(subject, work, backend, precision, args.count, args.search_minutes)
                    rows += [] if args.bare else found
            rows += in_onnxruntime(subject, work, args.count)
            record.write(
                "parity", {"rows": merged(rows, args.out)}, args.out
            )  # after each network, should the next one fail
    for row in rows:
        found = row.get("held_back")
        text = row.get("note") or (
            f"changed {found['labels_ppm_worst'] or 0:.0f} ppm worst, {found['labels_ppm_mean'] or 0:.0f} mean, "
            f"Dice {found['dice_lowest'] or 1:.4f}, error {found['relative']:.1e}, "
            f"{'inside' if row['accepted'] else 'OUTSIDE'}; truth {row.get('truth')}; {row.get('variant', '')}"
        )
        print(f"{row['net']:24s} {row['backend']:18s} {row['precision']:20s} {text}")


if __name__ == "__main__":
    main()
