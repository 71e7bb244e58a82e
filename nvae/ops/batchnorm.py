"""Batch normalization, alone or followed by Swish, with statistics that ranks may share.

A layer's statistics are the sum and the sum of squares of every channel. Everything that follows
(mean, variance, the backward terms through both) is a function of those 2C numbers, so
synchronizing a layer is one all-reduce of them, and its gradient is one all-reduce of theirs.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae.ops import library
from nvae.ops.library import Impl, ops


class Statistics(NamedTuple):
    """Per-channel statistics of a batch, or running ones. They carry no gradient.

    Attributes:
        mean: ``(C,)``.
        var: ``(C,)``, the biased variance of a batch (divided by n, the elements). Running
            statistics keep the unbiased one: ``var * n / (n - 1)``.
        elements: per channel, over all ranks: an int, or a 0-d float64 tensor where ranks
            were asked. Ignored for running statistics.
    """

    mean: Tensor
    var: Tensor
    elements: int | Tensor = 0


class BatchMoments(NamedTuple):
    """What normalizing takes, worked out.

    Attributes:
        mean: ``(C,)`` float64, differentiable.
        rstd: ``(C,)`` float64, 1 / sqrt(var + eps), differentiable.
        statistics: the same as constants, for running statistics.
    """

    mean: Tensor
    rstd: Tensor
    statistics: Statistics


class Normalized(NamedTuple):
    """What a normalization returns.

    Attributes:
        output: ``(B, C, H, W)``.
        statistics: the statistics used: the batch's (over all ranks), for the caller to update
            its running ones, or the running ones it gave.
    """

    output: Tensor
    statistics: Statistics


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    running: Statistics | BatchMoments | None = None,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Normalized:
    """gamma (x - mean) / sqrt(var + eps) + beta.

    Args:
        x: ``(B, C, H, W)``.
        gamma: ``(C,)`` scale.
        beta: ``(C,)`` shift.
        running: running statistics to normalize with (evaluation); they are constants. Where they
            stay the same, their :func:`fixed_moments`, made once. None: the batch's statistics, and
            gradients through them (training).
        eps: added to the variance.
        group: process group over which batch statistics are synchronized; None: this rank alone.
        impl: see :mod:`nvae.ops`; it matters with a group alone.

    Raises:
        ValueError: batch statistics of a single element.
    """
    if running is not None:
        if isinstance(running, BatchMoments):
            running = running.statistics
        y = F.batch_norm(x, running.mean, running.var, gamma, beta, False, 0.0, eps)
        return Normalized(y, running)
    n = count_elements(x, group)
    if group is None:
        # momentum 1 makes PyTorch leave the batch's own statistics in the "running" ones
        mean, var = gamma.new_zeros(gamma.shape), gamma.new_ones(gamma.shape)
        y = F.batch_norm(x, mean, var, gamma, beta, True, 1.0, eps)
        return Normalized(y, Statistics(mean, var * ((n - 1) / n), n))
    # by kernels where there are any: x is all that is kept, 2 bytes an element in bfloat16
    x, moments = input_moments(x, running=None, sums=None, eps=eps, group=group, impl=impl)
    y = _BatchNorm.apply(x, gamma, beta, moments.mean, moments.rstd, False, impl)
    return Normalized(y, moments.statistics)


def bn_swish(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    running: Statistics | BatchMoments | None = None,
    sums: Tensor | None = None,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Normalized:
    """v sigmoid(v) of v = :func:`batch_norm`'s output, whose arguments not named here are these.

    Args:
        sums: ``(2, C)`` sum and sum of squares of x on this rank, where the op that made x gave
            them (:func:`~nvae.ops.bn_swish_depthwise`). None: taken here where needed.
        impl: see :mod:`nvae.ops`.

    Raises:
        ValueError: batch statistics of a single element, or ``impl="cuda"`` where no kernel
            applies.
    """
    if not library.use_kernel(impl, x):
        y, statistics = batch_norm(x, gamma, beta, running=running, eps=eps, group=group, impl=impl)
        return Normalized(F.silu(y), statistics)
    # two passes forward (three with the sums of x); the backward pass recomputes from x, the only
    # tensor of its size that is kept
    x, moments = input_moments(x, running=running, sums=sums, eps=eps, group=group, impl=impl)
    y = _BatchNorm.apply(x, gamma, beta, moments.mean, moments.rstd, True, impl)
    return Normalized(y, moments.statistics)


def input_moments(
    x: Tensor,
    *,
    running: Statistics | BatchMoments | None,
    sums: Tensor | None,
    eps: float,
    group: dist.ProcessGroup | None,
    impl: Impl,
) -> tuple[Tensor, BatchMoments]:
    """What to normalize x with, and x to go on with.

    Where x's sums are taken here, x is passed through, so that its gradient and that of the sums
    arrive together and are added in one pass.
    """
    if running is not None:
        return x, running if isinstance(running, BatchMoments) else fixed_moments(running, eps)
    n = count_elements(x, group)
    if sums is None:
        x, sums = _ChannelSums.apply(x, impl)
    sums, elements = synchronize(sums, n, group)
    mean, rstd, var = _Moments.apply(sums, elements, float(n), eps, impl)
    count = n if elements is None else elements
    # var has no gradient already, but torch 2.11's compiler takes it for one that has
    statistics = Statistics(mean.detach(), var.detach(), count)
    return x, BatchMoments(mean, rstd, statistics)


def fixed_moments(running: Statistics, eps: float) -> BatchMoments:
    """Of running statistics, to be given in their place."""
    mean, var = running.mean.detach().double(), running.var.detach().double()
    return BatchMoments(mean, (var + eps).rsqrt(), running)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, swish: bool,
        impl: Impl,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, gamma, beta, mean, rstd)
        ctx.swish, ctx.impl = swish, impl
        y: Tensor = ops(impl).batch_norm(x, gamma, beta, mean, rstd, swish)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, (dgamma, dbeta), (dmean, drstd) = ops(ctx.impl).batch_norm_backward(
            dy, *ctx.saved_tensors, ctx.swish
        )
        return dx, dgamma, dbeta, dmean, drstd, None, None


def count_elements(x: Tensor, group: dist.ProcessGroup | None) -> int:
    """Elements per channel of ``x`` ``(B, C, H, W)`` on this rank.

    Raises:
        ValueError: a rank alone (``group`` None) with a single element per channel.
    """
    count = x.numel() // x.shape[1]
    if group is None and count < 2:
        raise ValueError(
            f"batch statistics need more than one element per channel, got input {tuple(x.shape)}"
        )
    return count


def synchronize(
    sums: Tensor, n: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Sums and number of elements over all ranks; the number is None for a rank alone."""
    if group is None:
        return sums, None
    packed = torch.cat([sums.flatten(), sums.new_full((1,), n)])
    packed = _AllReduceSum.apply(packed, group)
    return packed[:-1].view_as(sums), packed[-1].detach()


