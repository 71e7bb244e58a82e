"""Batch normalisation in plain PyTorch, with statistics that ranks may share."""

from typing import NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nvae.ops import formulas
from nvae.ops.statistics import Statistics, count_elements, synchronise


class Normalised(NamedTuple):
    """What a normalisation returns.

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
    running: Statistics | None = None,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
) -> Normalised:
    """gamma (x - mean) / sqrt(var + eps) + beta.

    Args:
        x: ``(B, C, H, W)``.
        gamma: ``(C,)`` scale.
        beta: ``(C,)`` shift.
        running: running statistics to normalise with (evaluation); they are constants. None: the
            batch's statistics, and gradients through them (training).
        eps: added to the variance.
        group: process group over which batch statistics are synchronised; None: this rank alone.

    Raises:
        ValueError: batch statistics of a single element.
    """
    if running is not None:
        y = F.batch_norm(x, running.mean, running.var, gamma, beta, False, 0.0, eps)
        return Normalised(y, running)
    n = count_elements(x, group)
    if group is None:
        # momentum 1 makes PyTorch leave the batch's own statistics in the "running" ones
        mean, var = gamma.new_zeros(gamma.shape), gamma.new_ones(gamma.shape)
        y = F.batch_norm(x, mean, var, gamma, beta, True, 1.0, eps)
        return Normalised(y, Statistics(mean, var * ((n - 1) / n), n))
    sums, elements = synchronise(formulas.channel_sums(x), n, group)
    assert elements is not None
    mean, rstd, var = formulas.moments(sums, elements, n, eps)
    y = formulas.normalise(x, gamma, beta, mean, rstd)
    statistics = Statistics(mean.detach().to(gamma.dtype), var.detach().to(gamma.dtype), elements)
    return Normalised(y.to(x.dtype), statistics)
