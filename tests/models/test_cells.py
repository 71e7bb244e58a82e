import pytest
import torch
import torch.nn.functional as F

from nvae.models.cells import CELL_FAMILIES, Cell, MobileConv, MobileConvSpec
from nvae.models.normalization import BatchNorm

SHAPES = {"stay": (8, 8), "down": (16, 4), "up": (4, 16)}


@pytest.mark.parametrize("change", SHAPES)
@pytest.mark.parametrize("family", list(CELL_FAMILIES))
def test_every_family_changes_size_and_width(family: str, change: str) -> None:
    """Output shape, and a gradient for every parameter, in every place of every family."""
    width, size = SHAPES[change]
    for ops in (CELL_FAMILIES[family].encoder, CELL_FAMILIES[family].postprocess):
        cell = Cell(ops, 8, width, downsample=change == "down", upsample=change == "up")
        y = cell(torch.randn(2, 8, 8, 8))
        assert y.shape == (2, width, size, size)
        y.square().sum().backward()
        assert all(p.grad is not None for p in cell.parameters())


def test_residual_weight() -> None:
    """skip(x) + 0.1 * attention(branch(x))."""
    cell = Cell(CELL_FAMILIES["res_mbconv"].decoder, 4, 4).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    y = cell.branch(x)
    assert cell.attention is not None
    torch.testing.assert_close(cell(x), x + 0.1 * cell.attention(y))


@pytest.mark.parametrize("groups", [0, 8])
@pytest.mark.parametrize(("stride", "upsample"), [(1, False), (2, False), (1, True)])
def test_folding_changes_nothing(groups: int, stride: int, upsample: bool) -> None:
    """With folded BN and without, in evaluation; and after the weights move again."""
    torch.manual_seed(0)
    op = MobileConv(
        MobileConvSpec(2, 3, groups=groups), 4, 6, stride=stride, upsample=upsample
    ).double()
    for module in op.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    op.eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            folded = op(x)
        torch.testing.assert_close(folded, op(x))
        with torch.no_grad():  # a stale cache would be caught in the second round
            op.expand.weight.mul_(1.5)
            op.norm_out.running_var.mul_(2)


def test_upsampling_late_is_upsampling_first() -> None:
    """Values, gradients and running statistics of a mobile cell that upsamples at its start."""
    torch.manual_seed(0)
    op = MobileConv(MobileConvSpec(2, 5), 4, 3, stride=1, upsample=True).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    late = op(x)
    (late_grad,) = torch.autograd.grad(late.square().sum(), x)
    statistics = {name: b.clone() for name, b in op.named_buffers()}

    for module in op.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.zero_()
            module.running_var.fill_(1)
            module.num_batches_tracked.zero_()
            module.repeats = 1
    op.upsample = False
    early = op(F.interpolate(x, scale_factor=2))
    (early_grad,) = torch.autograd.grad(early.square().sum(), x)
    torch.testing.assert_close(late, early)
    torch.testing.assert_close(late_grad, early_grad)
    for name, buffer in op.named_buffers():
        torch.testing.assert_close(statistics[name], buffer)
