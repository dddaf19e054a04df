"""A trained network of the paper's size, for benchmarks: ``python benchmarks/paper_net.py``.

The valid-padded U-Net of width 8 that ships with the package is widened by 8, without changing what it computes, to the
paper's 31,030,658 parameters. Written once, as ONNX and as a torch checkpoint, into the user's cache folder
(``$XDG_CACHE_HOME/unet-rt``, else ``~/.cache/unet-rt``); prints both paths.

    from paper_net import paper_net
    onnx_path, checkpoint_path = paper_net()
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

import unet_rt.models.widen as widening
from unet_rt.contract import Contract, Normalization
from unet_rt.export import export
from unet_rt.models import load_half, widen
from unet_rt.synthetic import microscopy
from unet_rt.training import normalized, predict_whole, save_checkpoint

SMALL = Path(widening.__file__).parents[1] / "data" / "paper_w8.npz"
FACTOR = 8
PARAMETERS = 31_030_658
TILE_PX = 572


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "unet-rt"


def paper_net(folder: Path | None = None, *, refresh: bool = False) -> tuple[Path, Path]:
    """(model.onnx, model.pt), made if they are not there. Their names hold a hash of what they are made from."""
    made_from = SMALL.read_bytes() + Path(widening.__file__).read_bytes() + str(FACTOR).encode()
    name = f"paper-{hashlib.sha256(made_from).hexdigest()[:12]}"
    folder = cache_folder() if folder is None else folder
    graph, checkpoint = folder / f"{name}.onnx", folder / f"{name}.pt"
    if graph.exists() and checkpoint.exists() and not refresh:
        return graph, checkpoint
    folder.mkdir(parents=True, exist_ok=True)

    small = load_half(SMALL)
    wide = widen(small, FACTOR)
    count = sum(p.numel() for p in wide.parameters())
    if count != PARAMETERS:
        raise SystemExit(
            f"the widened network has {count} parameters, the paper's has {PARAMETERS}; {SMALL} is another"
        )
    contract = Contract(
        axes="NCYX",
        channels=("nuclei",),
        normalization=Normalization("percentile", scope="image"),
        task="multiclass",
        output_is="logits",
        classes=("background", "nucleus"),
        trained_tile=tuple(json.loads(SMALL.with_suffix(".json").read_text())["recipe"]["tile_px"] for _ in range(2)),
    )
    drawn = microscopy((TILE_PX, TILE_PX), seed=1)
    pixels = normalized(drawn.image[None], Normalization("percentile", scope="image"))
    changed = agreement(predict_whole(small, pixels), predict_whole(wide, pixels))
    if changed > 1e-4:
        raise SystemExit(f"widening changed {changed:.2%} of the labels of a drawn image; it must change none")
    # Checked at the smallest tiles: at the paper's own, float64 torch takes minutes on a small machine.
    sizes = [wide.spec.size_at_least(1), wide.spec.size_at_least(200)]
    export(wide, graph, contract=contract, sizes=sizes, pixels=pixels)
    save_checkpoint(checkpoint, wide, contract, {"made_from": SMALL.name, "factor": FACTOR})
    return graph, checkpoint


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of labels that differ."""
    return float((a.argmax(0) != b.argmax(0)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder instead of the cache")
    parser.add_argument("--refresh", action="store_true", help="make it anew")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for path in paper_net(given.out, refresh=given.refresh):
        print(path)


if __name__ == "__main__":
    main()
