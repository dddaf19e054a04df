"""What the templates of ``figures.txt`` are filled with: a record, or what is computed from several."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from render import Record, Records

DATA = Path(__file__).resolve().parents[1] / "unet_rt" / "data"
Source = Callable[[Records], "Record | list[Record]"]  # several: the template once for each

# ---------------------------------------------------------------------------------------------------------------- CPU

CPU_RECORDS = (
    "engine-paper", "winograd", "predict-nuclei", "predict-paper", "precision-paper", "memory", "startup", "latency",
    "kernels", "scaling", "overhead-nuclei", "build-nuclei", "quality-drawn", "quality-dsb2018", "quality-isbi2012",
    "roofline", "train", "large-sparse", "large-kill", "large-dask", "large-memory", "large-overhead",
)  # fmt: skip


def cpu_machines(records: Records) -> Record:
    """The machines of the CPU's records, in a sentence each."""
    found: dict[str, list[str]] = {}
    for name in filter(records.has, CPU_RECORDS):
        found.setdefault(processor(records(name)["machine"]), []).append(name)
    if len(found) == 1:
        (said,) = found
        return {"said": f"{said}."}
    return {"said": "\n".join(f"- {said}: {', '.join(f'`{name}`' for name in names)}" for said, names in found.items())}


def processor(data: Record) -> str:
    """Cores, instructions and libraries of a machine."""
    features = set(data["features"])
    names = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON"))
    vectors = next((said for key, said in names if key in features), "")
    vnni = features & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
    bf16 = features & {"avx512_bf16", "amx_bf16", "bf16"}
    return (
        f"{data['threads']} cores of {data['cpu']} with {vectors}, {'with' if vnni else 'without'} VNNI and "
        f"{'with' if bf16 else 'without'} BF16 instructions; "
        + versions(data, ("torch", "PyTorch"), ("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO"))
    )


def versions(data: Record, *names: tuple[str, str]) -> str:
    return ", ".join(f"{said} {data['versions'][key]}" for key, said in names if key in data["versions"])


def predicted(name: str) -> Callable[[Records], Record]:
    """Times end to end beside those of the first row that is not ours; a single run has no range."""

    def source(records: Records) -> Record:
        data = records(name)
        base = next(row for row in data["rows"] if not row["name"].startswith("unet-rt"))
        rows = [
            {k: v for k, v in row.items() if row["runs"] > 1 or "low" not in k}
            | {"ratio": row["mpx_per_s"] / base["mpx_per_s"]}
            for row in data["rows"]
        ]
        several = any(row["runs"] > 1 for row in rows)
        first = "MONAI" if base["name"].startswith("MONAI") else "by hand"
        what = "s, median (range)" if several else "s, one run"
        ours = [row for row in rows if "tiles" in row]
        return data | {"base": base, "rows": rows, "ours": ours, "first": first, "what": what}

    return source


def pipeline(records: Records) -> Record:
    """How much of the time the engine computes."""
    recorded = records("predict-nuclei")["spans"]
    long = max(stop for *_, stop in recorded["spans"])
    busy = sum(stop - start for stage, start, stop in recorded["spans"] if stage == "infer")
    return {"name": recorded["name"], "long": long, "share": busy / long}


SCALING_PLOTS = ("side", "memory", "tile", "halo", "batch", "threads", "channels", "width")


def qualities(records: Records) -> list[Record]:
    """What is judged of each set of images that there is a record of."""
    names = {"dsb2018": "Nuclei (dsb2018, fluorescence)", "isbi2012": "Membranes (isbi2012)", "drawn": "Drawn"}
    found = [
        records(f"quality-{name}") | {"said": said} for name, said in names.items() if records.has(f"quality-{name}")
    ]
    for data in found:
        halo = f" ({data['measured_halo']} of {data['halo']} samples)"
        data["rows"] = [row | {"halo": halo if "measured" in row["name"] else ""} for row in data["rows"]]
    return found


def roofline(records: Records) -> Record:
    data = records("roofline")
    return data | {"processor": processor(data["machine"])}


def by_name(name: str) -> Callable[[Records], Record]:
    """A record with its rows by their names."""
    return lambda records: {"by": {row["name"]: row for row in records(name)["rows"]}}


def kernels(records: Records) -> Record:
    """Ranges of speeds, by kind of kernel."""
    data = records("kernels")
    rows: list[Record] = data["results"]

    def twins(*starts: str, kind: str = "") -> str:
        found = [row["twin"] for row in rows if row["name"].startswith(starts) and kind in row["name"]]
        return rounded_range(found, 0)

    (softmax,) = (row["bandwidth"] for row in rows if row["name"].startswith("tile_stitch softmax"))
    return {
        "threads": data["threads"],
        "others": rounded_range([row["bandwidth"] for row in rows if "softmax" not in row["name"]], 1),
        "softmax": softmax,
        "gather": twins("tile_gather"),
        "labels": twins("tile_stitch argmax", "tile_stitch threshold"),
        "placing": twins("tile_stitch copy", kind="float32"),
    }


