"""The U-Net of the paper, its relatives, and widening."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the reference networks need torch; pip install unet-rt[torch]")

from unet_rt.models import UNet, UNetSpec, load_half, save_half, widen  # noqa: E402

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
    narrow = UNet(width=2).eval()
    with torch.no_grad():
        assert narrow(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)


def test_he_initialisation_keeps_the_variance() -> None:
    """Deviation of every 3 x 3 convolution is sqrt(2 / fan-in), known to a few percent from its samples."""
    torch.manual_seed(0)
    network = UNet(width=16, depth=3)
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
    network = UNet.from_spec(spec).eval()
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
    network = UNet(width=2)
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
        UNet(**arguments)


def test_dropout_is_at_the_end_of_the_contracting_path() -> None:
    torch.manual_seed(0)
    network = UNet(width=4, depth=3, dropout=0.5).train()
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
    narrow = trained_like(UNet.from_spec(spec)).double()
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
    narrow = trained_like(UNet(width=4, depth=1))
    quiet, noisy = widen(narrow, 2, noise=0.0), widen(narrow, 2, noise=0.2)
    kernel = noisy.down[0][2].weight
    assert (kernel[:, ::2] != kernel[:, 1::2]).float().mean() > 0.99  # the copies' readers
    assert (kernel[::2] != kernel[1::2]).float().mean() > 0.99  # and the copies themselves
    assert torch.equal(quiet.down[0][2].weight[:, ::2], quiet.down[0][2].weight[:, 1::2])
    summed = kernel[:, ::2] + kernel[:, 1::2]
    torch.testing.assert_close(summed[::2], narrow.down[0][2].weight, rtol=1e-5, atol=1e-6)


def test_widening_by_sixteen_reaches_the_paper_s_size() -> None:
    spec = UNetSpec(width=4)
    assert parameters(UNet.from_spec(UNetSpec(width=4 * 16))) == 31_030_658
    assert spec.size_at_least(572) == 572


def test_widening_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="factor is 0"):
        widen(UNet(width=2, depth=1), 0)
    with pytest.raises(ValueError, match=r"noise is 1\.5"):
        widen(UNet(width=2, depth=1), 2, noise=1.5)


def test_half_weights_come_back(tmp_path: Path) -> None:
    network = UNet(width=3, depth=2)
    save_half(tmp_path / "small.npz", network)
    back = load_half(tmp_path / "small.npz")
    assert back.spec == network.spec
    assert not back.training
    for a, b in zip(network.parameters(), back.parameters(), strict=True):
        assert torch.equal(a.half().float(), b)
