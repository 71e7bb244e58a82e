import pytest
import torch
import torch.nn.functional as F

from nvae.ops import reference
from nvae.ops.reference import correlation_applies, depthwise, weight_gradient_by_correlation

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("kernel_size", [3, 5, 11])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (9, 8)])
def test_weight_gradient_equals_autograd(size: tuple[int, int], kernel_size: int) -> None:
    """Also where the kernel is larger than the image, and in either layout."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    w = torch.randn(3, 1, kernel_size, kernel_size, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, *size, dtype=torch.float64)
    y = F.conv2d(x, w, padding=kernel_size // 2, groups=3)
    (expected,) = torch.autograd.grad(y, w, grad)
    for of_x in LAYOUTS:
        for of_grad in LAYOUTS:
            actual = weight_gradient_by_correlation(
                x.to(memory_format=of_x), grad.to(memory_format=of_grad), kernel_size
            )
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("needs_dx", [True, False])
def test_both_gradients_of_the_faster_path(monkeypatch: pytest.MonkeyPatch, needs_dx: bool) -> None:
    """Against float64, which takes PyTorch's own."""
    monkeypatch.setattr(reference, "_HAS_MACHINE_CODE", True)
    torch.manual_seed(0)
    x = torch.randn(3, 16, 6, 7).to(memory_format=torch.channels_last).requires_grad_(needs_dx)
    w = torch.randn(16, 1, 5, 5, requires_grad=True)
    grad = torch.randn(3, 16, 6, 7)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, w)]
    y, expected = depthwise(x, w, 1), depthwise(exact[0], exact[1], 1)
    assert "Depthwise" in type(y.grad_fn).__name__
    assert "Depthwise" not in type(expected.grad_fn).__name__
    y.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip((x, w), exact, strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad.float())


def test_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large kernels, float32, CPUs for which oneDNN makes code: what was measured to win."""
    monkeypatch.setattr(reference, "_HAS_MACHINE_CODE", True)
    x, w = torch.zeros(2, 96, 4, 4), torch.zeros(96, 1, 5, 5)
    assert correlation_applies(x, w, 1)
    assert not correlation_applies(x, w, 2)
    assert not correlation_applies(x.double(), w, 1)
    assert not correlation_applies(x.to("meta"), w, 1)
    assert not correlation_applies(x, torch.zeros(96, 1, 3, 3), 1)
    assert not correlation_applies(torch.zeros(1, 1, 128, 128), torch.zeros(1, 1, 5, 5), 1)
    monkeypatch.setattr(reference, "_HAS_MACHINE_CODE", False)
    assert not correlation_applies(x, w, 1)
