"""The table at the front: what README.md promises, from the records that the other tables are drawn from."""

from __future__ import annotations

from collections.abc import Iterator

from figures import gpu_sections, predicted
from render import Record, Records


def front(records: Records) -> Record:
    """A row per promise, as far as there are records; the strongest that we are held against, not the slowest."""
    rows = [*front_images(records)]
    for data in records.some("overhead-nuclei"):
        for r in (r for r in data["rows"] if r["name"] == "openvino fp32, given graph"):
            task = f"one tile of {data['tile']} px, the network that ships, FP32"
            rows.append({"task": task, "against": "OpenVINO called directly", "ratio": 1 / r["ratio"]})
    gpu = front_gpu(records)
    rows += gpu["rows"]
    for data in records.some("memory"):
        size, memory = data["side"], f"{data['beyond_engine_bytes'] / 1e6:,.0f} MB beyond the engine"
        rows.append({"task": f"TIFF of {size:,} x {size:,} px to a mask", "memory": memory})
    for data in records.some("large-sparse"):
        task = f"sparse Zarr of {data['size']:,} x {data['size']:,} px to a mask"
        rows.append({"task": task, "memory": f"{data['peak_mb']:,.0f} MB in all"})
    machine = records("predict-nuclei")["machine"]
    return {"rows": rows, "threads": machine["threads"], "cpu": machine["cpu"], "gpu": gpu["name"]}


def front_images(records: Records) -> Iterator[Record]:
    """Images end to end: FP32 and INT8 of both networks."""
    for name, net in (("predict-nuclei", "the network that ships"), ("predict-paper", "the paper's U-Net")):
        for _ in records.some(name):
            data = predicted(name)(records)
            for r in data["ours"]:
                size = f"{r['side']:,} x {r['side']:,} px"
                task = f"TIFF of {size} to a mask, {net}, {r['name'].rpartition(' ')[2].upper()}"
                yield {
                    "task": task,
                    "against": data["base"]["name"],
                    "ratio": r["ratio"],
                    "changed": r["changed_labels"],
                }


def front_gpu(records: Records) -> Record:
    """Our fastest FP16 engine for a single tile, against PyTorch's fastest way that was measured in the same run."""
    if not records.has("gpu"):
        return {"rows": [], "name": None}
    sections = gpu_sections(records)
    rows = [r for r in sections.get("paper", {}).get("rows", []) if (r["batch"], r["roof"]) == (1, "fp16")]
    ours = sorted((r for r in rows if r["name"].startswith("unet-rt ")), key=lambda r: float(r["median_ms"]))[:1]
    eager = sorted((r for r in rows if " channels_last" in r["name"]), key=lambda r: float(r["median_ms"]))[:1]
    made = [
        {
            "task": f"one tile of {r['tile']} px on a GPU, the paper's U-Net, FP16",
            "against": f"PyTorch {other['name']}",
            "ratio": other["median_ms"] / r["median_ms"],
            "changed": 1 - r["label_agreement"],
        }
        for r, other in zip(ours, eager, strict=False)
    ]
    return {"rows": made, "name": sections["machine"]["gpu"]["name"]}
