"""Batch normalisation folded into convolutions, for evaluation without gradients.

With running statistics a BN is an affine map per channel, so a mobile convolution needs none of
its four: the maps go into the neighbouring weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvae.models.norm import EPS, BatchNorm


@dataclass(frozen=True)
class FoldedConv:
    """A convolution that does its neighbours' normalisation too.

    Attributes:
        weight: of the convolution's shape and memory format.
        bias: ``(out,)``.
    """

    weight: Tensor
    bias: Tensor


def affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift, ``(C,)`` each, that the normalisation applies in evaluation."""
    scale = norm.weight * torch.rsqrt(norm.running_var + EPS)
    return scale, norm.bias - norm.running_mean * scale


def fold_after(weight: Tensor, after: BatchNorm) -> FoldedConv:
    """A convolution without bias followed by ``after``."""
    scale, shift = affine(after)
    return FoldedConv(weight * scale.view(-1, 1, 1, 1), shift)


def fold_around(before: BatchNorm, weight: Tensor, after: BatchNorm) -> FoldedConv:
    """``before``, a 1x1 convolution, ``after``; 1x1, since padding would see the shift."""
    in_scale, in_shift = affine(before)
    scale, shift = affine(after)
    bias = scale * (weight.flatten(1) @ in_shift) + shift
    return FoldedConv(weight * in_scale.view(1, -1, 1, 1) * scale.view(-1, 1, 1, 1), bias)
