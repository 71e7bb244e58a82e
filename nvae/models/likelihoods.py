"""Bernoulli and Normal pixels; `logistic_mixture.py` and `stable_mixture.py` have the others."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.models.distributions import Normal
from nvae.models.pixel_distribution import (
    ImageConfig,
    PixelDistribution,
    Randomness,
    check_temperature,
    draw_normal,
    draw_uniform,
    sum_counted,
)


class Bernoulli(PixelDistribution):
    """Independent binary pixels with the given log-odds ``(B, C, H, W)``."""

    title = "Bernoulli"

    def __init__(self, logits: Tensor, config: ImageConfig) -> None:
        self.logits = logits
        self.counted_size = config.counted_size

    @classmethod
    def logit_channels(cls, config: ImageConfig) -> int:
        """One for every channel of the image."""
        return config.image_channels

    @classmethod
    def check_data(cls, config: ImageConfig, bits: int) -> None:
        """Black and white images only."""
        if bits != 1:
            raise ValueError(
                f"model.likelihood=bernoulli needs black and white pixels, data.bits={bits}; "
                "set data.bits=1 or use likelihood=logistic_mixture or normal"
            )

    @property
    def mean(self) -> Tensor:
        """P(x = 1)."""
        return torch.sigmoid(self.logits)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B,)`` nats; ``x`` is 0 or 1."""
        return -sum_counted(self._cross_entropy(x), self.counted_size)

    def pixel_log_prob(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` nats."""
        return -self._cross_entropy(x)

    def _cross_entropy(self, x: Tensor) -> Tensor:
        x = x.to(self.logits.dtype)
        return F.binary_cross_entropy_with_logits(self.logits, x, reduction="none")

    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """Draw 0/1 pixels; temperature divides the log-odds."""
        check_temperature(temperature)
        u = draw_uniform(self.logits, generator)
        # x = 1 where logit > t * logistic noise, which is P = sigmoid(logit / t)
        return (self.logits > temperature * torch.logit(u)).to(self.logits.dtype)


class NormalPixels(PixelDistribution):
    """Independent Normals over 2x - 1, not discretized; logits are means and log-sigmas.

    For pixels that are measured numbers. The density is that of 2x - 1, as published: per dimension
    log 2 nats below that of x. It may exceed 1, so that bits/dim may be negative. Pixels of b bits
    lie 2 / (2^b - 1) apart in 2x - 1, and where the density is smooth at that distance they take
    log2((2^b - 1) / 2) bits/dim more than it says: 6.99 for 8 bits. Sigma is 0.0167 at least.
    """

    title = "Normal"
    density_of = "2x - 1"

    def __init__(self, logits: Tensor, config: ImageConfig) -> None:
        mean, log_sigma = logits.chunk(2, dim=1)
        self.normal = Normal.from_parameters(mean, log_sigma)
        self.counted_size = config.counted_size

    @classmethod
    def logit_channels(cls, config: ImageConfig) -> int:
        """Mean and log-sigma of every channel."""
        return 2 * config.image_channels

    @property
    def mean(self) -> Tensor:
        """Mean, clipped to [0, 1]."""
        return self._to_image(self.normal.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B,)`` nats of density."""
        return sum_counted(self.pixel_log_prob(x), self.counted_size)

    def pixel_log_prob(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` nats of density."""
        return self.normal.log_prob(2 * x - 1)

    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """Draw; temperature multiplies sigma."""
        check_temperature(temperature)
        mean = self.normal.mean
        noise = draw_normal(mean, generator)
        return self._to_image(mean + temperature * self.normal.sigma * noise)

    @staticmethod
    def _to_image(pixels: Tensor) -> Tensor:
        return ((pixels + 1) / 2).clamp(0, 1)
