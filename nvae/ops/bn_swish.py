"""Batch normalisation followed by Swish."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae.ops.batch_norm import Normalised, batch_norm
from nvae.ops.dispatch import Impl, use_kernel
from nvae.ops.statistics import (
    OPS,
    BatchMoments,
    Statistics,
    count_elements,
    fused_moments,
    with_channel_sums,
)


def bn_swish(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    running: Statistics | None = None,
    sums: Tensor | None = None,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Normalised:
    """v sigmoid(v) of v = gamma (x - mean) / sqrt(var + eps) + beta.

    Args:
        x: ``(B, C, H, W)``.
        gamma: ``(C,)`` scale.
        beta: ``(C,)`` shift.
        running: running statistics to normalise with (evaluation); they are constants. None: the
            batch's statistics, and gradients through them (training).
        sums: ``(2, C)`` sum and sum of squares of x on this rank, where the op that made x gave
            them (:func:`~nvae.ops.bn_swish_depthwise`). None: taken here where needed.
        eps: added to the variance.
        group: process group over which batch statistics are synchronised; None: this rank alone.
        impl: see :mod:`nvae.ops`.

    Raises:
        ValueError: batch statistics of a single element, or ``impl="cuda"`` where no kernel
            applies.
    """
    if use_kernel(impl, x):
        return fused_bn_swish(x, gamma, beta, running=running, sums=sums, eps=eps, group=group)
    return bn_swish_reference(x, gamma, beta, running=running, eps=eps, group=group)


def bn_swish_reference(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    running: Statistics | None,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Normalised:
    """The same in plain PyTorch."""
    y, statistics = batch_norm(x, gamma, beta, running=running, eps=eps, group=group)
    return Normalised(F.silu(y), statistics)


def fused_bn_swish(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    running: Statistics | None,
    sums: Tensor | None,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Normalised:
    """The same through the registered ops: two passes forward (three with the sums of x), and the
    backward pass recomputes from x, the only tensor of its size that is kept.
    """
    x, moments = input_moments(x, gamma.dtype, running=running, sums=sums, eps=eps, group=group)
    y = _BnSwish.apply(x, gamma, beta, moments.mean, moments.rstd)
    return Normalised(y, moments.statistics)


def input_moments(
    x: Tensor,
    dtype: torch.dtype,
    *,
    running: Statistics | None,
    sums: Tensor | None,
    eps: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, BatchMoments]:
    """What to normalise x with, and x to go on with (see ``with_channel_sums``)."""
    if running is not None:
        mean, rstd = running.mean.detach().double(), (running.var.detach().double() + eps).rsqrt()
        return x, BatchMoments(mean, rstd, running)
    n = count_elements(x, group)
    if sums is None:
        x, sums = with_channel_sums(x)
    return x, fused_moments(sums, n, eps, group, dtype)


class _BnSwish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, gamma, beta, mean, rstd)
        y: Tensor = OPS.bn_swish(x, gamma, beta, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        dx, (dgamma, dbeta), (dmean, drstd) = OPS.bn_swish_backward(dy, *ctx.saved_tensors)
        return dx, dgamma, dbeta, dmean, drstd
