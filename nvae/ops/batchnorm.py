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

from nvae.ops import library, reference
from nvae.ops.library import Impl, ops


class Statistics(NamedTuple):
    """Running statistics to normalize with, per channel. They are constants.

    Attributes:
        mean: ``(C,)``.
        var: ``(C,)``.
    """

    mean: Tensor
    var: Tensor


class Tracked(NamedTuple):
    """Running statistics that move in place towards the batch's.

    Attributes:
        mean: ``(C,)``.
        var: ``(C,)``, the unbiased variance: divided by the number of elements less one.
        momentum: share of the batch.
        repeats: how often every element counts in that number.
    """

    mean: Tensor
    var: Tensor
    momentum: float
    repeats: int = 1


class BatchMoments(NamedTuple):
    """What normalizing takes, worked out.

    Attributes:
        values: ``(3, C)`` float64: mean, 1 / sqrt(var + eps), biased variance. A constant: the
            gradient goes through ``sums``.
        sums: ``(2, C)`` float64, sum and sum of squares that the values follow from,
            differentiable; None where the values are constants.
        elements: of the sums, 0-d float64, where ranks were asked.
        n: the same otherwise.
    """

    values: Tensor
    sums: Tensor | None = None
    elements: Tensor | None = None
    n: float = 0.0


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    moments: Statistics | BatchMoments | None = None,
    tracked: Tracked | None = None,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """gamma (x - mean) / sqrt(var + eps) + beta, ``(B, C, H, W)``.

    Args:
        x: ``(B, C, H, W)``.
        gamma: ``(C,)`` scale.
        beta: ``(C,)`` shift.
        moments: what to normalize with: running statistics (evaluation), where they stay the same
            their :func:`fixed_moments`, made once; or those of x where the op that made it gave
            them. None: taken here of the batch, with gradients through them (training).
        tracked: running statistics that move where the batch's are taken here, by the statistics
            of all ranks of the group.
        eps: added to the variance.
        group: process group over which batch statistics are synchronized; None: this rank alone.
        impl: see :mod:`nvae.ops`; it matters with a group or given moments alone.

    Raises:
        ValueError: batch statistics of a single element.
    """
    if isinstance(moments, Statistics):
        return F.batch_norm(x, moments.mean, moments.var, gamma, beta, False, 0.0, eps)
    if moments is None and group is None:
        n = count_elements(x, group)
        # momentum 1 makes PyTorch leave the batch's own statistics in the "running" ones
        mean, var = gamma.new_zeros(gamma.shape), gamma.new_ones(gamma.shape)
        y = F.batch_norm(x, mean, var, gamma, beta, True, 1.0, eps)
        if tracked is not None:
            var = var * ((n - 1) / n)
            with torch.no_grad():
                reference.track(
                    tracked.mean, tracked.var, mean, var, None, n, tracked.repeats, tracked.momentum
                )
        return y
    # by kernels where there are any: x is all that is kept, 2 bytes an element in bfloat16
    return _normalize(x, gamma, beta, moments, tracked, eps, group, False, impl)


