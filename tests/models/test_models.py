"""The U-Net of the paper, its relatives, and widening."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the reference networks need torch; pip install unet-rt[torch]")

from unet_rt.errors import GraphError
from unet_rt.models import widen
from unet_rt.models.architecture import KINDS, architecture_of, network_of
from unet_rt.models.fcn import FCN8s, FCN8sSpec
from unet_rt.models.segnet import SegNet
from unet_rt.models.skip import crop_concat
from unet_rt.models.stored import load_half, save_half
from unet_rt.models.unet import UNet, UNetSpec

pytestmark = pytest.mark.torch


def parameters(network: Any) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_default_is_the_network_of_the_paper() -> None:
    network = UNet()
    assert parameters(network) == 31_030_658
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
    assert len(convolutions) == 23
    assert max(m.out_channels for m in convolutions) == 1024
    spec = network.spec
    assert spec.out_size(572) == 388
    assert [spec.crop(level) for level in range(4)] == [88, 40, 16, 4]


def test_the_paper_s_tile_gives_the_paper_s_output() -> None:
    narrow = UNet(UNetSpec(width=2)).eval()
    with torch.no_grad():
        assert narrow(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)


def test_he_initialisation_keeps_the_variance() -> None:
    """Deviation of every 3 x 3 convolution is sqrt(2 / fan-in), known to a few percent from its samples."""
    torch.manual_seed(0)
    network = UNet(UNetSpec(width=16, depth=3))
    for m in network.modules():
        if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 2000:
            fan_in = m.in_channels * m.weight[0, 0].numel()
            tolerance = 5 / np.sqrt(2 * m.weight.numel())
            assert m.weight.std().item() == pytest.approx(np.sqrt(2 / fan_in), rel=tolerance)
            assert m.bias.abs().max() == 0
    with torch.no_grad():
        y = network.eval()(torch.randn(1, 1, 140, 140))
    assert 0.1 < y.std().item() < 10


specs = st.builds(
    UNetSpec,
    in_channels=st.integers(1, 3),
    classes=st.integers(1, 3),
    width=st.integers(1, 3),
    depth=st.integers(1, 3),
    dims=st.sampled_from([2, 3]),
    padding=st.sampled_from(["valid", "same"]),
    norm=st.sampled_from(["none", "batch"]),
    dropout=st.just(0.1),
    up=st.sampled_from(["transposed", "bilinear", "nearest"]),
).filter(lambda s: s.dims == 2 or s.depth <= 2)


@settings(max_examples=25, deadline=None)
@given(specs, st.integers(1, 60))
def test_output_size_is_what_the_architecture_says(spec: UNetSpec, size: int) -> None:
    if spec.dims == 3 and spec.padding == "valid":
        size = min(size, 10)
    size = spec.size_at_least(size)
    network = UNet(spec).eval()
    last = spec.size_at_least(size + 1)
    tile = (size,) * (spec.dims - 1) + (last,)
    with torch.no_grad():
        y = network(torch.randn(2, spec.in_channels, *tile))
    expected = (spec.out_size(size),) * (spec.dims - 1) + (spec.out_size(last),)
    assert tuple(y.shape) == (2, spec.classes, *expected)
    # The size before it is refused: size_at_least gave the smallest.
    if last - 1 > size:
        with pytest.raises(ValueError, match=f"use {last}"):
            spec.out_size(last - 1)


def test_sizes_that_do_not_fit_are_refused_with_one_that_does() -> None:
    network = UNet(UNetSpec(width=2))
    with pytest.raises(ValueError, match=r"size 570 px does not fit.*use 572"):
        network(torch.zeros(1, 1, 570, 572))
    with pytest.raises(ValueError, match=r"input is 1x3x572x572; this U-Net takes Nx1xYxX"):
        network(torch.zeros(1, 3, 572, 572))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"width": True}, "width is True"),
        ({"dims": 4}, "dims is 4; use one of 2, 3"),
        ({"padding": "full"}, "padding is 'full'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_architectures_that_cannot_be_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UNet(UNetSpec(**arguments))


def test_dropout_is_at_the_end_of_the_contracting_path() -> None:
    torch.manual_seed(0)
    network = UNet(UNetSpec(width=4, depth=3, dropout=0.5)).train()
    seen: list[Any] = []
    network.dropout.register_forward_hook(lambda m, i, o: seen.append((i[0].shape[1], float((o == 0).float().mean()))))
    network(torch.randn(1, 1, 140, 140))
    assert [channels for channels, _ in seen] == [16, 32]  # its two lowest levels
    x = torch.randn(1, 1, 140, 140)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def trained_like(network: Any) -> Any:
    """BatchNorm with statistics that are not the initial ones, biases that are not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(std=0.2)
            elif getattr(m, "bias", None) is not None:
                m.bias.normal_(std=0.1)
    return network.eval()