class _AllReduceSum(torch.autograd.Function):
    """Sum over the ranks of a group. Every rank's loss counts, so the gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x.view_as(x)  # compiled by torch 2.11, what was written in place has gradient 0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ChannelSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, impl: Impl) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.impl = impl
        ctx.set_materialize_grads(False)
        return x.view_as(x), ops(impl).channel_sums(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dsums: Tensor | None) -> tuple[Tensor | None, None]:
        if dsums is None:
            return dx, None
        (x,) = ctx.saved_tensors
        return ops(ctx.impl).fold(torch.zeros_like(x) if dx is None else dx, x, dsums), None


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sums: Tensor, elements: Tensor | None, n: float, eps: float, impl: Impl
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, rstd, var = ops(impl).moments(sums, elements, n, eps).unbind(0)
        ctx.save_for_backward(sums, elements)
        ctx.n, ctx.eps, ctx.impl = n, eps, impl
        ctx.mark_non_differentiable(var)
        ctx.set_materialize_grads(False)  # no zeros for var; mean and rstd are used together
        return mean, rstd, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dmean: Tensor, drstd: Tensor, _: None
    ) -> tuple[Tensor, None, None, None, None]:
        sums, elements = ctx.saved_tensors
        dsums = ops(ctx.impl).moments_backward(sums, elements, ctx.n, ctx.eps, dmean, drstd)
        return dsums, None, None, None, None
