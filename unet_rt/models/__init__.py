"""Reference networks (PyTorch; ``pip install unet-rt[torch]``)."""

from .architecture import Network, architecture_of, network_of
from .fcn import FCN8s, FCN8sSpec
from .segnet import SegNet, SegNetSpec
from .skip import crop_concat
from .stored import load_half, save_half, unet_from_onnx
from .unet import UNet, UNetSpec
from .widen import widen

__all__ = [
    "FCN8s",
    "FCN8sSpec",
    "Network",
    "SegNet",
    "SegNetSpec",
    "UNet",
    "UNetSpec",
    "architecture_of",
    "crop_concat",
    "load_half",
    "network_of",
    "save_half",
    "unet_from_onnx",
    "widen",
]
