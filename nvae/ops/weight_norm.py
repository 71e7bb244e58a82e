"""Weight normalization, w_hat = exp(g) w / (||w|| + eps), the norm per output channel.

Salimans & Kingma 2016, with the gain as a logarithm. Autograd through the plain formula walks
over the weights a dozen times in backward; its closed form needs three.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

NORM_EPS = 1e-5


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
        weight, norm, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        along = (grad * weight).sum(tuple(range(1, weight.ndim)))
        # d scale / d ||w|| = -scale / (||w|| + eps), d ||w|| / d w = w / ||w||
        shrink = along * scale / ((norm + NORM_EPS) * norm.clamp_min(torch.finfo(norm.dtype).tiny))
        grad_weight = torch.addcmul(
            grad * _per_row(scale, weight), weight, _per_row(shrink, weight), value=-1
        )
        return grad_weight, along * scale
