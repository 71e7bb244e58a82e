"""Batch-normalisation statistics: the half of the layer that ranks have to agree on.

A layer's statistics are the sum and the sum of squares of every channel. Everything that follows
(mean, variance, the backward terms through both) is a function of those 2C numbers, so
synchronising a layer is one all-reduce of them, and its gradient is one all-reduce of theirs.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae.ops import library  # noqa: F401 - registers torch.ops.nvae

OPS = torch.ops.nvae


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
    """What normalising with a batch takes.

    Attributes:
        mean: ``(C,)`` float64, differentiable.
        rstd: ``(C,)`` float64, 1 / sqrt(var + eps), differentiable.
        statistics: the same as constants, for running statistics.
    """

    mean: Tensor
    rstd: Tensor
    statistics: Statistics


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


def with_channel_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """x and its sums ``(2, C)``.

    x is passed through so that its gradient and that of the sums arrive together and are added in
    one pass.
    """
    x, sums = _ChannelSums.apply(x)
    return x, sums


def fused_moments(
    sums: Tensor,
    n: int,
    eps: float,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype,
) -> BatchMoments:
    """Moments from this rank's sums ``(2, C)`` over ``n`` elements, over all ranks of ``group``."""
    sums, elements = synchronise(sums, n, group)
    mean, rstd, var = _Moments.apply(sums, elements, float(n), eps)
    count = n if elements is None else elements
    return BatchMoments(mean, rstd, Statistics(mean.detach().to(dtype), var.to(dtype), count))


def synchronise(
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
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ChannelSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x.view_as(x), OPS.channel_sums(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dsums: Tensor | None) -> Tensor | None:
        if dsums is None:
            return dx
        (x,) = ctx.saved_tensors
        return OPS.fold(torch.zeros_like(x) if dx is None else dx, x, dsums)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sums: Tensor, elements: Tensor | None, n: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, rstd, var = OPS.moments(sums, elements, n, eps).unbind(0)
        ctx.save_for_backward(sums, elements)
        ctx.n, ctx.eps = n, eps
        ctx.mark_non_differentiable(var)
        return mean, rstd, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dmean: Tensor, drstd: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None, None]:
        sums, elements = ctx.saved_tensors
        dsums = OPS.moments_backward(sums, elements, ctx.n, ctx.eps, dmean, drstd)
        return dsums, None, None, None
