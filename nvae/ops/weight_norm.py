"""Weight normalization, w_hat = exp(g) w / (||w|| + eps), the norm per output channel.

Salimans & Kingma 2016, with the gain as a logarithm. Autograd through the plain formula walks
over the weights a dozen times in backward; its closed form needs three.
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nvae.ops.cuda import Launch, Launcher
from nvae.ops.kernels import CUDA, DTYPES
from nvae.ops.multi_tensor import block_table, laid_out_like

NORM_EPS = 1e-5
THREADS = 256
ROWS = THREADS // 32
"""Rows of a block."""


def weight_norm(weight: Tensor, log_gain: Tensor) -> Tensor:
    """Normalize every row.

    Args:
        weight: ``(out, ...)``.
        log_gain: ``(out,)``, g.

    Returns:
        w_hat, of the weight's shape and memory format.
    """
    return _WeightNorm.apply(weight, log_gain)


def row_norm(weight: Tensor) -> Tensor:
    """||w|| of every row of ``(out, ...)``, ``(out,)``."""
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)))


def weight_norm_reference(weight: Tensor, log_gain: Tensor) -> Tensor:
    """The formula itself, differentiated by autograd."""
    scale = log_gain.exp() / (row_norm(weight) + NORM_EPS)
    return weight * _per_row(scale, weight)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _scaled_gradient(
    grad: Tensor, weight: Tensor, norm: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    along = (grad * weight).sum(tuple(range(1, weight.ndim)))
    # d scale / d ||w|| = -scale / (||w|| + eps), d ||w|| / d w = w / ||w||
    shrink = along * scale / ((norm + NORM_EPS) * norm.clamp_min(torch.finfo(norm.dtype).tiny))
    grad_weight = grad * _per_row(scale, weight)
    # in place: memory that is new to the process costs a CPU more than the arithmetic
    grad_weight.addcmul_(weight, _per_row(shrink, weight), value=-1)
    return grad_weight, along * scale


class _WeightNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, log_gain: Tensor) -> Tensor:
        norm = row_norm(weight)
        scale = log_gain.exp() / (norm + NORM_EPS)
        ctx.save_for_backward(weight, norm, scale)
        return weight * _per_row(scale, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _scaled_gradient(grad, *ctx.saved_tensors)  # type: ignore[attr-defined]


def weight_norms(
    weights: Sequence[Tensor], log_gains: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """:func:`weight_norm` of many convolutions, one launch for all of them, one more in backward.

    Args:
        weights: float32, ``(out, ...)`` each.
        log_gains: ``(out,)`` each.
        dtype: of the results, in which the convolutions will run.
    """
    return list(_WeightNorms.apply(dtype, len(weights), *weights, *log_gains))


class _WeightNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, gains = tensors[:count], tensors[count:]
        normalized, norms, scales = torch.ops.nvae.weight_norms(weights, gains, dtype)
        ctx.save_for_backward(*weights, norms, scales)
        ctx.set_materialize_grads(False)  # one that nobody used costs nothing
        return tuple(normalized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *weights, norms, scales = ctx.saved_tensors
        rows = [len(weight) for weight in weights]
        used = [index for index, gradient in enumerate(gradients) if gradient is not None]
        result: list[Tensor | None] = [None] * (2 + 2 * len(weights))
        if not used:
            return tuple(result)
        norms, scales = norms.split(rows), scales.split(rows)
        of_weights, of_gains = torch.ops.nvae.weight_norms_backward(
            [gradients[i] for i in used], [weights[i] for i in used],
            [norms[i] for i in used], [scales[i] for i in used],
        )  # fmt: skip
        for index, of_weight, of_gain in zip(used, of_weights, of_gains, strict=True):
            result[2 + index], result[2 + len(weights) + index] = of_weight, of_gain
        return tuple(result)


def weight_norms_kernel(
    weights: list[Tensor], gains: list[Tensor], dtype: torch.dtype, launcher: Launcher = CUDA
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every w_hat, and norm and scale of all rows, ``(sum of out,)`` each."""
    normalized, norms, scales = weight_norms_fake(weights, gains, dtype)
    rows, table = [len(w) for w in weights], []
    for weight, gain, out, norm, scale in zip(
        weights, gains, normalized, norms.split(rows), scales.split(rows), strict=True
    ):
        table.append(
            (*_sizes(weight), *(t.data_ptr() for t in (weight, gain, out, norm, scale)), 0)
        )
    _launch(0, table, dtype, norms.device, launcher)
    return normalized, norms, scales


def weight_norms_backward_kernel(
    gradients: list[Tensor], weights: list[Tensor], norms: list[Tensor], scales: list[Tensor],
    launcher: Launcher = CUDA,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Gradients of every w and g."""
    dtype = gradients[0].dtype
    of_weights = [torch.empty_like(weight) for weight in weights]
    of_gains = [torch.empty_like(scale) for scale in scales]
    # the convolution's backward pass may have chosen another layout
    laid_out = [laid_out_like(w, g) for g, w in zip(gradients, weights, strict=True)]
    columns = weights, laid_out, norms, scales, of_weights, of_gains
    table = [(*_sizes(row[0]), *(t.data_ptr() for t in row)) for row in zip(*columns, strict=True)]
    _launch(1, table, dtype, norms[0].device, launcher)
    return of_weights, of_gains


def _sizes(weight: Tensor) -> tuple[int, int]:
    return len(weight), weight[0].numel()


def _launch(
    mode: int, table: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device,
    launcher: Launcher,
) -> None:  # fmt: skip
    tensors, blocks = block_table(device, tuple(table), tuple(row[0] for row in table), ROWS)
    macros = (("ELEM", DTYPES[dtype]), ("VIO", 1), ("MODE", mode), ("THREADS", THREADS))
    scalars = struct.pack("f4x", NORM_EPS)
    launch = Launch("weight_norm", macros, len(blocks), THREADS, 0, (tensors, blocks), scalars)
    launcher.launch(device, launch)


def weight_norms_formula(
    weights: list[Tensor], gains: list[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What :func:`weight_norms_kernel` gives, convolution by convolution."""
    norms = [row_norm(weight) for weight in weights]
    scales = [g.exp() / (norm + NORM_EPS) for g, norm in zip(gains, norms, strict=True)]
    normalized = [
        (w * _per_row(scale, w)).to(dtype) for w, scale in zip(weights, scales, strict=True)
    ]
    return normalized, torch.cat(norms), torch.cat(scales)


def weight_norms_backward_formula(
    gradients: list[Tensor], weights: list[Tensor], norms: list[Tensor], scales: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What :func:`weight_norms_backward_kernel` gives, convolution by convolution."""
    pairs = [
        _scaled_gradient(g.to(w), w, norm, scale)
        for g, w, norm, scale in zip(gradients, weights, norms, scales, strict=True)
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def weight_norms_fake(
    weights: list[Tensor], gains: list[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Uninitialized results."""
    rows = sum(len(weight) for weight in weights)
    normalized = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    return normalized, weights[0].new_empty(rows), weights[0].new_empty(rows)


def weight_norms_backward_fake(
    gradients: list[Tensor], weights: list[Tensor], norms: list[Tensor], scales: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Uninitialized results."""
    return [torch.empty_like(w) for w in weights], [torch.empty_like(s) for s in scales]
