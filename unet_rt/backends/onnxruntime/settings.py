"""Settings of ONNX Runtime on a GPU, as the graph carries them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import BackendError
from ..session import Port

RECORD = (
    "unet_rt.onnxruntime.cuda"  # key of the metadata entry of a built graph: its settings, and the trial behind them
)


@dataclass(frozen=True)
class Options:
    """Settings of a session that the trial chooses among."""

    prefer_nhwc: bool = False
    fuse_conv_bias: bool = False
    search: str = "HEURISTIC"
    cuda_graph: bool = False
    up_conv: bool = False  # of the graph: transposed convolutions as 1 x 1 convolutions and DepthToSpace

    def __post_init__(self) -> None:
        if self.fuse_conv_bias and not self.prefer_nhwc:
            raise BackendError(
                "fuse_conv_bias without prefer_nhwc computes on two streams at once in ONNX Runtime; set both or neither"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Options:
        if set(data) != set(cls.__dataclass_fields__):
            raise BackendError(
                f"the graph records the settings {', '.join(data)}, as another version of unet-rt has them; build it again: "
                "unet-rt build model.onnx --overwrite"
            )
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

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
class Trial:
    """What one setting did: milliseconds of a run, or why it could not be had."""

    options: Options
    ms: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"options": self.options.to_json(), "ms": self.ms, "note": self.note}


@dataclass(frozen=True)
class Named:
    """An input or output of a graph: free sizes by the names under which a session can be told them (None: unnamed)."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str

    @property
    def port(self) -> Port:
        return Port(self.name, tuple(n if isinstance(n, int) else None for n in self.shape), np.dtype(self.dtype))


@dataclass(frozen=True)
class Record:
    """What ``build`` wrote into a graph: the settings it is to be run with, and what they were chosen from."""

    options: Options = field(default_factory=Options)
    input_shapes: tuple[tuple[int, ...], ...] = ()
    trials: tuple[Trial, ...] = ()
    inputs: tuple[Named, ...] = ()
    outputs: tuple[Named, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        return cls(
            Options.from_json(data["options"]),
            tuple(tuple(int(n) for n in shape) for shape in data["input_shapes"]),
            tuple(Trial(Options.from_json(t["options"]), t["ms"], t["note"]) for t in data["trials"]),
            tuple(Named(v["name"], tuple(v["shape"]), v["dtype"]) for v in data["inputs"]),
            tuple(Named(v["name"], tuple(v["shape"]), v["dtype"]) for v in data["outputs"]),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [{**vars(value), "shape": list(value.shape)} for value in self.inputs],
            "outputs": [{**vars(value), "shape": list(value.shape)} for value in self.outputs],
            "options": self.options.to_json(),
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "trials": [trial.to_json() for trial in self.trials],
        }


# Loading --------------------------------------------------------------------------------------------------------------


def metadata(graph: Path) -> dict[str, str]:
    """The metadata entries of an ONNX file, without reading its weights or importing ONNX (field 14 of its protobuf)."""
    found: dict[str, str] = {}
    with graph.open("rb") as stream:
        while True:
            tag = _varint(stream)
            if tag is None:
                return found
            number, kind = tag >> 3, tag & 7
            if kind == 0:
                _varint(stream)
            elif kind in (1, 5):
                stream.seek(8 if kind == 1 else 4, io.SEEK_CUR)
            elif kind == 2:
                size = _varint(stream) or 0
                if number != 14:
                    stream.seek(size, io.SEEK_CUR)
                    continue
                entry = io.BytesIO(stream.read(size))
                pair = {}
                while (inner := _varint(entry)) is not None:
                    pair[inner >> 3] = entry.read(_varint(entry) or 0).decode()
                found[pair.get(1, "")] = pair.get(2, "")
            else:
                raise BackendError(
                    f"{graph} is not an ONNX file (field {number} of kind {kind}); build the engine again"
                )


def _varint(stream: BinaryIO) -> int | None:
    """The next variable-length integer, None at the end."""
    value, shift = 0, 0
    while byte := stream.read(1):
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7
    return None


def read_record(graph: Path) -> Record:
    """What ``build`` recorded in ``graph``; the provider's own settings and nothing else where it recorded nothing."""
    try:
        text = metadata(graph).get(RECORD)
    except FileNotFoundError as error:
        raise BackendError(f"{graph} does not exist; build the engine again") from error
    return Record() if text is None else Record.from_json(json.loads(text))
