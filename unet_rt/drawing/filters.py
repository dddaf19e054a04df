"""Noise and blur for drawn images, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], sigma_px: float) -> npt.NDArray[np.float64]:
    """White noise under a Gaussian, periodic, of deviation 1."""
    size = tuple(shape)
    spectrum = low_pass(np.fft.rfft2(rng.standard_normal(size)), size, sigma_px)
    field = np.fft.irfft2(spectrum, s=size)
    scaled: npt.NDArray[np.float64] = field / field.std()
    return scaled


def low_pass(spectrum: npt.NDArray[Any], shape: tuple[int, ...], sigma_px: float) -> npt.NDArray[Any]:
    """The spectrum (``rfft2``) of an image of ``shape`` under a Gaussian of deviation ``sigma_px``."""
    frequency = np.fft.fftfreq(shape[0])[:, None] ** 2 + np.fft.rfftfreq(shape[1])[None, :] ** 2
    filtered: npt.NDArray[Any] = spectrum * np.exp(-2 * (np.pi * sigma_px) ** 2 * frequency)
    return filtered


def gaussian_kernel(sigma: float) -> F32:
    """Odd kernel of sum 1, cut at 3.5 sigma."""
    if sigma == 0:
        return np.ones(1, np.float32)
    radius = int(np.ceil(3.5 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    out: F32 = (kernel / kernel.sum()).astype(np.float32)
    return out


def blur(image: F32, kernel: F32) -> F32:
    """Separable convolution; the result has lost half the kernel at each side."""
    n = len(kernel)
    if n == 1:
        sharp: F32 = image * kernel[0]
        return sharp
    kept = image.shape[0] - n + 1
    rows = np.zeros((kept, image.shape[1]), np.float32)
    for k in range(n):
        rows += kernel[k] * image[k : k + kept]
    out = np.zeros((kept, image.shape[1] - n + 1), np.float32)
    for k in range(n):
        out += kernel[k] * rows[:, k : k + out.shape[1]]
    return out
