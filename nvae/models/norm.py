"""Batch normalisation with its activation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, activation: str = "none", repeats: int = 1) -> None:
        super().__init__()
        self.activation = activation
        self.repeats = repeats
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        corrected = self.training and self.repeats > 1
        # batch_norm keeps its buffer for backward, so the correction must not write into it
        running_var = self.running_var.clone() if corrected else self.running_var
        x = F.batch_norm(
            x, self.running_mean, running_var, self.weight, self.bias,
            self.training, MOMENTUM, EPS,
        )  # fmt: skip
        if self.training:
            self.num_batches_tracked += 1
        if corrected:
            n = x.numel() // x.shape[1]
            ratio = self.repeats * (n - 1) / (self.repeats * n - 1)
            kept = (1 - MOMENTUM) * self.running_var
            self.running_var.copy_(kept + (running_var - kept) * ratio)
        if self.activation == "swish":
            return F.silu(x)
        return F.elu(x) if self.activation == "elu" else x
