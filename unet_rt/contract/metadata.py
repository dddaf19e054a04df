"""Contracts in the metadata of ONNX files.

Keys of the ONNX ``metadata_props`` that are read (first match wins):

=============================  =====================================================================================
``unet_rt.contract``           the whole contract as JSON, as ``unet-rt export`` writes it
``unet_rt.<field>``            one field in the words of the command line: ``normalize``, ``normalize_scope``, ``axes``,
                               ``channels``, ``task``, ``output_is``, ``classes``, ``threshold``, ``pixel_size_um``,
                               ``trained_tile``, ``value_range``, ``border`` (lists by comma)
``Image.NominalPixelRange``    ONNX's own: ``NominalRange_0_255``, ``Normalized_0_1``, ``Normalized_1_1``
``Image.BitmapPixelFormat``    ONNX's own: ``Gray8``, ``Rgb8``, ``Bgr8`` give the channels and their order
=============================  =====================================================================================

A single ``unet_rt.`` key wins over the same field of ``unet_rt.contract``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ContractError
from .contract import Contract, Normalization
from .json import check_keys, contract_from_json
from .words import CHOICES, format_normalization, parse_normalization, parse_numbers

METADATA_KEY = "unet_rt.contract"
_RECORDS = (METADATA_KEY, "unet_rt.half")  # what passes and backends say of a graph: no fields


_SINGLE = (
    "normalize", "normalize_scope", "axes", "channels", "task", "output_is", "classes", "threshold", "pixel_size_um",
    "trained_tile", "value_range", "border",
)  # fmt: skip


def contract_from_metadata(metadata: Mapping[str, str]) -> Contract:
    """The contract in an ONNX file's ``metadata_props``; empty where there is none. See the module's docstring."""
    contract = _from_onnx_image_keys(metadata)
    if METADATA_KEY in metadata:
        try:
            data = json.loads(metadata[METADATA_KEY])
        except ValueError as error:
            raise ContractError(
                f"metadata key {METADATA_KEY} is not JSON ({error}); export the network again"
            ) from error
        if not isinstance(data, dict):
            raise ContractError(f"metadata key {METADATA_KEY} is not an object; export the network again")
        contract = contract_from_json(data).over(contract)
    own = {k.removeprefix("unet_rt."): v for k, v in metadata.items() if k.startswith("unet_rt.") and k not in _RECORDS}
    check_keys(own, _SINGLE, "metadata key unet_rt.<field>")
    values: dict[str, Any] = {}
    for key, text in own.items():
        if key in ("channels", "classes"):
            values[key] = [part.strip() for part in text.split(",")]
        elif key in ("threshold", "pixel_size_um", "trained_tile", "value_range"):
            values[key] = list(parse_numbers(text, key, f"unet_rt.{key}"))
        elif key == "normalize":
            values["normalization"] = parse_normalization(text, own.get("normalize_scope"))
        elif key != "normalize_scope":
            values[key] = text
    normalization = values.pop("normalization", None)
    if "normalize_scope" in own and normalization is None:
        if contract.normalization is None:
            raise ContractError("metadata has unet_rt.normalize_scope without unet_rt.normalize; add the latter")
        scope = own["normalize_scope"]
        normalization = parse_normalization(format_normalization(contract.normalization), scope)
    single = contract_from_json(values)
    return replace(single, normalization=normalization).over(contract)


def contract_to_metadata(contract: Contract) -> dict[str, str]:
    """What ``export`` writes; :func:`contract_from_metadata` reads it back equal."""
    return {METADATA_KEY: json.dumps(contract.to_json(), sort_keys=True)}


def _from_onnx_image_keys(metadata: Mapping[str, str]) -> Contract:
    """ONNX's documented image keys; keys and values are case-insensitive."""
    lower = {key.lower(): value.strip().lower() for key, value in metadata.items()}
    contract = Contract()
    pixel_range = lower.get("image.nominalpixelrange")
    if pixel_range is not None:
        readings = {
            "nominalrange_0_255": Normalization("none"),
            "normalized_0_1": Normalization("scale", scale=255.0),
            "normalized_1_1": Normalization("fixed", mean=(127.5,), std=(127.5,)),
        }
        if pixel_range not in readings:
            raise ContractError(
                f"metadata Image.NominalPixelRange {pixel_range!r} is not supported; declare it with --normalize: "
                f"{CHOICES}"
            )
        contract = replace(contract, normalization=readings[pixel_range], value_range=(0.0, 255.0))
    pixel_format = lower.get("image.bitmappixelformat")
    if pixel_format is not None:
        orders = {
            "gray8": ("gray",),
            "rgb8": ("red", "green", "blue"),
            "bgr8": ("blue", "green", "red"),
        }
        if pixel_format not in orders:
            raise ContractError(
                f"metadata Image.BitmapPixelFormat {pixel_format!r} is not supported; choose the channels with "
                "--channels"
            )
        contract = replace(contract, channels=orders[pixel_format])
    return contract
