"""Depthwise convolution."""

import torch.nn.functional as F
from torch import Tensor

from nvae.ops.dispatch import Impl, use_kernel


def depthwise_conv2d(x: Tensor, weight: Tensor, stride: int = 1, *, impl: Impl = "auto") -> Tensor:
    """Convolve every channel with its own kernel; "same" padding, no bias.

    Args:
        x: ``(B, C, H, W)``.
        weight: ``(C, 1, K, K)``, K odd.
        stride: 1 or 2.
        impl: see :mod:`nvae.ops`.

    Returns:
        ``(B, C, ceil(H / stride), ceil(W / stride))``, of x's dtype (autocast's where enabled).

    Raises:
        ValueError: a shape that is not depthwise, or ``impl="cuda"`` where no kernel applies.
    """
    check_depthwise(x, weight, stride)
    use_kernel(impl, x, weight)
    return depthwise_conv2d_reference(x, weight, stride)


def depthwise_conv2d_reference(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """The same in plain PyTorch."""
    padding = weight.shape[-1] // 2
    return F.conv2d(x, weight.to(x.dtype), None, stride, padding, 1, x.shape[1])


def check_depthwise(x: Tensor, weight: Tensor, stride: int) -> None:
    """Raise ValueError unless weight and stride fit x."""
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    c, one, kh, kw = weight.shape if weight.dim() == 4 else (0, 0, 0, 0)
    if c != x.shape[1] or one != 1 or kh != kw or kh % 2 == 0:
        raise ValueError(
            f"weight must be (C, 1, K, K) with C = {x.shape[1]} and K odd, "
            f"got {tuple(weight.shape)}"
        )
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
