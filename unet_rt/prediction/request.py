"""What is asked for beyond an engine and an image, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..contract.contract import Normalization
from ..engine.engine import Engine
from ..engine.tta import Tta
from ..errors import ContractError, OutputError
from ..images.source import Source
from ..outputs import objects as objects_module

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tables:
    """What is wanted of objects beside their image.

    Attributes:
        min_size: Objects of fewer pixels (voxels) are left out.
        objects: CSV of all objects.
        areas: CSV of what each class covers.
        geojson: Outlines as GeoJSON polygons, for slide viewers; 2-D images of one plane.
    """

    min_size: int = 1
    objects: Path | None = None
    areas: Path | None = None
    geojson: Path | None = None


@dataclass(frozen=True)
class Request:
    """What is asked for beyond an engine and an image, in types that JSON and other processes know.

    Attributes:
        output: ``mask``, ``probability``, ``raw`` or ``instances``.
        mask_values, tile, batch, threads: As for :func:`unet_rt.prediction.predict.predict`.
        normalization: In use: the contract's or the user's.
        pixel_size_um: Of the image; empty where not known.
        resample: Bring the image to the pixel size of the contract.
        region: Path of an image: predictions are wanted where it is not 0.
        memory_bytes: Bound on the resident memory; None: a share of what is free. The plan of a run that was begun stays.
        tta, head: As for :func:`unet_rt.prediction.predict.predict`; the engine is the view that they make.
        shard: (index, count): this process computes every count-th block.
        processes: How many share this machine's memory and threads.
    """

    output: str
    normalization: Normalization
    mask_values: tuple[int, ...] = ()
    tile: tuple[int, ...] | None = None
    batch: int = 1
    threads: int = 0
    pixel_size_um: tuple[float, ...] = ()
    resample: bool = False
    region: str | None = None
    memory_bytes: int | None = None
    shard: tuple[int, int] = (0, 1)
    tta: Tta = "none"
    head: str | None = None
    processes: int = 1


def checked(engine: Engine, source: Source, asked: Request, tables: Tables | None) -> Tables:
    """What is wanted of objects; raises now what would otherwise be said after all the work."""
    if asked.output != "instances":
        if tables is not None:
            raise ContractError("tables list objects; use --output instances")
        return Tables()
    if asked.mask_values:
        raise ContractError("--output instances numbers objects from 1 on; leave --mask-values away")
    if engine.spec.contract.task == "multilabel":
        raise ContractError(
            "objects of a multi-label task overlap; predict its masks, and label each (unet_rt.objects)"
        )
    objects_module.morphology()
    tables = tables or Tables()
    if tables.geojson is not None and (len(source.shape) != 2 or source.planes != 1):
        raise ContractError("GeoJSON holds outlines of one 2-D picture; leave --geojson away")
    return tables


def check_tables(tables: Tables, *, overwrite: bool) -> None:
    for path in (tables.objects, tables.areas, tables.geojson):
        if path is not None and path.exists() and not overwrite:
            raise OutputError(f"{path}: exists already; use --overwrite to replace it, or choose another name")
