"""Real pixels for build and verify: windows of the user's images, with statistics of the whole image they come from."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..contract.contract import Contract
from ..errors import ImageError
from ..images.normalize import OnePlane, affine
from ..images.reading import Reading
from ..kernels.request import Affine
from ..prediction.work import filled

if TYPE_CHECKING:
    from ..engine.spec import InputSpec
    from ..images.source import Source


Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SampleWindow:
    """A window of one plane of a user's image, with the normalisation of the image it was taken from.

    Attributes:
        name: Image, plane and window, for messages.
        path: The image's file; None for arrays.
        pixels: (C, *spatial), raw.
        numbers: Normalisation of the image (or plane) that the window was taken from.
        start: The window's first pixel per axis.
        plane: The plane it was taken from.
        plane_shape: Pixels per axis of that plane.
        reading: How the image was read.
        sha256: Of the raw pixels.
    """

    name: str
    path: Path | None
    pixels: Array
    numbers: Affine
    start: tuple[int, ...]
    plane: int
    plane_shape: tuple[int, ...]
    reading: str
    sha256: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels per spatial axis."""
        return tuple(self.pixels.shape[1:])

    @property
    def affines(self) -> OnePlane:
        """The normalisation as predictions take it."""
        return OnePlane(self.numbers)

    def source(self, contract: Contract) -> Source:
        """The window as an image of its own; its normalisation remains that of the whole image (``affines``)."""
        from ..images.open import open_image

        spatial = self.pixels.ndim - 1
        return open_image(
            self.pixels,
            contract,
            Reading("C" + "ZYX"[-spatial:]),
            spatial=spatial,
            network_channels=len(self.pixels),
            name=self.name,
        )


def sample_images(samples: Any, note: Callable[[str], None] | None = None) -> list[Any]:
    """Files of paths and folders; arrays as they are. ``note`` receives a sentence about what else is in a folder."""
    from ..images.listing import list_images

    if isinstance(samples, str | Path):
        samples = [samples]
    if isinstance(samples, np.ndarray) or not isinstance(samples, Sequence):
        samples = [samples]
    if all(isinstance(s, str | Path) for s in samples):
        return list(list_images(samples, note))
    return list(samples)


@dataclass(frozen=True)
class ReadOptions:
    """What the user says of how images are to be read.

    Attributes:
        axes: Of the images, where files do not say.
        channels: Those of the image, in the network's order; ``"slices"``: neighbouring slices of a stack.
        series: Of files that hold several images: number, from 0, or name.
        nodata: Value of pixels that hold no data.
    """

    axes: str | None = None
    channels: Sequence[int] | str | None = None
    series: int | str | None = None
    nodata: float | None = None

    @property
    def reading(self) -> Reading:
        """The same as images are opened with."""
        return Reading(self.axes, self.channels, series=self.series, nodata=self.nodata)


def draw(
    images: Sequence[Any],
    contract: Contract,
    *,
    spatial: int,
    network_channels: int,
    read: ReadOptions = ReadOptions(),
    count: int = 20,
    max_px: int = 1024 * 1024,
    note: Callable[[str], None] | None = None,
) -> list[SampleWindow]:
    """Draws at most ``count`` windows of at most ``max_px`` pixels, spread over images and their planes.

    Of a larger image, the window with the highest variance among up to 25 is taken: foreground, not only background.
    Windows that prove nothing (constant or noise: the empty planes of a stack) are left out, and ``note`` receives a
    sentence about them.

    Raises:
        ImageError: No image, none that proves anything, or NaN among the pixels.
    """
    from ..images.open import open_image

    if not images:
        raise ImageError("no sample images; pass files or a folder with --samples")
    last = min(count, len(images)) - 1
    chosen = [images[round(k * (len(images) - 1) / max(1, last))] for k in range(last + 1)]
    samples, empty = list[SampleWindow](), list[str]()
    for position, image in enumerate(chosen):
        with open_image(image, contract, read.reading, spatial=spatial, network_channels=network_channels) as source:
            share = count // len(chosen) + (position < count % len(chosen))
            for sample in _windows_of(source, contract, share, max_px):
                reason = constant_reason(sample.pixels)
                if reason is not None:
                    empty.append(f"{sample.name} proves nothing about a trained network: {reason}")
                    continue
                if not np.isfinite(sample.pixels).all():
                    raise ImageError(f"{sample.name} holds NaN or infinite pixels; replace them first")
                samples.append(sample)
    if not samples:
        raise ImageError(f"{empty[0]}; pass images like those the network will see")
    if len(chosen) < len(images) and note is not None:
        note(
            f"windows are drawn from {len(chosen)} of {len(images)} images, spread over the list; pass the images that "
            "matter most, or fewer"
        )
    if empty and note is not None:
        note(f"{len(empty)} of {len(empty) + len(samples)} sample windows left out; the first: {empty[0]}")
    return samples


