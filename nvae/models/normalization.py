"""Batch normalization with its activation, and the running statistics that go with it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.ops import BatchMoments, Statistics, Tracked, batch_norm, bn_swish
from nvae.ops.library import Impl, has_kernels

EPS = 1e-5
MOMENTUM = 0.05


class BatchNorm(nn.Module):
    """Batch normalization followed by Swish, ELU or nothing.

    Args:
        channels: C.
        activation: ``none`` | ``swish`` | ``elu``.
        repeats: how often every input pixel stands for the published model's. Nearest
            upsampling repeats each pixel four times; it commutes with everything pointwise, so it
            is done later here, and only the unbiased running variance, which knows the number of
            pixels, has to be told.

    Attributes:
        group: process group whose ranks share batch statistics in training; None: this rank's
            own.
        momentum: share of a batch in the running statistics.
        frozen: normalize with the batch but leave the running statistics alone; set while
            gradient checkpointing computes a cell for the second time.
        counted_together: :func:`counted_together` counts the batch at hand.
        kernels: see :meth:`~nvae.models.HierarchicalVAE.choose_kernels`.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    group: dist.ProcessGroup | None = None
    momentum: float = MOMENTUM
    frozen: bool = False
    counted_together: bool = False
    kernels: Impl = "auto"

    def __init__(self, channels: int, activation: str = "none", repeats: int = 1) -> None:
        super().__init__()
        self.activation = activation
        self.repeats = repeats
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor, moments: BatchMoments | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape.

        Args:
            x: the raw features.
            moments: theirs, in training, where the op that made them knows; it has moved the
                running statistics.
        """
        if self.activation != "swish" and self.training and self._moves_by_itself():
            # frozen: given all the same, since torch keeps them for backward, as the first pass did
            momentum = 0.0 if self.frozen else self.momentum
            x = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, EPS
            )
        else:
            normalize = bn_swish if self.activation == "swish" else batch_norm
            x = normalize(
                x, self.weight, self.bias, moments=moments if self.training else self.running(),
                tracked=self.tracked(), eps=EPS, group=self.group, impl=self.kernels,
            )  # fmt: skip
        self.count()
        return F.elu(x) if self.activation == "elu" else x

    def _has_kernels(self) -> bool:
        return self.kernels != "reference" and has_kernels(self.running_mean.device)

    def _moves_by_itself(self) -> bool:
        """Whether torch's own pass may move the running statistics: on a GPU, where one launch less
        counts. On the CPU its rounding differs from ours, which published numbers were made with.
        """
        return self._has_kernels() and self.group is None and self.repeats == 1

    def running(self) -> Statistics | None:
        """The running statistics in evaluation; None in training, where the batch's are used."""
        return None if self.training else Statistics(self.running_mean, self.running_var)

    def tracked(self) -> Tracked | None:
        """The running statistics that a training batch is to move."""
        if not self.training or self.frozen:
            return None
        return Tracked(self.running_mean, self.running_var, self.momentum, self.repeats)

    def count(self) -> None:
        """Count a training batch that has moved the running statistics."""
        if self.training and not (self.frozen or self.counted_together):
            self.num_batches_tracked += 1

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, ``(C,)`` each, that the normalization applies in evaluation."""
        scale = self.weight * torch.rsqrt(self.running_var + EPS)
        return scale, self.bias - self.running_mean * scale


@contextmanager
def counted_together(norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Around one training pass: its batch is counted in all ``norms`` at once."""
    for norm in norms:
        norm.counted_together = True
    try:
        yield
    finally:
        for norm in norms:
            norm.counted_together = False
    if norms:
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
