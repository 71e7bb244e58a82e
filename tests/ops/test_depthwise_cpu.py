import pytest
import torch
import torch.nn.functional as F

from nvae.ops.reference import (
    depthwise_conv2d_small_map,
    overlap_weight_gradient,
    small_map_applies,
)


@pytest.mark.parametrize("kernel_size", [3, 5, 11])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (9, 8)])
def test_gradients_equal_autograd(size: tuple[int, int], kernel_size: int) -> None:
    """Every tap's overlap, also where the kernel is larger than the image."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 1, kernel_size, kernel_size, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = F.conv2d(x, w, padding=kernel_size // 2, groups=3)
    actual = depthwise_conv2d_small_map(x, w)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (x, w), grad),
        torch.autograd.grad(expected, (x, w), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_memory_formats_agree() -> None:
    x, grad = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    last = torch.channels_last
    torch.testing.assert_close(
        overlap_weight_gradient(x.to(memory_format=last), grad.to(memory_format=last), 5),
        overlap_weight_gradient(x, grad, 5),
    )


def test_where_it_applies() -> None:
    """Small maps of middling volume, float32, CPU: what was measured to win."""
    w = torch.zeros(1536, 1, 5, 5)
    assert small_map_applies(torch.zeros(16, 1536, 4, 4), w, 1)
    assert small_map_applies(torch.zeros(16, 512, 8, 8), w, 1)
    assert not small_map_applies(torch.zeros(16, 256, 8, 8), w, 1)
    assert not small_map_applies(torch.zeros(16, 1536, 4, 4), w, 2)
    assert not small_map_applies(torch.zeros(16, 1536, 4, 4).double(), w, 1)
    assert not small_map_applies(torch.zeros(1, 96, 16, 16), torch.zeros(96, 1, 5, 5), 1)
    assert not small_map_applies(torch.zeros(1, 96, 4, 4), torch.zeros(96, 1, 5, 5), 1)
