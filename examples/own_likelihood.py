"""A likelihood of one's own: Laplace-distributed pixels, in one class.

    python examples/own_likelihood.py

The class is named ``package.module:Class`` in the configuration: beside this file,
``PYTHONPATH=examples python train.py 'model.likelihood="own_likelihood:LaplacePixels"'``.
"""

import math
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nvae.models import NVAE, ModelConfig
from nvae.models.likelihoods import ImageConfig, PixelDistribution, Randomness
from nvae.training.module import NVAELightning

SMALLEST_LOG_SCALE = -5.0


class LaplacePixels(PixelDistribution):
    """Independent Laplace densities over x in [0, 1]; logits are medians and log-scales."""

    title = "Laplace"

    def __init__(self, logits: Tensor, config: ImageConfig) -> None:
        self.median, log_scale = logits.chunk(2, dim=1)
        self.log_scale = log_scale.clamp(min=SMALLEST_LOG_SCALE)

    @classmethod
    def logit_channels(cls, config: ImageConfig) -> int:
        """Median and log-scale of every channel."""
        return 2 * config.image_channels

    @property
    def mean(self) -> Tensor:
        """Median, clipped to [0, 1]."""
        return self.median.clamp(0, 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B,)`` nats of density."""
        distance = (x - self.median).abs() * torch.exp(-self.log_scale)
        return (-distance - self.log_scale - math.log(2)).flatten(1).sum(1)

    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """Draw; temperature multiplies the scale."""
        if generator is None or isinstance(generator, torch.Generator):
            u = torch.rand(self.median.shape, generator=generator, device=self.median.device)
        else:
            u = generator.uniform(self.median)
        u = u - 0.5
        noise = -u.sign() * torch.log1p(-2 * u.abs() + 1e-7)
        return (self.median + temperature * self.log_scale.exp() * noise).clamp(0, 1)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    config = ModelConfig(
        image_size=8, likelihood="own_likelihood:LaplacePixels", num_scales=1, groups_per_scale=2,
        preprocess_blocks=1, encoder_channels=8, decoder_channels=8, latent_channels=2,
    )  # fmt: skip
    images = torch.rand(64, 1, 8, 8)
    trainer = pl.Trainer(max_steps=4, logger=False, enable_checkpointing=False)
    trainer.fit(NVAELightning(NVAE(config)), DataLoader(list(images), batch_size=16))  # type: ignore[arg-type]
    print("train/loss", float(trainer.callback_metrics.get("train/loss", math.nan)))
