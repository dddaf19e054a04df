"""Reference networks (PyTorch; ``pip install unet-rt[torch]``)."""

from .unet import UNet, UNetSpec, crop_concat

__all__ = ["UNet", "UNetSpec", "crop_concat"]
