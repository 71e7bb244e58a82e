"""Depthwise convolution."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae.ops import formulas
from nvae.ops.dispatch import Impl, to_autocast_dtype, use_kernel
from nvae.ops.statistics import OPS


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
    if use_kernel(impl, x, weight.shape[-1]):
        return fused_depthwise(to_autocast_dtype(x), weight, stride)
    return formulas.depthwise(x, weight, stride)


def fused_depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The convolution through the registered ops."""
    y: Tensor = _Depthwise.apply(x, weight, stride)
    return y


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


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        y: Tensor = OPS.depthwise(x, weight, stride)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx, dw = OPS.depthwise_backward(dy, x, weight, ctx.stride, need_dx, need_dw)
        return dx if need_dx else None, dw if need_dw else None, None
