"""The public functions on the CPU: meaning, shapes, errors."""

import pytest
import torch
import torch.nn.functional as F

from nvae.ops import Statistics, Tracked, bn_swish, bn_swish_depthwise, depthwise_conv2d


def test_batch_statistics_are_those_of_the_batch() -> None:
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    gamma, beta = torch.rand(3).double(), torch.randn(3).double()
    running = Tracked(torch.zeros(3).double(), torch.zeros(3).double(), momentum=1.0)
    y = bn_swish(x, gamma, beta, tracked=running)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    v = (x - mean.view(1, 3, 1, 1)) / (var + 1e-5).sqrt().view(1, 3, 1, 1)
    v = v * gamma.view(1, 3, 1, 1) + beta.view(1, 3, 1, 1)
    torch.testing.assert_close(y, v * torch.sigmoid(v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(running.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(running.var, var * 120 / 119, rtol=1e-12, atol=1e-12)


def test_running_statistics_are_used_and_left_alone() -> None:
    x, gamma, beta = torch.randn(2, 3, 4, 4), torch.rand(3), torch.randn(3)
    running = Statistics(torch.randn(3), torch.rand(3) + 0.5)
    before = [t.clone() for t in running]
    tracked = Tracked(*running, momentum=1.0)
    y = bn_swish(x, gamma, beta, moments=running, tracked=tracked, eps=1e-3)
    want = F.silu(F.batch_norm(x, running.mean, running.var, gamma, beta, False, 0.0, 1e-3))
    torch.testing.assert_close(y, want)
    h = bn_swish_depthwise(
        x, gamma, beta, torch.randn(3, 1, 3, 3), moments=running, tracked=tracked
    )
    assert h.moments is None
    assert all(torch.equal(a, b) for a, b in zip(before, running, strict=True))


@pytest.mark.parametrize(("stride", "out"), [(1, (7, 6)), (2, (4, 3))])
def test_depthwise_output_size(stride: int, out: tuple[int, int]) -> None:
    x, w = torch.randn(2, 3, 7, 6), torch.randn(3, 1, 5, 5)
    y = depthwise_conv2d(x, w, stride)
    assert y.shape == (2, 3, *out)
    torch.testing.assert_close(y, F.conv2d(x, w, None, stride, 2, 1, 3))


@pytest.mark.parametrize(
    ("weight", "stride", "message"),
    [
        ((3, 1, 4, 4), 1, "K odd"),
        ((2, 1, 3, 3), 1, "C = 3"),
        ((3, 2, 3, 3), 1, r"\(C, 1, K, K\)"),
        ((3, 1, 3, 5), 1, "K odd"),
        ((3, 1, 3, 3), 3, "stride must be 1 or 2"),
    ],
)
def test_wrong_shapes_are_refused(weight: tuple[int, ...], stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(torch.randn(1, 3, 4, 4), torch.randn(weight), stride)


def test_one_element_has_no_batch_statistics() -> None:
    with pytest.raises(ValueError, match="more than one element"):
        bn_swish(torch.randn(1, 3, 1, 1), torch.ones(3), torch.zeros(3))


def test_unknown_impl_is_refused() -> None:
    with pytest.raises(ValueError, match="impl must be one of auto, reference, cuda"):
        depthwise_conv2d(torch.randn(1, 3, 4, 4), torch.randn(3, 1, 3, 3), impl="triton")  # type: ignore[arg-type]


def test_cuda_on_the_cpu_is_refused() -> None:
    """Insisting on a kernel must not fall back silently."""
    with pytest.raises(ValueError, match="need an NVIDIA GPU, the input is on cpu"):
        depthwise_conv2d(torch.randn(1, 3, 4, 4), torch.randn(3, 1, 3, 3), impl="cuda")