@pytest.mark.parametrize(
    "spec",
    [
        UNetSpec(width=3, depth=2),
        UNetSpec(in_channels=2, classes=3, width=4, depth=2, padding="same", norm="batch", up="bilinear"),
        UNetSpec(width=2, depth=2, padding="same", up="nearest"),
        UNetSpec(width=2, depth=1, dims=3, norm="batch"),
    ],
    ids=str,
)
@pytest.mark.parametrize("factor", [1, 2, 5])
def test_a_widened_network_computes_the_same(spec: UNetSpec, factor: int) -> None:
    """Equal up to rounding: in float64 the difference vanishes, so that it is the widening that is exact."""
    narrow = trained_like(UNet(spec)).double()
    x = torch.randn(1, spec.in_channels, *[spec.size_at_least(44)] * spec.dims, dtype=torch.float64)
    wide = widen(narrow.float(), factor)
    assert wide.spec.width == factor * spec.width
    with torch.no_grad():
        a32, b32 = narrow(x.float()), wide(x.float())
        a, b = narrow.double()(x), wide.double()(x)
    scale = a.abs().max().item()
    # float32 weights: each sum of shares is off by a few roundings of the weight, and layers add up.
    assert (a - b).abs().max().item() < 1e-5 * scale
    assert (a32 - b32).abs().max().item() < 1e-4 * scale


def test_copies_differ_by_noise_that_cancels() -> None:
    narrow = trained_like(UNet(UNetSpec(width=4, depth=1)))
    quiet, noisy = widen(narrow, 2, noise=0.0), widen(narrow, 2, noise=0.2)
    kernel = noisy.down[0][2].weight
    assert (kernel[:, ::2] != kernel[:, 1::2]).float().mean() > 0.99  # the copies' readers
    assert (kernel[::2] != kernel[1::2]).float().mean() > 0.99  # and the copies themselves
    assert torch.equal(quiet.down[0][2].weight[:, ::2], quiet.down[0][2].weight[:, 1::2])
    summed = kernel[:, ::2] + kernel[:, 1::2]
    torch.testing.assert_close(summed[::2], narrow.down[0][2].weight, rtol=1e-5, atol=1e-6)


def test_widening_by_sixteen_reaches_the_paper_s_size() -> None:
    spec = UNetSpec(width=4)
    assert parameters(UNet(UNetSpec(width=4 * 16))) == 31_030_658
    assert spec.size_at_least(572) == 572


def test_widening_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="factor is 0"):
        widen(UNet(UNetSpec(width=2, depth=1)), 0)
    with pytest.raises(ValueError, match=r"noise is 1\.5"):
        widen(UNet(UNetSpec(width=2, depth=1)), 2, noise=1.5)


def test_half_weights_come_back(tmp_path: Path) -> None:
    network = UNet(UNetSpec(width=3, depth=2))
    save_half(tmp_path / "small.npz", network)
    back = load_half(tmp_path / "small.npz")
    assert back.spec == network.spec
    assert not back.training
    for a, b in zip(network.parameters(), back.parameters(), strict=True):
        assert torch.equal(a.half().float(), b)


# --------------------------------------------------------------------------------------------------------- its operator


