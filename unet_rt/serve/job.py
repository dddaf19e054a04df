"""What one process hands the other: a job and its answer, as lines of JSON; pixels lie in files of the job's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ServiceError
from ..system.json import Record

Format = Literal["png", "tif", "npy", "json", "view"]
MEDIA = {"png": "image/png", "tif": "image/tiff", "npy": "application/x-npy", "json": "application/json"}
CANCEL = "cancel"  # a file of this name in a job's folder ends its work


@dataclass(frozen=True)
class Options(Record):
    """What a request says beside engine and image; the words are those of ``unet-rt predict``.

    Attributes:
        format: Of the answer: a file, ``json`` with objects and GeoJSON, or ``view``: pictures kept for the page.
        output: ``mask``, ``probability``, ``raw`` or ``instances``; empty: the engine's own.
        head, axes, channels, normalize: As the command line takes them; empty: not given.
        mask_values: Value of every label in a mask; empty: 0, 1, ..
        min_size: Objects of fewer pixels are left out.
        reference: The image, where the request does not carry it.
        out: File or OME-Zarr to write below an allowed root, in place of an answer with pixels.
    """

    format: str = "png"
    output: str = ""
    head: str = ""
    axes: str = ""
    channels: str = ""
    normalize: str = ""
    mask_values: tuple[int, ...] = ()
    min_size: int = 1
    reference: str = ""
    out: str = ""


def read_options(query: Mapping[str, str], accept: str) -> Options:
    """The options of a request.

    Args:
        query: Its query parameters.
        accept: Its header of that name, which says the format where the query does not.

    Raises:
        ServiceError: 400 for unknown names and values.
    """
    known = {field.name for field in fields(Options)}
    values: dict[str, Any] = {}
    for name, text in query.items():
        if name not in known:
            raise ServiceError(400, f"the query parameter {name!r} is unknown; known are {', '.join(sorted(known))}")
        values[name] = text
    if "format" not in values:
        asked = {part.partition(";")[0].strip() for part in accept.split(",")}
        values["format"] = next((name for name, media in MEDIA.items() if media in asked), "png")
    if values["format"] not in get_args(Format):
        raise ServiceError(400, f"format={values['format']} is unknown; use {', '.join(get_args(Format))}")
    outputs = ("", "mask", "probability", "raw", "instances")
    if values.get("output", "") not in outputs:
        raise ServiceError(400, f"output={values['output']} is unknown; use {', '.join(outputs[1:])}")
    if values["format"] in ("json", "view") and values.get("output", "") not in ("", "mask"):
        raise ServiceError(
            400, f"format={values['format']} is made of a mask, not of output={values['output']}; leave output away"
        )
    try:
        if "mask_values" in values:
            values["mask_values"] = tuple(int(v) for v in values["mask_values"].split(","))
        if "min_size" in values:
            values["min_size"] = int(values["min_size"])
    except ValueError:
        raise ServiceError(400, "mask_values are integers by comma (0,255), and min_size is one integer") from None
    if values.get("min_size", 1) < 1:
        raise ServiceError(400, f"min_size={values['min_size']} px must be 1 or more; 1 keeps every object")
    if values.get("mask_values") and values["format"] in ("json", "view"):
        raise ServiceError(400, f"format={values['format']} names labels itself; leave mask_values away")
    return Options(**values)


@dataclass(frozen=True)
class Job(Record):
    """One piece of work of a process that computes.

    Attributes:
        kind: ``predict`` an image, or ``infer`` with the raw network.
        engine: Its name.
        folder: Where files of the job lie and results go.
        image: Path or URL of the image; empty for ``infer``.
        options: Of a prediction.
        shapes: Of the network's inputs, whose pixels lie in ``input-K``, in the graph's order.
    """

    kind: str
    engine: str
    folder: str
    image: str = ""
    options: Options = Options()
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def cancel(self) -> Path:
        return Path(self.folder) / CANCEL
