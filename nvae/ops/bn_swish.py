"""Batch normalisation followed by Swish."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae.ops import formulas
from nvae.ops.dispatch import Impl, use_kernel
from nvae.ops.statistics import (
    OPS,
    BatchMoments,
    Statistics,
    count_elements,
    fused_moments,
    synchronise,
    with_channel_sums,
)


class BnSwish(NamedTuple):
    """What :func:`bn_swish` returns.

    Attributes:
        output: ``(B, C, H, W)``.
        statistics: the statistics used: the batch's (over all ranks), for the caller to update
            its running ones, or the running ones it gave.
    """

    output: Tensor
    statistics: Statistics


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
) -> BnSwish:
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
) -> BnSwish:
    """The same in plain PyTorch."""
    if running is not None:
        y = F.batch_norm(x, running.mean, running.var, gamma, beta, False, 0.0, eps)
        return BnSwish(F.silu(y), running)
    n = count_elements(x, group)
    if group is None:
        # momentum 1 makes PyTorch leave the batch's own statistics in the "running" ones
        mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
        y = F.batch_norm(x, mean, var, gamma, beta, True, 1.0, eps)
        return BnSwish(F.silu(y), Statistics(mean, var * ((n - 1) / n), n))
    sums, elements = synchronise(formulas.channel_sums(x), n, group)
    mean, rstd, var = formulas.moments(sums, elements, n, eps)
    assert elements is not None
    statistics = Statistics(mean.detach().to(gamma.dtype), var.detach().to(gamma.dtype), elements)
    return BnSwish(formulas.bn_swish(x, gamma, beta, mean, rstd), statistics)


def fused_bn_swish(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    running: Statistics | None,
    sums: Tensor | None,
    eps: float,
    group: dist.ProcessGroup | None,
) -> BnSwish:
    """The same through the registered ops: two passes forward (three with the sums of x), and the
    backward pass recomputes from x, the only tensor of its size that is kept.
    """
    x, moments = input_moments(x, gamma.dtype, running=running, sums=sums, eps=eps, group=group)
    y = _BnSwish.apply(x, gamma, beta, moments.mean, moments.rstd)
    return BnSwish(y, moments.statistics)


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
