"""Batch normalisation with its activation."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.ops import Statistics, batch_norm, bn_swish

EPS = 1e-5
MOMENTUM = 0.05


class BatchNorm(nn.Module):
    """Batch normalisation followed by Swish, ELU or nothing.

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
        frozen: normalise with the batch but leave the running statistics alone; set while
            gradient checkpointing computes a cell for the second time.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    group: dist.ProcessGroup | None = None
    frozen: bool = False

    def __init__(self, channels: int, activation: str = "none", repeats: int = 1) -> None:
        super().__init__()
        self.activation = activation
        self.repeats = repeats
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor, sums: Tensor | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape.

        Args:
            x: the raw features.
            sums: ``(2, C)``, their sum and sum of squares where the op that made them knows.
        """
        running = self.running()
        if self.activation == "swish":
            x, statistics = bn_swish(
                x, self.weight, self.bias, running=running, sums=sums, eps=EPS, group=self.group
            )
        else:
            x, statistics = batch_norm(
                x, self.weight, self.bias, running=running, eps=EPS, group=self.group
            )
        self.track(statistics)
        return F.elu(x) if self.activation == "elu" else x

    def running(self) -> Statistics | None:
        """The running statistics in evaluation; None in training, where the batch's are used."""
        return None if self.training else Statistics(self.running_mean, self.running_var)

    @torch.no_grad()
    def track(self, statistics: Statistics) -> None:
        """Move the running statistics towards a training batch's."""
        if not self.training or self.frozen:
            return
        n = self.repeats * statistics.elements
        self.running_mean.lerp_(statistics.mean.to(self.running_mean), MOMENTUM)
        unbiased = statistics.var * (n / (n - 1))
        self.running_var.lerp_(unbiased.to(self.running_var), MOMENTUM)
        self.num_batches_tracked += 1
