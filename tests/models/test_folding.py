"""A folded network gives the same numbers with fewer operations."""

import copy

import pytest
import torch
from torch import nn

from nvae.models.cells import CELL_FAMILIES
from nvae.models.folding import Foldable, fold
from nvae.models.layers import BatchNorm, FactorizedSkip, WeightNormConv2d
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
