"""A folded network gives the same numbers with fewer operations."""

import copy

import pytest
import torch
from torch import nn

from nvae.models.cells import CELL_FAMILIES
from nvae.models.folding import Foldable, fold
from nvae.models.layers import FactorizedSkip, WeightNormConv2d
from nvae.models.normalization import BatchNorm
from tests.models.small import small_model


@pytest.mark.parametrize("family", list(CELL_FAMILIES))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_cell_family_folds_exactly(family: str, memory_format: torch.memory_format) -> None:
    """Encoder and decoder, with statistics far from a fresh network's."""
    torch.manual_seed(0)
    model = small_model(cell_family=family, num_flows=1).double()
    for norm in model.modules():
        if isinstance(norm, BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    model.eval().to(memory_format=memory_format)
    x = torch.rand(3, 1, 16, 16, dtype=torch.float64)
    noise = model.draw_noise(3)
    expected = model(x, noise)  # with gradients: nothing is folded
    with torch.no_grad():
        found = fold(copy.deepcopy(model))(x, noise)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.kl_per_group, expected.kl_per_group, rtol=1e-9, atol=1e-9)


def test_evaluation_on_the_cpu_multiplies_where_a_convolution_is_pointwise() -> None:
    """The convolution's numbers in the layout that the next ones are fast in, from any layout."""
    conv = WeightNormConv2d(6, 8, 1).double().eval()
    x = torch.rand(2, 6, 5, 7, dtype=torch.float64)
    expected = conv(x)  # with gradients: torch's convolution, of x's layout
    assert expected.is_contiguous()
    for layer in (conv, conv.folded()):
        for given in (x, x.to(memory_format=torch.channels_last)):
            with torch.no_grad():
                found = layer(given)
            assert found.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_training_without_gradients_convolves_as_with_them() -> None:
    """A part of the pass that is computed twice, once without gradients, gives the same bits."""
    conv = WeightNormConv2d(32, 48, 1)
    x = torch.rand(2, 32, 8, 8)
    expected = conv(x)
    with torch.no_grad():
        found = conv(x)
    assert found.stride() == expected.stride()
    assert torch.equal(found, expected)


def test_nothing_foldable_stays() -> None:
    folded = fold(small_model().eval())
    assert not [module for module in folded.modules() if isinstance(module, Foldable)]


@pytest.mark.parametrize(
    "layer",
    [
        WeightNormConv2d(6, 8, 3, stride=2),
        WeightNormConv2d(6, 8, 3, dilation=2, bias=False),
        WeightNormConv2d(6, 6, 5, groups=6, bias=False, mask=torch.rand(6, 1, 5, 5).round()),
        FactorizedSkip(6, 10),
    ],
    ids=["strided", "dilated", "masked depthwise", "factorized skip"],
)
def test_layers_fold_exactly(layer: nn.Module) -> None:
    """Strides, dilation, groups, masks and taps reach the plain convolution."""
    layer = layer.double().eval()
    x = torch.rand(2, 6, 8, 8, dtype=torch.float64)
    assert isinstance(layer, Foldable)
    folded = layer.folded()
    torch.testing.assert_close(folded(x), layer(x), rtol=0, atol=1e-12)
    assert not [p for p in folded.parameters() if p.requires_grad]