def rounded_range(values: Sequence[float], digits: int) -> str:
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def large(records: Records) -> Record:
    """The records of ``large.py`` that are there, each by its part's name."""
    found = {part: records.some(f"large-{part}") for part in ("sparse", "kill", "dask", "memory", "overhead")}
    for data in list(found["kill"]):
        parts = {name: data[name] for name in ("mask.zarr", "mask.tif")}
        kills, equal = sum(part["kills"] for part in parts.values()), all(part["equal"] for part in parts.values())
        found["kill"] = [{"kills": kills, "names": ", ".join(parts), "equal": equal}]
    return dict(found)


def engine(records: Records) -> Record:
    data = records("engine-paper")
    return data | {"single": [row for row in data["rows"] if row.get("batch", 1) == 1]}


def scaling(records: Records) -> Record:
    return records("scaling") | {"plots": SCALING_PLOTS}


def membranes(records: Records) -> Record:
    data = records("membranes")
    rows = [{"title": f"{r['network']}, {r['parameters']:,} parameters", **r["figures"]} for r in data["rows"]]
    return data | {
        "one": data["rows"][0] | {"optimizer": data["rows"][0]["optimizer"].title()},
        "lines": [*rows, {"title": "cell everywhere", **data["all_cell"]}],
    }


def slices(records: Records) -> Record:
    """Figures by the number of slices, augmented and plain."""
    rows: list[Record] = records("membranes-slices")["rows"]
    found: dict[int, Record] = {
        n: {"augmented": None, "plain": None} for n in sorted({r["training_slices"] for r in rows})
    }
    for r in rows:
        found[r["training_slices"]]["augmented" if r["augmented"] else "plain"] = r["figures"]
    return rows[0] | {"rows": found}


def shipped(records: Records) -> Record:
    """The network that ships, on drawn sections and on real slices, beside one that was trained on such slices."""
    ours: Record = json.loads((DATA / "membranes.json").read_text(encoding="utf-8"))
    taught: Record = records("membranes")["rows"][0]
    drawn, real = (ours["figures"][part] for part in ("test_drawn", "test_real"))
    figures = taught["figures"]
    names = {
        "pixel_error": "pixel error",
        "rand_error": "Rand error",
        "iou_cells": "IoU",
        "iou_membranes": "membrane IoU",
    }
    rows = [
        {"title": f"drawn, {drawn['images']} sections not trained on: the network that ships", **drawn},
        {"title": "cell everywhere", **drawn["cell_everywhere"]},
        {"title": f"ISBI 2012, slices 21 to {20 + real['images']}: the network that ships", **real},
        {"title": "cell everywhere", **real["cell_everywhere"]},
        {
            "title": f"{taught['network']} of width {taught['width']}, trained on {taught['training_slices']} slices of it",
            **{key: figures[name] for key, name in names.items()},
        },
    ]
    return ours | {"rows": rows}


def precisions(records: Records) -> Record:
    data = records("precision-paper")
    command, _, left_out = data["command"].partition(" (")
    rows = [r | {"title": "eager FP32" if k == 0 else f"unet-rt {r['name']}"} for k, r in enumerate(data["rows"])]
    said = f"`{command}`" + (f", {left_out.removesuffix(')')}" if left_out else "")
    return {"said": said, "rows": rows}


def parity(records: Records) -> Record:
    """Rows that were judged on images held back, and what was not built, by reason."""
    data = records("parity")
    rows = [row | {"variant": row.get("variant") or None, "truth": row.get("truth")} for row in data["rows"]]
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("held_back") is None:
            missing.setdefault((f"{row['backend']} {row['precision']}", row["note"]), []).append(row["net"])
    count = len({row["net"] for row in rows})
    judged = [row for row in rows if row.get("held_back") is not None]
    counts = sorted({row["held_back"]["images"] for row in judged})
    left = [
        {"what": what, "why": why, "nets": "every network" if len(nets) == count else "; ".join(nets)}
        for (what, why), nets in missing.items()
    ]
    return data | {"rows": judged, "left": left, "images": " or ".join(map(str, counts))}


# ---------------------------------------------------------------------------------------------------------------- GPU


def gpu_sections(records: Records) -> dict[str, Record]:
    """Sections of the record of the GPU, those of a later call for ``compile-max`` besides."""
    sections: dict[str, Record] = dict(records("gpu")["sections"])
    if records.has("gpu-compile-max"):
        later = {key: value for key, value in records("gpu-compile-max")["sections"].items() if value.get("rows")}
        sections |= {key: value for key, value in later.items() if key not in sections or key.startswith("compile")}
    return sections


