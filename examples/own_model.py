"""A hierarchical VAE of one's own: two latent groups, plain convolutions.

config = LadderConfig(image_size=16)
model = Ladder(config)
save_model(model, "ladder.ckpt")
load_model("ladder.ckpt", plugins=["own_model:Ladder"])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvae.models import HierarchicalVAE, ImageConfig, Temperature
from nvae.models.distributions import Normal
from nvae.models.output import GroupSample
from nvae.models.pixel_distribution import logit_channels
from nvae.settings import Bounds


@dataclass(frozen=True)
class LadderConfig(ImageConfig):
    """Width of all features, and channels of a group's latent."""

    width: int = 16
    latent_channels: int = 4

    @classmethod
    def bounds(cls) -> dict[str, Bounds]:
        """Least and greatest value of the numbers."""
        return super().bounds() | {"width": (1, 1024), "latent_channels": (1, 1024)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_divides(4, "cannot be halved twice")


class Ladder(HierarchicalVAE):
    """A latent at a quarter of the resolution, and one at half of it."""

    config_class = LadderConfig
    config: LadderConfig

    def __init__(self, config: LadderConfig) -> None:
        super().__init__()
        self.config = config
        latent, width = config.latent_channels, config.width
        _, h, w = config.image_shape
        self.latent_shapes = ((latent, h // 4, w // 4), (latent, h // 2, w // 2))
        self.down = nn.ModuleList(
            [nn.Conv2d(config.image_channels, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)]
        )
        self.posteriors = nn.ModuleList(nn.Conv2d(2 * width, 2 * latent, 1) for _ in range(2))
        self.priors = nn.ModuleList(nn.Conv2d(width, 2 * latent, 1) for _ in range(2))
        self.merge = nn.ModuleList(nn.Conv2d(width + latent, width, 3, 1, 1) for _ in range(2))
        self.head = nn.Conv2d(width, logit_channels(config), 3, 1, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        """One map a group, coarsest first."""
        fine = torch.relu(self.down[0](x))
        return [torch.relu(self.down[1](fine)), fine]

    def top_down(
        self,
        noise: Sequence[Tensor],
        *,
        encoder_maps: Sequence[Tensor] | None = None,
        latents: Sequence[Tensor | None] | None = None,
        temperature: Temperature = 1.0,
    ) -> tuple[Tensor, tuple[GroupSample, ...]]:
        """From the coarse group to the fine one; see the base class."""
        _, height, width = self.latent_shapes[0]
        state = noise[0].new_zeros(len(noise[0]), self.config.width, height, width)
        samples, given = [], self.group_latents(latents)
        for group, factor in enumerate(self.group_temperatures(temperature)):
            if group > 0:
                state = nn.functional.interpolate(state, scale_factor=2)
            mean, log_sigma = self.priors[group](state).chunk(2, 1)
            prior = Normal.from_parameters(mean, log_sigma, factor)
            z = given[group]
            if z is not None:
                sample = GroupSample(z, prior)
            elif encoder_maps is None:
                sample = GroupSample(prior.sample(noise[group]), prior)
            else:
                features = torch.cat([state, encoder_maps[group]], 1)
                mean, log_sigma = self.posteriors[group](features).chunk(2, 1)
                posterior = Normal.from_parameters(mean, log_sigma)
                drawn = posterior.sample(noise[group])
                sample = GroupSample(drawn, prior, posterior, drawn)
            state = torch.relu(self.merge[group](torch.cat([state, sample.z.to(state)], 1)))
            samples.append(sample)
        return state, tuple(samples)

    def decode_state(self, state: Tensor) -> Tensor:
        """To likelihood parameters ``(B, K, H, W)``."""
        return self.head(nn.functional.interpolate(state, scale_factor=2))
