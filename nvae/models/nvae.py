"""NVAE (Vahdat & Kautz 2020): read this file beside the paper's figure 2.

Bottom-up, the :class:`Encoder` turns the image into one feature map per latent group. Top-down,
:meth:`NVAE.top_down` walks through the groups from the coarsest to the finest; at each one the
state gives the prior, state and feature map together give the posterior, and a sample of one or
the other is merged into the state. Training and sampling share this walk: without feature maps it
draws from the priors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from nvae.likelihoods import PixelDistribution, build_likelihood, logit_channels
from nvae.models.cells import Cell
from nvae.models.config import ModelConfig
from nvae.models.encoder import Encoder
from nvae.models.families import CELL_FAMILIES
from nvae.models.latent_group import GroupSample, LatentGroup
from nvae.models.layers import WeightNormConv2d
from nvae.models.topology import is_vanilla, latent_scales, latent_shapes

Temperature = float | Sequence[float]


@dataclass
class NVAEOutput:
    """One pass of images through the model; B images, G groups, coarsest first.

    Densities are worked out when asked for, so a training step pays for no more than it uses.

    Attributes:
        logits: parameters of the likelihood, ``(B, K, H, W)``.
        groups: posterior, prior and sample of every group.
    """

    logits: Tensor
    groups: tuple[GroupSample, ...]

    @cached_property
    def kl_per_channel(self) -> tuple[Tensor, ...]:
        """KL of every latent channel, one ``(B, L)`` a group, in nats."""
        return tuple(group.kl.sum((2, 3)) for group in self.groups)

    @cached_property
    def kl_per_group(self) -> Tensor:
        """KL of every group, ``(B, G)``, in nats."""
        return torch.stack([kl.sum(1) for kl in self.kl_per_channel], dim=1)

    @cached_property
    def log_q(self) -> Tensor:
        """log q(z | x) of the latents drawn, ``(B,)``, in nats."""
        return torch.stack([group.log_q.sum((1, 2, 3)) for group in self.groups]).sum(0)

    @cached_property
    def log_p(self) -> Tensor:
        """log p(z) of the latents drawn, ``(B,)``, in nats."""
        return torch.stack([group.log_p.sum((1, 2, 3)) for group in self.groups]).sum(0)


class NVAE(nn.Module):
    """The whole network.

    Args:
        config: architecture and likelihood.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_shapes = latent_shapes(config)
        family = CELL_FAMILIES[config.cell_family]
        cell = partial(Cell, squeeze_excitation=config.squeeze_excitation)
        scales = latent_scales(config)
        vanilla = is_vanilla(config)

        self.encoder = Encoder(config)

        coarsest = scales[-1]
        width = coarsest.decoder_width
        # h in the paper's figure 2b: the learned constant the top-down walk starts from
        self.initial_state: Tensor
        if vanilla:
            unused = torch.zeros(width, coarsest.size, coarsest.size)
            self.register_buffer("initial_state", unused, persistent=False)
        else:
            self.initial_state = nn.Parameter(torch.rand(width, coarsest.size, coarsest.size))
        self.groups = nn.ModuleList()
        self.upsample = nn.ModuleList()
        self.upsample_before: set[int] = set()
        for scale in reversed(scales):
            if scale is not coarsest:
                self.upsample_before.add(len(self.groups))
                self.upsample.append(
                    cell(family.decoder, width, scale.decoder_width, upsample=True)
                )
                width = scale.decoder_width
            for _ in range(scale.groups):
                self.groups.append(
                    LatentGroup(config, scale, first=not len(self.groups), vanilla=vanilla)
                )

        self.postprocess = nn.Sequential()
        for _ in range(config.preprocess_blocks):
            self.postprocess.append(cell(family.postprocess, width, width // 2, upsample=True))
            width //= 2
            for _ in range(config.postprocess_cells - 1):
                self.postprocess.append(cell(family.postprocess, width, width))
        self.image_head = nn.Sequential(
            nn.ELU(), WeightNormConv2d(width, logit_channels(config), 3)
        )

    def forward(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> NVAEOutput:
        """Encode ``x`` and decode a posterior sample.

        Args:
            x: images in [0, 1], ``(B, C, H, W)``; bits and binarisation already applied.
            noise: standard normal draws, one a group, each ``(B, L, h, w)``, coarsest first;
                drawn here when absent.

        Raises:
            ValueError: if ``x`` or ``noise`` has the wrong shape, or ``x`` leaves [0, 1].
        """
        self.check_images(x)
        noise = self._noise(x.shape[0], noise)
        state, groups = self.top_down(noise, encoder_maps=self.encoder(x))
        return NVAEOutput(self.decode_state(state), groups)

    def top_down(
        self,
        noise: Sequence[Tensor],
        *,
        encoder_maps: Sequence[Tensor] | None = None,
        latents: Sequence[Tensor | None] | None = None,
        temperature: Temperature = 1.0,
    ) -> tuple[Tensor, tuple[GroupSample, ...]]:
        """Walk through the groups, coarsest first (figure 2b of the paper).

        Args:
            noise: standard normal draws, one a group, each ``(B, L, h, w)``.
            encoder_maps: the encoder's map for every group: z is drawn from the posteriors.
                None: from the priors.
            latents: z itself for some or all groups; None entries are drawn.
            temperature: factor on the priors' sigma, one number or one a group; only where z is
                drawn from a prior.

        Returns:
            The state after the finest group, ``(B, C, h, w)``, and what every group drew.
        """
        batch = noise[0].shape[0]
        temperatures = self.group_temperatures(temperature)
        state = self.initial_state.expand(batch, -1, -1, -1)
        samples: list[GroupSample] = []
        upsample = iter(self.upsample)
        for index, group in enumerate(self.groups):
            if index in self.upsample_before:
                state = next(upsample)(state)
            state, sample = group(
                state,
                encoder_map=None if encoder_maps is None else encoder_maps[index],
                noise=noise[index],
                z=None if latents is None else latents[index],
                temperature=temperatures[index],
            )
            samples.append(sample)
        return state, tuple(samples)

    def decode_state(self, state: Tensor) -> Tensor:
        """Final top-down state to likelihood parameters ``(B, K, H, W)``."""
        return self.image_head(self.postprocess(state))

    def likelihood(self, logits: Tensor) -> PixelDistribution:
        """The distribution of images that ``logits`` ``(B, K, H, W)`` stand for."""
        return build_likelihood(self.config, logits)

    @torch.no_grad()
    def sample_logits(
        self, n: int, temperature: Temperature = 1.0, noise: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Logits of ``n`` draws from the prior, ``(n, K, H, W)``.

        Args:
            n: number of images.
            temperature: factor on every prior's sigma, >= 0; one number or one a group.
            noise: as in :meth:`forward`.
        """
        state, _ = self.top_down(self._noise(n, noise), temperature=temperature)
        return self.decode_state(state)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        *,
        pixel_temperature: float = 1.0,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``n`` images in [0, 1], ``(n, C, H, W)``.

        Args:
            n: number of images.
            temperature: of the latents, as in :meth:`sample_logits`.
            pixel_temperature: of the likelihood, >= 0; 0 takes its mode.
            noise: latent noise, as in :meth:`forward`.
            generator: source of the pixels' randomness, and of the latents' unless ``noise`` is
                given.
        """
        if noise is None:
            noise = self.draw_noise(n, generator)
        logits = self.sample_logits(n, temperature, noise)
        return self.likelihood(logits).sample(pixel_temperature, generator)

    def noise_shapes(self, n: int) -> list[tuple[int, int, int, int]]:
        """Shape ``(n, L, h, w)`` of every group's noise, coarsest first."""
        return [(n, *shape) for shape in self.latent_shapes]

    def draw_noise(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Standard normal noise for ``n`` images, one tensor a group, coarsest first."""
        like = self.initial_state
        return [
            torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
            for shape in self.noise_shapes(n)
        ]

    def _noise(self, n: int, noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if noise is None:
            return self.draw_noise(n)
        shapes = self.noise_shapes(n)
        if len(noise) != len(shapes):
            raise ValueError(f"noise for {len(noise)} groups, the model has {len(shapes)}")
        for group, (eps, shape) in enumerate(zip(noise, shapes, strict=True)):
            if tuple(eps.shape) != shape:
                raise ValueError(
                    f"noise of group {group} has shape {tuple(eps.shape)}, the model takes {shape}"
                )
        return noise

    def group_temperatures(self, temperature: Temperature) -> list[float]:
        """One temperature a group, coarsest first.

        Raises:
            ValueError: not one or one a group, below 0, or not finite.
        """
        groups = len(self.groups)
        temperatures = (
            [temperature] * groups if isinstance(temperature, int | float) else list(temperature)
        )
        if len(temperatures) != groups:
            raise ValueError(f"{len(temperatures)} temperatures for {groups} latent groups")
        for each in temperatures:
            if not 0 <= each < math.inf:
                raise ValueError(f"temperature is {each}; it must be a finite number, 0 or more")
        return temperatures

    def check_images(self, x: Tensor) -> None:
        """Raise a ValueError unless ``x`` is ``(B, C, H, W)`` of the model's C, H and W, in [0, 1].

        While training, the range is left to :meth:`check_range`: to look at it would make every
        step wait for the device.
        """
        side, channels = self.config.image_size, self.config.image_channels
        if x.ndim != 4 or tuple(x.shape[1:]) != (channels, side, side):
            raise ValueError(
                f"images have shape {tuple(x.shape)}, the model takes (B, {channels}, {side}, "
                f"{side})"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"images are {x.dtype}, the model takes floating-point numbers in [0, 1]"
            )
        is_traced = torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta
        if not (self.training or is_traced):
            self.check_range(x)

    def check_range(self, x: Tensor) -> None:
        """Raise a ValueError unless all of ``x`` is in [0, 1]; waits for the device.

        While training, numbers that are not finite pass: they make a bad step, and those are left
        out.
        """
        if not x.numel():
            return
        low, high = (float(bound) for bound in x.detach().aminmax())
        if self.training and not (math.isfinite(low) and math.isfinite(high)):
            return
        if not (low >= 0 and high <= 1):  # a NaN fails both
            raise ValueError(
                f"images lie between {low:g} and {high:g}, the model takes numbers in [0, 1]"
            )
