"""Settings of ONNX Runtime on a GPU, as the spec of an engine carries them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import BackendError
from ...system.json import Record, Size, from_json
from ..session import Port

Search = Literal["HEURISTIC", "EXHAUSTIVE", "DEFAULT"]


@dataclass(frozen=True)
class CudaOptions(Record):
    """Settings of a session that the trial chooses among."""

    prefer_nhwc: bool = False
    fuse_conv_bias: bool = False
    search: Search = "HEURISTIC"
    cuda_graph: bool = False
    up_conv: bool = False  # of the graph: transposed convolutions as 1 x 1 convolutions and DepthToSpace

    def __post_init__(self) -> None:
        if self.fuse_conv_bias and not self.prefer_nhwc:
            raise BackendError(
                "fuse_conv_bias without prefer_nhwc computes on two streams at once in ONNX Runtime; set both or neither"
            )

    @property
    def text(self) -> str:
        """In a few words, e.g. ``"HEURISTIC prefer_nhwc"``."""
        return " ".join([self.search, *(name for name, value in vars(self).items() if value is True)])

    def provider(self, index: int, precision: str, stream: int) -> dict[str, str]:
        """The provider's own options for device ``index``."""
        return {
            "device_id": str(index),
            "has_user_compute_stream": "1",
            "user_compute_stream": str(stream),
            "use_tf32": "0" if precision == "fp32" else "1",
            "prefer_nhwc": str(int(self.prefer_nhwc)),
            "fuse_conv_bias": str(int(self.fuse_conv_bias)),
            "cudnn_conv_algo_search": self.search,
            "cudnn_conv_use_max_workspace": "1",
            "enable_cuda_graph": str(int(self.cuda_graph)),
            # The arena takes what is asked; its default doubles, which wastes up to half of what a large batch takes.
            "arena_extend_strategy": "kSameAsRequested",
        }


@dataclass(frozen=True)
class Trial(Record):
    """What one setting did: milliseconds of a run, or why it could not be had."""

    options: CudaOptions
    ms: float | None = None
    note: str = ""


@dataclass(frozen=True)
class GraphPort(Record):
    """An input or output of a graph: free sizes by the names under which a session can be told them (None: unnamed)."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str

    @property
    def port(self) -> Port:
        return Port(self.name, tuple(n if isinstance(n, int) else None for n in self.shape), np.dtype(self.dtype))


@dataclass(frozen=True)
class Settings(Record):
    """What a graph is to be run with, and what that was chosen from; by default the provider's own, nothing tried."""

    options: CudaOptions = field(default_factory=CudaOptions)
    input_shapes: tuple[tuple[Size, ...], ...] = ()
    trials: tuple[Trial, ...] = ()
    inputs: tuple[GraphPort, ...] = ()
    outputs: tuple[GraphPort, ...] = ()


PROVIDERS_OWN = Settings()  # nothing was tried


def read_settings(data: Mapping[str, Any], graph: Path) -> Settings:
    """Inverse of ``Settings.to_json``; ``graph`` is what errors name.

    Raises:
        BackendError: They are damaged, or those of another version.
    """
    return from_json(
        Settings,
        data,
        where=f"{graph}: its settings are damaged, or those of another version of unet-rt",
        error=BackendError,
        way_out="build it again: unet-rt build model.onnx --overwrite",
    )
