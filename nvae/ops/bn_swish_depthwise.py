"""Batch normalisation, Swish and a depthwise convolution in one."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae.ops import formulas
from nvae.ops.bn_swish import bn_swish_reference, input_moments
from nvae.ops.depthwise import check_depthwise
from nvae.ops.dispatch import Impl, to_autocast_dtype, use_kernel
from nvae.ops.statistics import OPS, Statistics


class BnSwishDepthwise(NamedTuple):
    """What :func:`bn_swish_depthwise` returns.

    Attributes:
        output: ``(B, C, ceil(H / stride), ceil(W / stride))``.
        statistics: as in :class:`~nvae.ops.Normalised`, of the input.
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
    running: Statistics | None = None,
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
        gamma: ``(C,)`` scale.
        beta: ``(C,)`` shift.
        weight: ``(C, 1, K, K)``, K odd.
        stride: 1 or 2.
        running: as in :func:`~nvae.ops.bn_swish`.
        sums: as in :func:`~nvae.ops.bn_swish`, of x.
        eps: added to the variance.
        group: as in :func:`~nvae.ops.bn_swish`.
        impl: see :mod:`nvae.ops`.

    Raises:
        ValueError: as :func:`~nvae.ops.bn_swish` and :func:`~nvae.ops.depthwise_conv2d`.
    """
    check_depthwise(x, weight, stride)
    if use_kernel(impl, x, weight.shape[-1]):
        return fused_bn_swish_depthwise(
            to_autocast_dtype(x), gamma, beta, weight, stride,
            running=running, sums=sums, eps=eps, group=group,
        )  # fmt: skip
    y, statistics = bn_swish_reference(x, gamma, beta, running=running, eps=eps, group=group)
    return BnSwishDepthwise(formulas.depthwise(y, weight, stride), statistics, None)


def fused_bn_swish_depthwise(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    stride: int,
    *,
    running: Statistics | None,
    sums: Tensor | None,
    eps: float,
    group: dist.ProcessGroup | None,
) -> BnSwishDepthwise:
    """The same through the registered ops."""
    x, moments = input_moments(x, gamma.dtype, running=running, sums=sums, eps=eps, group=group)
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
