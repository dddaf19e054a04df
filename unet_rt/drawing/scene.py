"""What a drawn micrograph shows and how it was taken: sizes, densities and light, fixed or drawn at random."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import ImageError


def check_limits(kind: str, drawn: object, limits: Iterable[tuple[str, float, float]]) -> None:
    """ImageError where an attribute of ``drawn``, a ``kind`` of thing, is outside its (name, lowest, highest)."""
    for name, low, high in limits:
        value = getattr(drawn, name)
        if not low <= value <= high:
            raise ImageError(f"{kind} {name} is {value}; use {low:g} to {high:g}")


@dataclass(frozen=True)
class Scene:
    """What one specimen under one microscope looks like.

    Attributes:
        radius_px: Median radius of a nucleus.
        radius_spread: Deviation of its logarithm.
        elongation: Typical ratio of the long to the short axis.
        cover: Wanted share of the area covered by nuclei; crowding keeps the real one below.
        cluster: Mean number of nuclei that touch in one cluster.
        signal_e: Median brightness of a nucleus in electrons per pixel.
        signal_spread: Deviation of its logarithm.
        texture: Contrast of chromatin inside a nucleus.
        background_e: Electrons per pixel without any nucleus.
        haze: Share of a nucleus's light that arrives out of focus.
        shading: Relative fall of the light from the brightest to the darkest part of the field, about.
        blur_px: Deviation of the Gaussian point spread function.
        read_e: Read noise in electrons.
        debris_per_mpx: Bright specks per million pixels; they are background in the truth.
    """

    radius_px: float = 11.0
    radius_spread: float = 0.2
    elongation: float = 1.25
    cover: float = 0.2
    cluster: float = 3.0
    signal_e: float = 400.0
    signal_spread: float = 0.35
    texture: float = 0.2
    background_e: float = 40.0
    haze: float = 0.1
    shading: float = 0.3
    blur_px: float = 1.2
    read_e: float = 3.0
    debris_per_mpx: float = 8.0

    def __post_init__(self) -> None:
        limits = (
            ("radius_px", 2.0, 40.0),
            ("radius_spread", 0.0, 0.5),
            ("elongation", 1.0, 2.5),
            ("cover", 0.0, 0.8),
            ("cluster", 1.0, 12.0),
            ("signal_e", 1.0, 30000.0),
            ("signal_spread", 0.0, 1.0),
            ("texture", 0.0, 1.0),
            ("background_e", 0.0, 30000.0),
            ("haze", 0.0, 1.0),
            ("shading", 0.0, 0.9),
            ("blur_px", 0.0, 4.0),
            ("read_e", 0.0, 1000.0),
            ("debris_per_mpx", 0.0, 1000.0),
        )
        check_limits("scene", self, limits)


def random_scene(seed: int) -> Scene:
    """A scene in the range of everyday microscopy: small to large nuclei, sparse to crowded, dim to bright."""
    rng = np.random.default_rng((seed, 0x5CE7E))
    signal = float(np.exp(rng.uniform(np.log(60), np.log(2500))))
    return Scene(
        radius_px=float(np.exp(rng.uniform(np.log(5), np.log(22)))),
        radius_spread=float(rng.uniform(0.1, 0.3)),
        elongation=float(rng.uniform(1.1, 1.6)),
        cover=float(rng.uniform(0.05, 0.45)),
        cluster=float(rng.uniform(1.0, 6.0)),
        signal_e=signal,
        signal_spread=float(rng.uniform(0.15, 0.5)),
        texture=float(rng.uniform(0.05, 0.35)),
        background_e=float(signal * np.exp(rng.uniform(np.log(0.02), np.log(0.25)))),
        haze=float(rng.uniform(0.0, 0.25)),
        shading=float(rng.uniform(0.0, 0.5)),
        blur_px=float(rng.uniform(0.7, 2.2)),
        read_e=float(rng.uniform(1.0, 6.0)),
        debris_per_mpx=float(rng.uniform(0.0, 30.0)),
    )
