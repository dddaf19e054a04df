"""Reference networks (PyTorch; ``pip install unet-rt[torch]``)."""

from .unet import UNet, UNetSpec, crop_concat
from .widen import load_half, save_half, widen

__all__ = ["UNet", "UNetSpec", "crop_concat", "load_half", "save_half", "widen"]
