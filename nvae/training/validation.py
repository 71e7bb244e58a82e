"""Validation metrics, pooled over images and ranks: sums travel, not means."""

import torch
from pytorch_lightning.strategies import Strategy
from torch import Tensor

from nvae.elbo import bits_per_dim
from nvae.evaluation.result import ACTIVE_UNIT_NATS
from nvae.models import HierarchicalVAE, Output
from nvae.random import STREAM_POSTERIOR, image_keys, latent_noise


def group_metrics(prefix: str, values: list[float]) -> dict[str, float]:
    """One entry for every latent group, coarsest first."""
    return {f"{prefix}/{group:02d}": value for group, value in enumerate(values)}


class ValidationSums:
    """Sums over images of the ELBO's parts; every image counts once, whatever the batches.

    Args:
        model: whose images they are.
        seed: of the noise, fixed, so that epochs differ by their weights alone.
    """

    def __init__(self, model: HierarchicalVAE, seed: int = 0) -> None:
        self._groups, self._latent = model.num_groups, model.latent_channels
        self._pixels = model.config.counted_pixels
        self.seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._head: Tensor | None = None  # images, reconstruction, KL
        self._channels: Tensor | None = None  # (G, L) KL

    def noise(self, model: HierarchicalVAE, index: Tensor) -> list[Tensor]:
        """Posterior noise of the images ``index`` ``(B,)``, one tensor a group."""
        keys = image_keys(index, seed=self.seed, stream=STREAM_POSTERIOR)
        return latent_noise(keys, model.latent_shapes, model.dtype)

    def add(self, output: Output, log_likelihood: Tensor) -> None:
        """Count a batch; ``log_likelihood`` ``(B,)`` in nats."""
        channels = torch.stack([kl.double().sum(0) for kl in output.kl_by_channel.unbind(1)])
        head = torch.stack(
            [
                torch.full_like(channels[0, 0], len(log_likelihood)),
                -log_likelihood.double().sum(),
                channels.sum(),
            ]
        )
        self._head = head if self._head is None else self._head + head
        self._channels = channels if self._channels is None else self._channels + channels

    def means(self, strategy: Strategy, stage: str = "valid") -> dict[str, float]:
        """Metrics over all ranks' images, named after the stage; a rank may have seen none."""
        groups, latent = self._groups, self._latent
        if self._head is None or self._channels is None:
            sums = torch.zeros(
                3 + groups * latent, dtype=torch.float64, device=strategy.root_device
            )
        else:
            sums = torch.cat([self._head, self._channels.flatten()])
        total = strategy.reduce(sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        mean = (total / total[0]).cpu()
        reconstruction, kl = mean[1:3].tolist()
        channels = mean[3:].view(groups, latent)
        return {
            f"{stage}/negative_elbo": reconstruction + kl,
            f"{stage}/bits_per_dim": bits_per_dim(reconstruction + kl, self._pixels),
            f"{stage}/reconstruction": reconstruction,
            f"{stage}/kl": kl,
            **group_metrics(f"{stage}_kl_group", channels.sum(1).tolist()),
            **group_metrics(f"{stage}_active_units", (channels > ACTIVE_UNIT_NATS).sum(1).tolist()),
        }