@pytest.mark.parametrize("crop", [0, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_crop_concat_is_slicing_and_cat(crop: int, dims: int) -> None:
    up = torch.randn(2, 3, *[5, 8, 7][:dims])
    skip = torch.randn(2, 4, *[n + 2 * crop for n in up.shape[2:]])
    inner = (slice(None), slice(None), *(slice(crop, n + crop) for n in up.shape[2:]))
    expected = torch.cat((skip[inner], up), 1)
    assert torch.equal(crop_concat(skip, up, crop), expected)
    strided = skip.transpose(2, 3).contiguous().transpose(2, 3)  # a layout that the kernel does not take
    assert torch.equal(crop_concat(strided, up, crop), expected)
    assert torch.equal(crop_concat(skip.bfloat16(), up.bfloat16(), crop), expected.bfloat16())


def test_crop_concat_is_an_operator_of_torch() -> None:
    """Schema, gradient, shapes without data: torch's own checks, and the gradient against finite differences."""
    skip = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    up = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: crop_concat(a, b, 2), (skip, up))
    floats = [t.detach().float().requires_grad_() for t in (skip, up)]
    torch.library.opcheck(torch.ops.unet_rt.crop_concat.default, (*floats, 2))
    with pytest.raises(ValueError, match="is not 1 samples larger"):
        crop_concat(skip, up, 1)


# --------------------------------------------------------------------------------------------------------- predecessors


@pytest.mark.parametrize("kind", [FCN8s, SegNet])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_predecessors_keep_the_size(kind: Any, norm: str) -> None:
    torch.manual_seed(0)
    network = kind(KINDS[kind.__name__][1](2, 3, width=2, depth=3, norm=norm)).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 2, 24, 40)).shape == (2, 3, 24, 40)
    again = network_of(architecture_of(network))
    again.load_state_dict(network.state_dict())
    assert again.spec == network.spec
    assert network.spec.size_at_least(25) == 32
    with pytest.raises(ValueError, match="use 32"):
        network.spec.out_size(30)


def test_equal_width_is_equal_terms() -> None:
    """The contracting path is the same in all three."""
    sizes = {
        name: sum(
            p.numel()
            for k, p in kind(KINDS[kind.__name__][1](width=8, **more)).named_parameters()
            if k.startswith("down.")
        )
        for name, kind, more in (("u", UNet, {}), ("f", FCN8s, {}), ("s", SegNet, {}))
    }
    assert len(set(sizes.values())) == 1


def test_unpooling_puts_values_where_the_maxima_were() -> None:
    """With ties, too: all zero after a ReLU, where the first corner counts. The form for ONNX gives the same."""
    from unet_rt.models.segnet import _pool, _pool_masks, _unpool, _unpool_masks

    torch.manual_seed(0)
    x = torch.relu(torch.randn(2, 3, 8, 12))
    values, places = _pool(x)
    again, masks = _pool_masks(x)
    other = torch.randn_like(values)
    assert torch.equal(values, again)
    assert torch.equal(_unpool(other, places), _unpool_masks(other, masks))
    kept = _unpool(values, places)
    assert torch.equal(kept[kept > 0], x[kept > 0])
    assert int((_unpool(torch.ones_like(values), places) > 0).sum()) == values.numel()


def test_fcn_starts_from_bilinear_interpolation() -> None:
    network = FCN8s(FCN8sSpec(width=2, depth=4))
    ramp = torch.arange(8.0)[None, None, :, None].expand(1, 2, 8, 8)
    with torch.no_grad():
        fine = network.up[2](ramp)
    inner = fine[0, 0, 4:-4, 16]
    np.testing.assert_allclose(np.diff(inner.numpy()), 0.25, atol=1e-5)  # a ramp stays one, four times as fine


def test_architectures_are_checked() -> None:
    with pytest.raises(ValueError, match="fuses three scales"):
        FCN8s(FCN8sSpec(depth=2))
    with pytest.raises(GraphError, match="known are UNet, FCN8s, SegNet"):
        network_of({"network": "ResNet"})
    with pytest.raises(GraphError, match="none of SegNet's"):
        network_of({"network": "SegNet", "padding": "valid"})
    with pytest.raises(GraphError, match="is none of"):
        architecture_of(torch.nn.Conv2d(1, 1, 1))
