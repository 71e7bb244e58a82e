"""The latent distribution: a diagonal Normal whose parameters cannot run away.

Means and log-sigmas are soft-clamped to (-5, 5) and sigma has a floor, so that neither the KL
nor its gradient can overflow whatever the network puts out (paper, section 3.3 on stability).
Everything here is computed in float32 at least, also under mixed precision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

SOFT_CLAMP = 5.0
SIGMA_FLOOR = 1e-2
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def soft_clamp(x: Tensor) -> Tensor:
    """Smoothly into (-5, 5), with slope 1 at 0: 5 tanh(x / 5)."""
    return SOFT_CLAMP * torch.tanh(x / SOFT_CLAMP)


@dataclass(frozen=True)
class Normal:
    """Diagonal Normal over a latent of shape ``(B, L, h, w)``.

    Attributes:
        mean: means, after the clamp.
        sigma: standard deviations, after the floor; always positive unless the
            temperature is 0.
    """

    mean: Tensor
    sigma: Tensor

    @classmethod
    def from_parameters(cls, mean: Tensor, log_sigma: Tensor, temperature: float = 1.0) -> "Normal":
        """Clamp raw network outputs and scale sigma by ``temperature`` (>= 0)."""
        mean, log_sigma = at_least_float32(mean), at_least_float32(log_sigma)
        sigma = soft_clamp(log_sigma).exp() + SIGMA_FLOOR
        if temperature != 1.0:
            sigma = sigma * temperature
        return cls(soft_clamp(mean), sigma)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Distributions of one class and shape as one, whose batch is all their batches."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def sample(self, noise: Tensor) -> Tensor:
        """Reparameterized draw from standard normal ``noise`` of the same shape."""
        return torch.addcmul(self.mean, self.sigma, noise)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of every element of ``z``, in nats; same shape as ``z``."""
        normalized = (z - self.mean) / self.sigma
        return -0.5 * normalized * normalized - HALF_LOG_2PI - self.sigma.log()

    def kl(self, prior: "Normal") -> Tensor:
        """KL(self || prior) of every element in closed form, in nats (paper, equation 2)."""
        difference = (self.mean - prior.mean) / prior.sigma
        ratio = self.sigma / prior.sigma
        return 0.5 * (difference * difference + ratio * ratio) - 0.5 - ratio.log()
