"""What a drawn section of tissue is made of: sizes, shares and contrasts, fixed or drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scene import check_limits


@dataclass(frozen=True)
class Tissue:
    """What one section looks like.

    Attributes:
        cell_px: Median radius of a cell.
        cell_spread: Deviation of its logarithm.
        elongation: Typical ratio of the axes of a cell in a bundle.
        bundles: Share of the area that is bundles.
        membrane_px: Thickness of a membrane, at half its depth.
        membrane_depth: Grey levels by which it is darker than a cell.
        oblique: Share of membranes that are cut obliquely: wide, grey and blurred.
        dense: Share of membranes in dark clouds; those are membrane in the truth.
        mitochondria_per_mpx, vesicles_per_mpx: Per million pixels.
        texture: Deviation of the grain of a cell, grey levels.
        grey: Of a cell, on average.
        cell_contrast: Deviation of that between cells.
        shading: Deviation of the uneven light, grey levels.
        blur_px: Deviation of the Gaussian blur.
        noise: Deviation of the detector's noise, grey levels.
    """

    cell_px: float = 17.0
    cell_spread: float = 0.75
    elongation: float = 3.0
    bundles: float = 0.3
    membrane_px: float = 4.4
    membrane_depth: float = 84.0
    oblique: float = 0.15
    dense: float = 0.05
    mitochondria_per_mpx: float = 40.0
    vesicles_per_mpx: float = 1500.0
    texture: float = 30.0
    grey: float = 150.0
    cell_contrast: float = 9.0
    shading: float = 9.0
    blur_px: float = 0.7
    noise: float = 13.0

    def __post_init__(self) -> None:
        limits = (
            ("cell_px", 4.0, 100.0),
            ("cell_spread", 0.0, 1.0),
            ("elongation", 1.0, 6.0),
            ("bundles", 0.0, 1.0),
            ("membrane_px", 2.0, 16.0),
            ("membrane_depth", 1.0, 200.0),
            ("oblique", 0.0, 0.5),
            ("dense", 0.0, 0.5),
            ("mitochondria_per_mpx", 0.0, 200.0),
            ("vesicles_per_mpx", 0.0, 10000.0),
            ("texture", 0.0, 60.0),
            ("grey", 20.0, 235.0),
            ("cell_contrast", 0.0, 40.0),
            ("shading", 0.0, 40.0),
            ("blur_px", 0.0, 4.0),
            ("noise", 0.0, 60.0),
        )
        check_limits("tissue", self, limits)


def random_tissue(seed: int) -> Tissue:
    """A tissue in the range of what is seen: small to large cells, faint to strong membranes, smooth to noisy."""
    rng = np.random.default_rng((seed, 0x7155))
    return Tissue(
        cell_px=float(rng.uniform(13, 25)),
        cell_spread=float(rng.uniform(0.55, 0.85)),
        elongation=float(rng.uniform(2.0, 4.0)),
        bundles=float(rng.uniform(0.0, 0.5)),
        membrane_px=float(rng.uniform(3.4, 5.2)),
        membrane_depth=float(rng.uniform(60, 100)),
        oblique=float(rng.uniform(0.05, 0.25)),
        dense=float(rng.uniform(0.0, 0.08)),
        mitochondria_per_mpx=float(rng.uniform(20, 80)),
        vesicles_per_mpx=float(rng.uniform(300, 3000)),
        texture=float(rng.uniform(20, 38)),
        grey=float(rng.uniform(125, 165)),
        cell_contrast=float(rng.uniform(4, 14)),
        shading=float(rng.uniform(4, 14)),
        blur_px=float(rng.uniform(0.5, 1.1)),
        noise=float(rng.uniform(5, 22)),
    )
