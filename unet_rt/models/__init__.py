"""Reference networks (PyTorch; ``pip install unet-rt[torch]``)."""

from .stored import load_half, save_half, unet_from_onnx
from .unet import UNet, UNetSpec, crop_concat
from .widen import widen

__all__ = ["UNet", "UNetSpec", "crop_concat", "load_half", "save_half", "unet_from_onnx", "widen"]
