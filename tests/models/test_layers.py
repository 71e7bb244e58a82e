import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nvae.models import normalization
from nvae.models.layers import (
    DataInitConv2d,
    FactorizedSkip,
    SqueezeExcitation,
    UpsampleSkip,
    WeightNormConv2d,
    skip_splits,
)
from nvae.models.normalization import BatchNorm, counted_together


def test_weight_norm_follows_the_formula() -> None:
    """w_hat = exp(g) w / (||w|| + 1e-5), g starting at log(||w|| + 1e-2)."""
    conv = WeightNormConv2d(3, 4, 3)
    norm = conv.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(conv.log_gain, (norm + 1e-2).log())
    expected = conv.weight * ((norm + 1e-2) / (norm + 1e-5)).view(-1, 1, 1, 1)
    torch.testing.assert_close(conv.normalized_weight(), expected)


@pytest.mark.parametrize("out_channels", [8, 9, 6])
def test_factorized_skip_is_four_strided_convolutions(out_channels: int) -> None:
    """One 2x2 convolution computes what four 1x1 ones on shifted pixels do; remainder last."""
    skip = FactorizedSkip(5, out_channels).double()
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    norm = skip.weight.flatten(1).norm(dim=1)
    weight = skip.weight * (skip.log_gain.exp() / (norm + 1e-5)).view(-1, 1, 1, 1)
    assert skip.bias is not None
    y, splits = F.silu(x), skip_splits(out_channels)
    parts = [
        F.conv2d(y[:, :, i:, j:], w, b, stride=2)
        for (i, j), w, b in zip(
            ((0, 0), (1, 1), (0, 1), (1, 0)),
            weight.split(splits),
            skip.bias.split(splits),
            strict=True,
        )
    ]
    torch.testing.assert_close(skip(x), torch.cat(parts, 1))


def test_upsample_skip_projects_then_interpolates() -> None:
    """The order is swapped for speed; the result must be the published one."""
    skip = UpsampleSkip(4, 2).double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    upsampled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(skip(x), skip.conv(upsampled))


def test_squeeze_excitation_width_has_a_floor() -> None:
    assert SqueezeExcitation(32).reduce.out_features == 4
    assert SqueezeExcitation(256).reduce.out_features == 16


def test_first_batch_sets_gain_and_bias() -> None:
    """Mean 0 and standard deviation 1/5 per channel after the first training batch, once."""
    torch.manual_seed(0)
    conv = DataInitConv2d(3, 4, 3)
    x = 3 + 2 * torch.randn(8, 3, 8, 8)
    y = conv(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.full((4,), 0.2), atol=1e-3, rtol=0)
    assert bool(conv.initialized)
    before = conv.log_gain.clone()
    conv(10 * x)
    assert torch.equal(conv.log_gain, before)


def test_evaluation_does_not_initialize() -> None:
    conv = DataInitConv2d(3, 4, 3).eval()
    conv(torch.randn(2, 3, 8, 8))
    assert not bool(conv.initialized)


def test_log_gain_shift() -> None:
    torch.manual_seed(0)
    plain = WeightNormConv2d(2, 2, 1)
    torch.manual_seed(0)
    shifted = WeightNormConv2d(2, 2, 1, log_gain_shift=math.log(0.1))
    torch.testing.assert_close(shifted.log_gain.exp(), 0.1 * plain.log_gain.exp())


def test_no_convolution_is_a_strided_pointwise_one() -> None:
    """Its CPU backward corrupts the heap in channels_last (torch 2.13, 2.15)."""
    for module in FactorizedSkip(4, 8).modules():
        assert not (isinstance(module, nn.Conv2d) and module.stride == (2, 2))
    skip = FactorizedSkip(4, 8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 64, 64).to(memory_format=torch.channels_last).requires_grad_()
    skip(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_batchnorm_of_one_launch_moves_the_same_statistics(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch's own pass moves them, as on a GPU, they are ours to rounding."""
    ours, theirs = BatchNorm(3), BatchNorm(3)
    for norm in (ours, theirs):
        norm.frozen = frozen
    x = 2 * torch.randn(4, 3, 5, 5) + 1
    want = ours(x)
    monkeypatch.setattr(normalization, "has_kernels", lambda device: True)
    torch.testing.assert_close(theirs(x), want)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(dict(theirs.named_buffers())[name], buffer)
    assert int(ours.num_batches_tracked) == (0 if frozen else 1)


def test_a_pass_counts_its_batch_once_in_every_layer() -> None:
    """Also where the layers would each have done it, and after the pass they do again."""
    norms = [BatchNorm(2), BatchNorm(3)]
    with counted_together(norms):
        norms[0](torch.randn(2, 2, 3, 3))
        assert int(norms[0].num_batches_tracked) == 0
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1]
    norms[1](torch.randn(2, 3, 3, 3))
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 2]


def test_a_first_batch_that_is_not_finite_initializes_nothing() -> None:
    """Its step is left out; the next batch sets gain and bias as if it had been the first."""
    torch.manual_seed(0)
    layer = DataInitConv2d(2, 3, 3)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 2, 5, 5)
    bad = x.clone()
    bad[1] = math.nan
    layer(bad)
    assert not layer.initialized
    torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0)
    assert layer.initialized
    assert layer.checked
