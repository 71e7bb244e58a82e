"""Normalisations folded into convolutions, for evaluation without gradients.

With running statistics a BN is an affine map per channel, so a mobile convolution needs none of
its four: the maps go into the neighbouring weights. A weight-normalised convolution becomes a plain
one with the normalised weight.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nvae.models.norm import EPS, BatchNorm


@runtime_checkable
class Foldable(Protocol):
    """A layer that has a cheaper equal in evaluation."""

    def folded(self) -> nn.Module:
        """The equal: fixed weights, none of this layer's parameters."""
        ...


def fold(module: nn.Module) -> nn.Module:
    """Put its equal in the place of every :class:`Foldable` layer inside ``module``."""
    for name, child in module.named_children():
        if isinstance(child, Foldable):
            setattr(module, name, child.folded())
        else:
            fold(child)
    return module


def fixed_conv(
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """A convolution with the given weight ``(out, in / groups, kh, kw)`` and bias ``(out,)``."""
    out_channels, in_channels, *kernel = weight.shape
    conv = nn.Conv2d(
        in_channels * groups, out_channels, (kernel[0], kernel[1]), stride, padding, dilation,
        groups, bias=bias is not None, device="meta",
    )  # fmt: skip
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return conv


def affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift, ``(C,)`` each, that the normalisation applies in evaluation."""
    scale = norm.weight * torch.rsqrt(norm.running_var + EPS)
    return scale, norm.bias - norm.running_mean * scale


def fold_after(conv: nn.Conv2d, after: BatchNorm) -> nn.Conv2d:
    """A convolution without bias followed by ``after``, as one convolution."""
    scale, shift = affine(after)
    return fixed_conv(
        conv.weight * scale.view(-1, 1, 1, 1), shift, stride=conv.stride[0],
        padding=int(conv.padding[0]), dilation=conv.dilation[0], groups=conv.groups,
    )  # fmt: skip


def fold_around(before: BatchNorm, conv: nn.Conv2d, after: BatchNorm) -> nn.Conv2d:
    """``before``, a 1x1 convolution, ``after``; 1x1, since padding would see the shift."""
    in_scale, in_shift = affine(before)
    scale, shift = affine(after)
    weight = conv.weight * in_scale.view(1, -1, 1, 1) * scale.view(-1, 1, 1, 1)
    return fixed_conv(weight, scale * (conv.weight.flatten(1) @ in_shift) + shift)
