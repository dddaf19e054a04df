"""Trained networks for benchmarks, the paper's size among them: ``python benchmarks/paper_net.py``.

``paper()``: the valid-padded U-Net of width 8 that ships with the package, widened by 8 without changing what it
computes, to the paper's 31,030,658 parameters. ``nuclei(widen=n)``: the embedded default, as it is or widened.

What is made is written once, as ONNX and as a torch checkpoint, into the user's cache folder
(``$XDG_CACHE_HOME/unet-rt``, else ``~/.cache/unet-rt``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import unet_rt
from unet_rt import models
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.contract.json import contract_from_json
from unet_rt.drawing.microscopy import microscopy
from unet_rt.models import stored
from unet_rt.models import widen as widened
from unet_rt.models.checkpoint import load_checkpoint, save_checkpoint
from unet_rt.models.unet import UNet, UNetSpec
from unet_rt.training.evaluate import predict_whole
from unet_rt.training.export import METADATA_KEY, export
from unet_rt.training.samples import normalized

DATA = Path(unet_rt.__file__).parent / "data"
PAPER_PARAMETERS = 31_030_658


@dataclass(frozen=True)
class Net:
    """A network on disk.

    Attributes:
        onnx: The graph.
        checkpoint: The same as a torch checkpoint.
        contract: Its input contract.
        parameters: Weights and biases of the module.
    """

    onnx: Path
    checkpoint: Path
    contract: Contract
    parameters: int

    def module(self) -> UNet:
        """A fresh module, evaluation mode, no gradients."""
        network, _, _ = load_checkpoint(self.checkpoint)
        return network.requires_grad_(False)


def paper(widen: int = 8) -> Net:
    """The trained valid U-Net of the paper's size (``widen=8``): 572 x 572 px -> 388 x 388."""
    net = _made("paper", DATA / "paper_w8.npz", factor=widen)
    if widen == 8 and net.parameters != PAPER_PARAMETERS:
        raise SystemExit(f"the widened network has {net.parameters} parameters, the paper's has {PAPER_PARAMETERS}")
    return net


def nuclei(widen: int = 1) -> Net:
    """The embedded default (same padding, depth 3, width 12), widened by a factor."""
    return _made("nuclei", DATA / "nuclei.onnx", factor=widen)


def drawn(count: int, side: int) -> list[Any]:
    """Drawn micrographs of ``side`` px, (side, side) uint16: samples to build from, other ones than are measured on."""
    return [microscopy((side, side), seed=seed).image for seed in range(count)]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "unet-rt"


def _made(name: str, source: Path, factor: int) -> Net:
    """From the cache if it is there; the file's name holds a hash of all that it is made from."""
    code = b"".join(p.read_bytes() for p in sorted(Path(models.__file__).parent.glob("*.py")))
    key = hashlib.sha256(source.read_bytes() + code + str(factor).encode()).hexdigest()[:12]
    folder = cache_folder()
    graph, checkpoint = folder / f"{name}-x{factor}-{key}.onnx", folder / f"{name}-x{factor}-{key}.pt"
    if not (graph.exists() and checkpoint.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        small, contract = _shipped(source)
        wide = widened(small, factor) if factor > 1 else small
        drawn = microscopy((384, 384), seed=1)
        pixels = normalized(drawn.image[None], contract.normalization or Normalization("none"))
        changed = (predict_whole(small, pixels).argmax(0) != predict_whole(wide, pixels).argmax(0)).mean()
        if changed > 1e-4:
            raise SystemExit(
                f"widening {source.name} by {factor} changed {changed:.2%} of the labels; it must change none"
            )
        # Compared at small tiles: float64 torch at 572 px takes minutes on a small machine.
        sizes = [wide.spec.size_at_least(1), wide.spec.size_at_least(200)]
        export(wide, graph, contract=contract, sizes=sizes, pixels=pixels)
        save_checkpoint(checkpoint, wide, contract, {"made_from": source.name, "factor": factor})
    network, contract, _ = load_checkpoint(checkpoint)
    return Net(graph, checkpoint, contract, sum(p.numel() for p in network.parameters()))


def _shipped(source: Path) -> tuple[UNet, Contract]:
    record = json.loads(source.with_suffix(".json").read_text())
    if source.suffix == ".npz":
        return stored.load_half(source), contract_from_json(record["contract"])
    import onnx

    model = onnx.load(source)
    metadata = {p.key: p.value for p in model.metadata_props}
    network = stored.unet_from_onnx(model, UNetSpec(**record["architecture"]))
    return network, contract_from_json(json.loads(metadata[METADATA_KEY]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    for net in (paper(), nuclei(), nuclei(widen=4)):
        print(f"{net.parameters:>12,} parameters  {net.onnx}")


if __name__ == "__main__":
    main()
