"""Images opened with all that is said of them one by one, not in a :class:`unet_rt.images.open.Reading`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from unet_rt.contract.contract import Contract
from unet_rt.images import open as images
from unet_rt.images.source import Source


def open_image(image: Any, contract: Contract, **options: Any) -> Source:
    said = {f.name: options.pop(f.name) for f in fields(images.Reading) if f.name in options}
    return images.open_image(image, contract, images.Reading(**said), **options)
