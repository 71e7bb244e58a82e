"""A hierarchical VAE that is none of ours: what a stranger would write, as small as it can be.

Two groups of different widths and resolutions, no encoder attribute, no ``groups``, and no batch
normalization unless it is asked for (then torch's own).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.models import ImageConfig
from nvae.models.distributions import Normal
from nvae.models.hierarchical import HierarchicalVAE
from nvae.models.output import GroupSample

NAME = "tests.outside:TwoGroups"


@dataclass(frozen=True)
class TwoGroupsConfig(ImageConfig):
    width: int = 6
    with_norms: bool = False
    image_size: int = 8
    bits: int = 1


class TwoGroups(HierarchicalVAE):
    config_class = TwoGroupsConfig
    config: TwoGroupsConfig

    def __init__(self, config: TwoGroupsConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_shapes = ((3, 2, 2), (2, 4, 4))
        width = config.width
        self.bottom_up = nn.Conv2d(1, width, 4, stride=2, padding=1)
        self.priors = nn.ModuleList(nn.Conv2d(width, 2 * c, 1) for c in (3, 2))
        self.posteriors = nn.ModuleList(nn.Conv2d(2 * width, 2 * c, 1) for c in (3, 2))
        self.merge = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width + c, width, 3, padding=1),
                nn.BatchNorm2d(width) if config.with_norms else nn.Identity(),
                nn.Tanh(),
            )
            for c in (3, 2)
        )
        self.head = nn.Conv2d(width, 1, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        fine = torch.tanh(self.bottom_up(2 * x - 1))
        return [F.avg_pool2d(fine, 2), fine]

    def top_down(self, noise, *, encoder_maps=None, latents=None, temperature=1.0):
        state = noise[0].new_zeros(noise[0].shape[0], self.config.width, 2, 2)
        samples = []
        for group, t in enumerate(self.group_temperatures(temperature)):
            if group:
                state = F.interpolate(state, scale_factor=2)
            prior = Normal(*_parameters(self.priors[group](state)))
            posterior = None
            if encoder_maps is not None:
                both = torch.cat([state, encoder_maps[group]], dim=1)
                posterior = Normal(*_parameters(self.posteriors[group](both)))
            z = None if latents is None else latents[group]
            if z is None:
                z = (posterior or Normal(prior.mean, t * prior.sigma)).sample(noise[group])
            samples.append(GroupSample(z, prior, posterior, z))
            state = self.merge[group](torch.cat([state, z], dim=1))
        return state, tuple(samples)

    def decode_state(self, state: Tensor) -> Tensor:
        return self.head(F.interpolate(state, scale_factor=2))


def _parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, raw = x.chunk(2, dim=1)
    return mean, F.softplus(raw) + 0.1


def two_groups(**changes: Any) -> TwoGroups:
    torch.manual_seed(0)
    model = TwoGroups(TwoGroupsConfig(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that latents matter
    return model.eval()