def bn_swish(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    moments: Statistics | BatchMoments | None = None,
    tracked: Tracked | None = None,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """v sigmoid(v) of v = :func:`batch_norm`'s output, whose arguments these are.

    Args:
        impl: see :mod:`nvae.ops`.

    Raises:
        ValueError: batch statistics of a single element, or ``impl="cuda"`` where no kernel
            applies.
    """
    if not library.use_kernel(impl, x):
        return F.silu(
            batch_norm(
                x, gamma, beta, moments=moments, tracked=tracked, eps=eps, group=group, impl=impl
            )
        )
    # two passes forward (three with the moments of x); the backward pass recomputes from x, the
    # only tensor of its size that is kept
    return _normalize(x, gamma, beta, moments, tracked, eps, group, True, impl)


def _normalize(
    x: Tensor, gamma: Tensor, beta: Tensor, moments: Statistics | BatchMoments | None,
    tracked: Tracked | None, eps: float, group: dist.ProcessGroup | None, swish: bool, impl: Impl,
) -> Tensor:  # fmt: skip
    x, found = input_moments(x, moments, tracked, eps, group, impl)
    y: Tensor = _BatchNorm.apply(
        x, gamma, beta, found.sums, found.values, found.elements, found.n, swish, impl
    )
    return y


def input_moments(
    x: Tensor,
    moments: Statistics | BatchMoments | None,
    tracked: Tracked | None,
    eps: float,
    group: dist.ProcessGroup | None,
    impl: Impl,
) -> tuple[Tensor, BatchMoments]:
    """What to normalize x with, and x to go on with.

    Where x's sums are taken here, x is passed through, so that its gradient and that of the sums
    arrive together and are added in one pass.
    """
    if moments is not None:
        return x, fixed_moments(moments, eps) if isinstance(moments, Statistics) else moments
    n = count_elements(x, group)
    if group is not None:
        x, sums = _ChannelSums.apply(x, impl)
        return x, shared_moments(sums, n, tracked, eps, group, impl)
    x, sums, values = _ChannelMoments.apply(x, *tracking(tracked, eps), impl)
    return x, BatchMoments(values, sums, None, float(n))


def shared_moments(
    sums: Tensor, n: int, tracked: Tracked | None, eps: float, group: dist.ProcessGroup, impl: Impl
) -> BatchMoments:
    """Moments over the ranks of a group.

    Args:
        sums: ``(2, C)``, sum and sum of squares of the n elements of this rank.
        n: their number.
        tracked, eps, group, impl: as for :func:`batch_norm`.
    """
    packed = torch.cat([sums.flatten(), sums.new_full((1,), n)])
    packed = _AllReduceSum.apply(packed, group)
    sums, elements = packed[:-1].view_as(sums), packed[-1].detach()
    values = ops(impl).moments(sums.detach(), elements, float(n), *tracking(tracked, eps))
    return BatchMoments(values, sums, elements, float(n))


def tracking(
    tracked: Tracked | None, eps: float
) -> tuple[float, Tensor | None, Tensor | None, float, float]:
    """What the registered ops take: see :data:`nvae.ops.kernels.Tracking`."""
    if tracked is None:
        return eps, None, None, 1.0, 0.0
    return eps, tracked.mean, tracked.var, float(tracked.repeats), tracked.momentum


def fixed_moments(running: Statistics, eps: float) -> BatchMoments:
    """Of running statistics, to be given in their place."""
    mean, var = running.mean.detach().double(), running.var.detach().double()
    return BatchMoments(torch.stack([mean, (var + eps).rsqrt(), var]))


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, sums: Tensor | None, moments: Tensor,
        elements: Tensor | None, n: float, swish: bool, impl: Impl,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, gamma, beta, moments, elements)
        # nothing goes through moments without sums
        ctx.n, ctx.swish, ctx.impl = 0.0 if sums is None else n, swish, impl
        y: Tensor = ops(impl).batch_norm(x, gamma, beta, moments, swish)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, elements = ctx.saved_tensors
        dx, (dgamma, dbeta), dsums = ops(ctx.impl).batch_norm_backward(
            dy, *inputs, ctx.swish, elements, ctx.n
        )
        dsums = dsums if ctx.needs_input_grad[3] else None
        return dx, dgamma, dbeta, dsums, None, None, None, None, None


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
        return _folded(ctx, dx, dsums), None


class _ChannelMoments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: float, running_mean: Tensor | None, running_var: Tensor | None,
        repeats: float, momentum: float, impl: Impl,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(x)
        ctx.impl = impl
        ctx.set_materialize_grads(False)
        sums, moments = ops(impl).channel_moments(
            x, eps, running_mean, running_var, repeats, momentum
        )
        ctx.mark_non_differentiable(moments)
        return x.view_as(x), sums, moments

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dx: Tensor | None, dsums: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        return _folded(ctx, dx, dsums), None, None, None, None, None, None


def _folded(ctx: Any, dx: Tensor | None, dsums: Tensor | None) -> Tensor | None:
    """Gradient of x from those of what it was passed on as."""
    if dsums is None:
        return dx
    (x,) = ctx.saved_tensors
    gradient: Tensor = ops(ctx.impl).fold(torch.zeros_like(x) if dx is None else dx, x, dsums)
    return gradient
