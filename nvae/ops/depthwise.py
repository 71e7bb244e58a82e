"""Depthwise convolution, alone or of batch normalization and Swish in one op."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae.ops import library, reference
from nvae.ops.batchnorm import BatchMoments, Statistics, batch_norm, input_moments
from nvae.ops.library import OPS, Impl


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
    if not library.use_kernel(impl, x, weight.shape[-1]):
        return reference.depthwise(x, weight, stride)
    y: Tensor = _Depthwise.apply(library.to_autocast_dtype(x), weight, stride)
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


class BnSwishDepthwise(NamedTuple):
    """What :func:`bn_swish_depthwise` returns.

    Attributes:
        output: ``(B, C, ceil(H / stride), ceil(W / stride))``.
        statistics: as in :class:`~nvae.ops.Normalized`, of the input.
        sums: ``(2, C)`` float64, sum and sum of squares of the output's channels on this rank,
            differentiable, for the next ``bn_swish(..., sums=)``; None where the path taken does
            not have them for nothing (then the next op takes them itself).
    """

    output: Tensor
    statistics: Statistics
    sums: Tensor | None


def bn_swish_depthwise(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    stride: int = 1,
    *,
    running: Statistics | BatchMoments | None = None,
    sums: Tensor | None = None,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> BnSwishDepthwise:
    """``depthwise_conv2d(bn_swish(x), weight, stride)`` without the tensor in between.

    The branch of a mobile cell, ``BN + Swish -> depthwise -> BN + Swish``, in training::

        h = bn_swish_depthwise(x, gamma1, beta1, weight, stride, group=group)
        z = bn_swish(h.output, gamma2, beta2, sums=h.sums, group=group)
        # running statistics from h.statistics and z.statistics

    and in evaluation::

        h = bn_swish_depthwise(x, gamma1, beta1, weight, stride, running=running1)
        z = bn_swish(h.output, gamma2, beta2, running=running2)

    Args:
        x: ``(B, C, H, W)``, the raw input; the backward pass keeps nothing else of its size.
        weight: ``(C, 1, K, K)``, K odd.
        stride: 1 or 2.
        gamma, beta, running, sums, eps, group, impl: as in :func:`~nvae.ops.bn_swish`.

    Raises:
        ValueError: as :func:`~nvae.ops.bn_swish` and :func:`~nvae.ops.depthwise_conv2d`.
    """
    check_depthwise(x, weight, stride)
    if not library.use_kernel(impl, x, weight.shape[-1]):
        y, statistics = batch_norm(x, gamma, beta, running=running, eps=eps, group=group, impl=impl)
        return BnSwishDepthwise(reference.depthwise(F.silu(y), weight, stride), statistics, None)
    x, moments = input_moments(
        library.to_autocast_dtype(x), running=running, sums=sums, eps=eps, group=group, impl=impl
    )
    y, sums_y = _BnSwishDepthwise.apply(
        x, gamma, beta, moments.mean, moments.rstd, weight, stride, running is None
    )
    return BnSwishDepthwise(y, moments.statistics, sums_y if running is None else None)


class _BnSwishDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        stride: int,
        want_sums: bool,
    ) -> tuple[Tensor, Tensor]:
        bn = (gamma, beta, mean, rstd)
        y, sums = OPS.bn_swish_depthwise(x, *bn, weight, stride, want_sums)
        # y is the next layer's raw input, so keeping it costs nothing
        ctx.save_for_backward(y, x, *bn, weight)
        ctx.stride = stride
        ctx.set_materialize_grads(False)
        return y, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsums: Tensor | None) -> tuple[Tensor | None, ...]:
        y, *inputs = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else dy
        dx, (dgamma, dbeta), (dmean, drstd), dw = OPS.bn_swish_depthwise_backward(
            dy, y, dsums, *inputs, ctx.stride
        )
        return dx, dgamma, dbeta, dmean, drstd, dw, None, None
