"""Batch-normalisation statistics: the half of the layer that ranks have to agree on.

A layer's statistics are the sum and the sum of squares of every channel. Everything that follows
(mean, variance, the backward terms through both) is a function of those 2C numbers, so
synchronising a layer is one all-reduce of them, and its gradient is one all-reduce of theirs.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


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


class _AllReduceSum(torch.autograd.Function):
    """Sum over the ranks of a group. Each rank's loss counts, so the gradient is summed too."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)  # type: ignore[attr-defined]
        return grad, None


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of ``x`` over the ranks of ``group``, differentiable."""
    reduced: Tensor = _AllReduceSum.apply(x, group)
    return reduced


def element_count(x: Tensor, group: dist.ProcessGroup | None) -> int | Tensor:
    """Elements per channel of ``x`` ``(B, C, H, W)``, summed over the ranks of ``group``.

    Raises:
        ValueError: one rank alone, and a single element per channel.
    """
    count = x.numel() // x.shape[1]
    if group is None:
        if count < 2:
            raise ValueError(
                "batch statistics need more than one element per channel, "
                f"got input {tuple(x.shape)}"
            )
        return count
    total = torch.full((), count, dtype=torch.float64, device=x.device)
    dist.all_reduce(total, group=group)
    return total
