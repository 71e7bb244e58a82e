"""A likelihood of one's own: Laplace pixels.

PYTHONPATH=examples python train.py data=random model.likelihood=own_likelihood:Laplace
"""

import torch
from torch import Tensor

from nvae.models.pixel_distribution import (
    ImageConfig,
    PixelDistribution,
    Randomness,
    check_temperature,
    draw_uniform,
    sum_counted,
)


class Laplace(PixelDistribution):
    """Independent Laplace densities over [0, 1]; logits are locations and log-scales."""

    title = "Laplace"
    density_of = "x"

    def __init__(self, logits: Tensor, config: ImageConfig) -> None:
        location, log_scale = logits.chunk(2, dim=1)
        self.location = torch.sigmoid(location)
        self.scale = log_scale.clamp(-5, 5).exp()
        self.counted_size = config.counted_size

    @classmethod
    def logit_channels(cls, config: ImageConfig) -> int:
        """Location and log-scale of every channel."""
        return 2 * config.image_channels

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.location

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B,)`` nats of density."""
        density = -(x - self.location).abs() / self.scale - (2 * self.scale).log()
        return sum_counted(density, self.counted_size)

    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """Draw; temperature multiplies the scale."""
        check_temperature(temperature)
        u = draw_uniform(self.location, generator) - 0.5
        noise = -u.sign() * torch.log1p(-2 * u.abs())
        return (self.location + temperature * self.scale * noise).clamp(0, 1)