def _windows_of(source: Source, contract: Contract, count: int, max_px: int) -> Iterator[SampleWindow]:
    """A window of each of up to ``count`` planes of an image (one where ``count`` is 0), spread over the stack."""
    planes = sorted({round(p) for p in np.linspace(0, source.planes - 1, max(1, min(count, source.planes)))})
    normalization = contract.normalization
    numbers = None if normalization is None else affine(normalization, source)
    for plane in planes:
        start, stop = _choose_window(source, plane, max_px)
        known = numbers.plane(plane) if numbers is not None else unscaled(source.channels)
        # What holds no data is what a prediction makes of it.
        pixels = np.array(filled(*source.read_valid(plane, start, stop), known))
        name = source.name + (f" plane {plane}" if source.planes > 1 else "")
        if stop != tuple(source.shape) or any(start):
            name += " [" + ", ".join(f"{a}:{b}" for a, b in zip(start, stop, strict=True)) + "]"
        yield SampleWindow(
            name,
            source.path,
            pixels,
            known,
            start,
            plane,
            tuple(source.shape),
            source.reading,
            hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest(),
        )


def unscaled(channels: int) -> Affine:
    """Pixels as they are."""
    return Affine(np.zeros(channels, np.float32), np.ones(channels, np.float32), None)


def _choose_window(source: Source, plane: int, max_px: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if prod(source.shape) <= max_px:
        return (0,) * len(source.shape), tuple(source.shape)
    side = round(max_px ** (1 / len(source.shape)))
    size = tuple(min(side, n) for n in source.shape)
    grids = [sorted({int(v) for v in np.linspace(0, n - s, 5)}) for n, s in zip(source.shape, size, strict=True)]
    places = list(itertools.product(*grids))
    places = places[:: -(-len(places) // 25)]

    def variance(start: tuple[int, ...]) -> float:
        middle = tuple(a + s // 2 for a, s in zip(start, size, strict=True))
        half = tuple(min(s // 2, 96) for s in size)
        low = tuple(m - h for m, h in zip(middle, half, strict=True))
        high = tuple(m + max(h, 1) for m, h in zip(middle, half, strict=True))
        return float(np.var(source.read(plane, low, high).astype(np.float64)))

    start = max(places, key=variance)
    return start, tuple(a + s for a, s in zip(start, size, strict=True))


def draw_generated(
    contract: Contract, inputs: Sequence[InputSpec], spatial: int, count: int = 4, side: int = 512
) -> list[SampleWindow]:
    """Generated microscopy for builds without samples: enough to compare backends in FP32, no proof of anything else.

    Inputs that take whole numbers get grey levels that they hold.
    """
    from ..drawing.microscopy import microscopy

    samples, channels = [], sum(i.channels for i in inputs)
    highest = min((int(np.iinfo(i.dtype).max) for i in inputs if "int" in i.dtype), default=65535)
    for seed in range(count):
        size = side if spatial == 2 else 96
        layers = []
        for c in range(channels):
            picture = microscopy((size, size), seed=seed * 100 + c).image
            layers.append(picture if spatial == 2 else np.stack([np.roll(picture, 2 * z, axis=1) for z in range(size)]))
        pixels = np.stack(layers)
        scaled = contract.normalization is not None and contract.normalization.method in ("scale", "dtype", "fixed")
        if scaled or pixels.max() > highest:
            pixels = (pixels.astype(np.float32) / max(1, int(pixels.max())) * min(highest, 255)).astype(np.uint8)
        from ..images.open import open_image

        with open_image(
            pixels, contract, Reading("C" + "ZYX"[-spatial:]), spatial=spatial, network_channels=channels
        ) as source:
            if contract.normalization is None:
                mean, std = float(pixels.mean()), float(pixels.std())
                numbers = Affine(np.full(channels, mean, np.float32), np.full(channels, std, np.float32), None)
            else:
                numbers = affine(contract.normalization, source).plane(0)
        name = f"synthetic {seed}"
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        samples.append(SampleWindow(name, None, pixels, numbers, (0,) * spatial, 0, pixels.shape[1:], name, digest))
    return samples


def constant_reason(array: Array) -> str | None:
    """Why an array of pixels proves nothing about a trained network, or None where it may.

    Constants (zeros among them) and white noise, told by neighbours that have nothing to do with each other, exercise
    none of what a network was trained on. One plane with more than that is enough: stacks begin and end out of focus.
    """
    if array.size == 0:
        return "it is empty"
    low, high = float(array.min()), float(array.max())
    if low == high:
        return f"every pixel is {low:g}"
    if min(array.shape[-2:]) < 8:
        return None
    noise = None
    for plane in array.reshape(-1, *array.shape[-2:]):
        centred = plane - plane.mean(dtype=np.float64)
        power = float((centred**2).mean())
        if power == 0.0:
            continue
        along = float((centred[:, 1:] * centred[:, :-1]).mean()) / power
        down = float((centred[1:] * centred[:-1]).mean()) / power
        # the correlation of n independent pairs is 0 +- 1/sqrt(n); five of these deviations
        bound = 5 / np.sqrt(plane.size)
        if not (abs(along) < bound and abs(down) < bound):
            return None
        noise = noise or f"it is noise (neighbouring pixels correlate by {along:.3f} and {down:.3f})"
    return noise
