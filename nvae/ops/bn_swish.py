"""Batch normalisation followed by Swish."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nvae.ops.dispatch import Impl, use_kernel
from nvae.ops.statistics import Statistics, all_reduce_sum, element_count


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
    use_kernel(impl, x, gamma, beta)
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
    count = element_count(x, group)
    if group is None:
        # momentum 1 makes PyTorch leave the batch's own statistics in the "running" ones
        mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
        y = F.batch_norm(x, mean, var, gamma, beta, True, 1.0, eps)
        assert isinstance(count, int)
        return BnSwish(F.silu(y), Statistics(mean, var * ((count - 1) / count), count))
    wide = x.double()
    sums = torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
    mean, square = all_reduce_sum(sums, group) / count
    var = (square - mean * mean).clamp_min(0)
    centred = (wide - mean.view(1, -1, 1, 1)) * (var + eps).rsqrt().view(1, -1, 1, 1)
    y = centred.to(x.dtype) * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)
    statistics = Statistics(mean.detach().to(gamma.dtype), var.detach().to(gamma.dtype), count)
    return BnSwish(F.silu(y.to(x.dtype)), statistics)
