"""Contracts of networks of segmentation_models_pytorch."""

from __future__ import annotations

from ..errors import ContractError
from .contract import Contract, Normalization
from .words import IMAGENET

# Encoders of segmentation_models_pytorch by the beginning of their names. The library itself asks its hub for these
# numbers since version 0.4; unet-rt downloads nothing. Colours are red, green, blue scaled to [0, 1] in all of them.
SMP_HALF = ((0.5,) * 3, (0.5,) * 3)
SMP_IMAGENET = (IMAGENET.mean, IMAGENET.std)
SMP_ENCODERS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    **dict.fromkeys(
        (
            "resnet", "resnext", "densenet", "vgg", "mobilenet", "efficientnet", "timm-efficientnet", "timm-resnest",
            "timm-res2", "timm-regnet", "timm-skres", "timm-mobilenet", "se_res", "senet", "mit_b", "mobileone",
        ),
        SMP_IMAGENET,
    ),
    **dict.fromkeys(("inception", "xception"), SMP_HALF),
    "dpn": ((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3),
    "timm-gernet": ((0.0,) * 3, (1.0,) * 3),
}  # fmt: skip


def contract_from_smp(encoder: str, *, weights: str | None = "imagenet", classes: tuple[str, ...] = ()) -> Contract:
    """What a network of segmentation_models_pytorch expects: the normalisation that its encoder was trained with.

    Args:
        encoder: As given to the network, e.g. ``"resnet34"``.
        weights: As given to the network; a network trained from the start is normalised as you trained it.
        classes: Names of the classes.

    Raises:
        ContractError: the encoder is not known.
    """
    if encoder.startswith("tu-"):
        mean, std = _timm(encoder.removeprefix("tu-"))
    else:
        found = [v for name, v in SMP_ENCODERS.items() if encoder.startswith(name)]
        if not found:
            raise ContractError(
                f"the normalisation of encoder {encoder!r} is not known here; declare it, e.g. "
                "Contract(normalization=parse_normalization('imagenet'))"
            )
        mean, std = SMP_HALF if weights == "advprop" else found[0]
    normalization = Normalization("fixed", scale=255.0, mean=mean, std=std)
    return Contract(
        axes="NCYX", channels=("red", "green", "blue"), normalization=normalization, output_is="logits", classes=classes
    )


def _timm(encoder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) from timm's own table, which is part of its package."""
    try:
        from timm.models import get_pretrained_cfg
    except ModuleNotFoundError as error:
        raise ContractError(f"timm is missing, which knows how {encoder} wants pixels; pip install timm") from error
    found = get_pretrained_cfg(encoder)
    if found is None:
        raise ContractError(f"timm knows no encoder {encoder!r}; declare the normalisation of your own training")
    return tuple(float(m) for m in found.mean), tuple(float(v) for v in found.std)
