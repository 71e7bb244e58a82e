"""Batch normalisation folded into convolutions, for evaluation without gradients.

With running statistics a BN is an affine map per channel, so a mobile convolution needs none of
its four: the maps go into the neighbouring weights. The folded weights are derived, never stored:
they are made anew whenever a parameter or statistic has changed.
"""

from collections.abc import Callable
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


class FoldedCache:
    """Holds what was folded last, together with what it was folded from."""

    def __init__(self) -> None:
        self._key: tuple[tuple[int, int], ...] | None = None
        self._folded: tuple[FoldedConv, ...] = ()

    def get(
        self, sources: list[Tensor], fold: Callable[[], tuple[FoldedConv, ...]]
    ) -> tuple[FoldedConv, ...]:
        """``fold()``, or its last result if no source was written to or replaced since."""
        if any(source.is_inference() for source in sources):
            return fold()  # tensors made in inference mode do not count their versions
        key = tuple((source.data_ptr(), source._version) for source in sources)
        if key != self._key:
            self._key, self._folded = key, fold()
        return self._folded


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
