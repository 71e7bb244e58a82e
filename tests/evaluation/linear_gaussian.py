"""A model whose evidence is known: z ~ N(0, I), x | z ~ N(W z + b, s^2 I).

A hierarchical VAE of one group. Its
posterior is either exact, so that one importance weight is the evidence itself, or too wide.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from nvae.models.distributions import Normal
from nvae.models.hierarchical import HierarchicalVAE
from nvae.models.output import GroupSample

LATENT, PIXELS, SIDE = 2, 4, 2


class LinearGaussian(HierarchicalVAE):
    def __init__(self, widening: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(
            torch.randn(PIXELS, LATENT, generator=generator, dtype=torch.float64)
        )
        self.bias = torch.randn(PIXELS, generator=generator, dtype=torch.float64)
        self.sigma = 0.7
        self.widening = widening
        # one group whose "image" is LATENT channels of one pixel
        self.latent_shapes = ((LATENT, 1, 1),)
        self.config = SimpleNamespace(
            counted_pixels=PIXELS,
            latent_channels=LATENT,
            num_classes=0,
            pixel_distribution=SimpleNamespace(density_of="x"),
        )
        self.rows: list[int] = []
        self.encoded = 0

    def check_images(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != (1, SIDE, SIDE):
            raise ValueError("wrong size")

    def encode(self, x: Tensor) -> list[Tensor]:
        self.encoded += len(x)
        return [x]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, L) and per-channel standard deviation (L,) of the mean-field optimum."""
        precision = (
            torch.eye(LATENT, dtype=torch.float64) + self.weight.T @ self.weight / self.sigma**2
        )
        centred = x.flatten(1) - self.bias
        mean = torch.linalg.solve(precision, (centred @ self.weight / self.sigma**2).T).T
        return mean, precision.diagonal().rsqrt()

    def top_down(self, noise, *, encoder_maps):
        self.rows.append(len(noise[0]))
        mean, sigma = self.posterior(encoder_maps[0])
        shape = (-1, LATENT, 1, 1)
        sigma = (self.widening * sigma).expand_as(mean).reshape(shape)
        posterior = Normal(mean.reshape(shape), sigma)
        prior = Normal(torch.zeros_like(sigma), torch.ones_like(sigma))
        z = posterior.sample(noise[0])
        return z, (GroupSample(z, prior, posterior, z),)

    def decode_state(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ self.weight.T + self.bias).view(-1, 1, SIDE, SIDE)

    def likelihood(self, mean: Tensor):
        normal = Normal(mean, torch.full_like(mean, self.sigma))
        return SimpleNamespace(log_prob=lambda x: normal.log_prob(x).flatten(1).sum(1))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), (B,), nats: x ~ N(b, W W^T + s^2 I)."""
        covariance = self.weight @ self.weight.T + self.sigma**2 * torch.eye(
            PIXELS, dtype=torch.float64
        )
        return torch.distributions.MultivariateNormal(self.bias, covariance).log_prob(x.flatten(1))

    def negative_elbo(self, x: Tensor) -> Tensor:
        """-ELBO, (B,), nats, in closed form."""
        mean, sigma = self.posterior(x)
        variance = (self.widening * sigma) ** 2
        kl = 0.5 * (mean**2 + variance - 1 - variance.log()).sum(1)
        residual = x.flatten(1) - mean @ self.weight.T - self.bias
        spread = (self.weight**2 * variance).sum()
        error = (residual**2).sum(1) + spread
        constant = 0.5 * PIXELS * math.log(2 * math.pi * self.sigma**2)
        return kl + error / (2 * self.sigma**2) + constant

    def make_orthogonal(self) -> "LinearGaussian":
        """Orthogonal columns: the mean-field posterior is then the exact one."""
        with torch.no_grad():
            q, _ = torch.linalg.qr(self.weight)
            self.weight.copy_(q * torch.tensor([1.5, 0.6], dtype=torch.float64))
        return self