def gpu_machine(records: Records) -> Record:
    sections = gpu_sections(records)
    machine, roof = sections["machine"], sections["roof"]
    libraries = versions(
        machine, ("torch", "PyTorch"), ("onnxruntime-gpu", "ONNX Runtime"), ("onnxruntime", "ONNX Runtime")
    )
    if machine.get("cudnn"):
        major, rest = divmod(int(machine["cudnn"]), 10_000)
        libraries += f", cuDNN {major}.{rest // 100}.{rest % 100}"
    products = ", ".join(
        f"{key.upper()} {roof[f'{key}_tflops']:,.0f}"
        for key in ("fp32", "tf32", "bf16", "fp16", "int8")
        if f"{key}_tflops" in roof
    )
    driver = machine["smi"].get("driver_version", "unknown")
    return {"gpu": machine["gpu"], "driver": driver, "libraries": libraries, "products": products, "roof": roof}


def contenders(sections: dict[str, Record], net: str) -> list[Record]:
    """Rows of a network; of the paper's also what other sections measured beside the same eager FP32."""
    rows: list[Record] = list(sections.get(net, {}).get("rows", []))
    for name in ("compile-default", "compile-max") if net == "paper" else ():
        found = sections.get(name, {}).get("rows", [])
        rows += [r for r in found if r["name"].startswith("torch.compile")]
    return rows


def gpu_engines(net: str) -> Source:
    """A table's record per tile and batch, slowest first."""

    def source(records: Records) -> list[Record]:
        sections = gpu_sections(records)
        own: list[Record] = sections[net]["rows"]
        keys = list(dict.fromkeys((int(r["tile"]), int(r["batch"])) for r in own))
        if net == "paper":
            keys = [(own[0]["tile"], batch) for batch in sorted({batch for _, batch in keys} & {1, 16}, reverse=True)]
        return [{"tile": tile, "batch": batch, "rows": shares(sections, net, tile, batch)} for tile, batch in keys]

    return source


def shares(sections: dict[str, Record], net: str, tile: int, batch: int) -> list[Record]:
    """Rows of one tile and batch, with their speed against eager FP32 and their share of the largest product."""
    rows = [
        r
        for r in contenders(sections, net)
        if r["batch"] == batch and (r["tile"] == tile or r["name"].startswith("torch.compile"))
    ]
    slowest = next(r["median_ms"] for r in rows if r["name"] == "eager FP32")
    peaks = sections["roof"]
    return [
        r
        | {"times": slowest / r["median_ms"]}
        | ({"share": r["tflops"] / peaks[f"{r['roof']}_tflops"]} if peaks.get(f"{r['roof']}_tflops") else {})
        for r in sorted(rows, key=lambda r: -float(r["median_ms"]))
    ]


WAYS = {
    "fixed": "host to host, declared normalisation",
    "own": "host to host, the image's own statistics",
    "device": "CUDA tensor to CUDA tensor, declared normalisation",
}


def gpu_predictions(records: Records) -> Record:
    """A row per network, engine, side and way of handing images over."""
    sections = gpu_sections(records)
    nets = (("predict-paper", "paper's U-Net"), ("predict-nuclei", "network that ships"))
    rows = [
        {
            "title": f"{net}, {r['engine'].removeprefix('unet-rt ')}, {r['side']} px, {said}",
            **{key: r[f"{way}_{key}"] for key in ("s", "low_s", "high_s", "mpx_per_s", "ratio")},
            "changed_labels": r.get("changed_labels"),
        }
        for name, net in nets
        for r in sections.get(name, {}).get("rows", [])
        for way, said in WAYS.items()
        if f"{way}_s" in r
    ]
    return {"rows": rows}


def anchors(records: Records) -> Record:
    rows = [r for r in records("gpu_anchors")["rows"] if r["name"].startswith("torch.compile") and "ms" in r]
    return {"rows": [r | {"how": r["name"].removeprefix("torch.compile ")} for r in rows]}


def gpu_kernels(records: Records) -> Record:
    return {"graphed": [row for row in gpu_sections(records)["kernels"]["rows"] if "share_graph" in row]}


def passes(records: Records) -> list[Record]:
    return [records(path.stem) for path in sorted(records.folder.glob("passes-*.json"))]


SOURCES: dict[str, Source] = {  # of blocks that are not simply a record of the same name
    "cpu-machine": cpu_machines,
    "engine-paper": engine,
    "predict-nuclei": predicted("predict-nuclei"),
    "predict-paper": predicted("predict-paper"),
    "pipeline": pipeline,
    "scaling": scaling,
    "overhead": lambda records: records("overhead-nuclei"),
    "quality": qualities,
    "roofline": roofline,
    "large": large,
    "startup": by_name("startup"),
    "kernels": kernels,
    "membranes": membranes,
    "membranes-slices": slices,
    "membranes-shipped": shipped,
    "precision-paper": precisions,
    "parity": parity,
    "passes": passes,
    "gpu-machine": gpu_machine,
    "gpu-anchors": anchors,
    "gpu-paper": gpu_engines("paper"),
    "gpu-nuclei": gpu_engines("nuclei"),
    "gpu-kernels": gpu_kernels,
    "gpu-predict": gpu_predictions,
}
