"""Depthwise convolution, alone or of batch normalization and Swish in one op."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae.ops import library, reference
from nvae.ops.batchnorm import (
    BatchMoments,
    Statistics,
    Tracked,
    batch_norm,
    count_elements,
    input_moments,
    shared_moments,
    tracking,
)
from nvae.ops.library import OPS, Impl


def depthwise_conv2d(x: Tensor, weight: Tensor, stride: int = 1, *, impl: Impl = "auto") -> Tensor:
    """Convolve every channel with its own kernel; "same" padding, no bias.

    Args:
        x: ``(B, C, H, W)``.
        weight: ``(C, 1, K, K)``, K odd.
        stride: 1 or 2.
        impl: see :mod:`nvae.ops`.

    Returns:
        ``(B, C, ceil(H / stride), ceil(W / stride))``, of x's dtype (autocast's where enabled).

    Raises:
        ValueError: a shape that is not depthwise, or ``impl="cuda"`` where no kernel applies.
    """
    check_depthwise(x, weight, stride)
    if not library.use_kernel(impl, x, weight.shape[-1]):
        return reference.depthwise(x, weight, stride)
    y: Tensor = _Depthwise.apply(library.to_autocast_dtype(x), weight, stride)
    return y


def check_depthwise(x: Tensor, weight: Tensor, stride: int) -> None:
    """Raise ValueError unless weight and stride fit x."""
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    c, one, kh, kw = weight.shape if weight.dim() == 4 else (0, 0, 0, 0)
    if c != x.shape[1] or one != 1 or kh != kw or kh % 2 == 0:
        raise ValueError(
            f"weight must be (C, 1, K, K) with C = {x.shape[1]} and K odd, "
            f"got {tuple(weight.shape)}"
        )
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        y: Tensor = OPS.depthwise(x, weight, stride)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx, dw = OPS.depthwise_backward(dy, x, weight, ctx.stride, need_dx, need_dw)
        return dx if need_dx else None, dw if need_dw else None, None


class BnSwishDepthwise(NamedTuple):
    """What :func:`bn_swish_depthwise` returns.

    Attributes:
        output: ``(B, C, ceil(H / stride), ceil(W / stride))``.
        moments: of the output in training, differentiable, for the next
            ``bn_swish(..., moments=)``; None where the path taken does not have them for nothing
            (then the next op takes them itself).
    """

    output: Tensor
    moments: BatchMoments | None


def bn_swish_depthwise(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    stride: int = 1,
    *,
    moments: Statistics | BatchMoments | None = None,
    tracked: Tracked | None = None,
    tracked_next: Tracked | None = None,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> BnSwishDepthwise:
    """``depthwise_conv2d(bn_swish(x), weight, stride)`` without the tensor in between.

    The branch of a mobile cell, ``BN + Swish -> depthwise -> BN + Swish``, in training, where each
    of the two moves running statistics::

        h = bn_swish_depthwise(
            x, gamma1, beta1, weight, stride, tracked=first, tracked_next=second, group=group
        )
        z = bn_swish(h.output, gamma2, beta2, moments=h.moments, tracked=second, group=group)

    and in evaluation::

        h = bn_swish_depthwise(x, gamma1, beta1, weight, stride, moments=running1)
        z = bn_swish(h.output, gamma2, beta2, moments=running2)

    Args:
        x: ``(B, C, H, W)``, the raw input; the backward pass keeps nothing else of its size.
        weight: ``(C, 1, K, K)``, K odd.
        stride: 1 or 2.
        tracked_next: running statistics of the layer that the output goes to. They move where the
            result has moments, which are made with the same eps.
        gamma, beta, moments, tracked, eps, group, impl: as in :func:`~nvae.ops.bn_swish`.

    Raises:
        ValueError: as :func:`~nvae.ops.bn_swish` and :func:`~nvae.ops.depthwise_conv2d`.
    """
    check_depthwise(x, weight, stride)
    if not library.use_kernel(impl, x, weight.shape[-1]):
        y = batch_norm(
            x, gamma, beta, moments=moments, tracked=tracked, eps=eps, group=group, impl=impl
        )
        return BnSwishDepthwise(reference.depthwise(F.silu(y), weight, stride), None)
    x, found = input_moments(library.to_autocast_dtype(x), moments, tracked, eps, group, impl)
    arguments = (x, gamma, beta, *found, weight, stride)
    if found.sums is None:
        y, _, _ = _BnSwishDepthwise.apply(*arguments, False)
        return BnSwishDepthwise(y, None)
    if group is not None:
        y, sums, _ = _BnSwishDepthwise.apply(*arguments, True)
        n = count_elements(y, group)
        return BnSwishDepthwise(y, shared_moments(sums, n, tracked_next, eps, group, impl))
    y, sums, values = _BnSwishDepthwise.apply(*arguments, True, *tracking(tracked_next, eps))
    return BnSwishDepthwise(y, BatchMoments(values, sums, None, float(count_elements(y, group))))


class _BnSwishDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        moments: Tensor,
        sums: Tensor | None,
        elements: Tensor | None,
        n: float,
        weight: Tensor,
        stride: int,
        want_sums: bool,
        *tracking: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (x, gamma, beta, moments, weight)
        if tracking:
            y, sums_y, made = OPS.bn_swish_depthwise_moments(*inputs, stride, *tracking)
        else:
            y, sums_y = OPS.bn_swish_depthwise(*inputs, stride, want_sums)
            made = sums_y.new_empty(0)
        # y is the next layer's raw input, so keeping it costs nothing
        ctx.save_for_backward(y, *inputs, elements)
        # nothing goes through moments without sums
        ctx.n, ctx.stride, ctx.others = 0.0 if sums is None else n, stride, 2 + len(tracking)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(made)
        return y, sums_y, made

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dsums_y: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        y, *inputs, elements = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else dy
        dx, (dgamma, dbeta), dsums, dw = OPS.bn_swish_depthwise_backward(
            dy, y, dsums_y, *inputs, ctx.stride, elements, ctx.n
        )
        dsums = dsums if ctx.needs_input_grad[4] else None
        return dx, dgamma, dbeta, None, dsums, None, None, dw, *[None] * ctx.others
