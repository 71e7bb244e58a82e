"""Batch normalisation, Swish and a depthwise convolution in one."""

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from nvae.ops.bn_swish import bn_swish_reference
from nvae.ops.depthwise import check_depthwise, depthwise_conv2d_reference
from nvae.ops.dispatch import Impl, use_kernel
from nvae.ops.statistics import Statistics


class BnSwishDepthwise(NamedTuple):
    """What :func:`bn_swish_depthwise` returns.

    Attributes:
        output: ``(B, C, ceil(H / stride), ceil(W / stride))``.
        statistics: as in :class:`~nvae.ops.BnSwish`, of the input.
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
    use_kernel(impl, x, gamma, beta, weight)
    y, statistics = bn_swish_reference(x, gamma, beta, running=running, eps=eps, group=group)
    return BnSwishDepthwise(depthwise_conv2d_reference(y, weight, stride), statistics, None)
