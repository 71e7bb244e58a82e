"""NVAE (Vahdat & Kautz 2020): read this file beside the paper's figure 2.

Bottom-up, the :class:`Encoder` turns the image into one feature map per latent group. Top-down,
:meth:`NVAE.top_down` walks through the groups from the coarsest to the finest; at each one the
state gives the prior, state and feature map together give the posterior, and a sample of one or
the other is merged into the state. Training and sampling share this walk: without feature maps it
draws from the priors.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from nvae.models.cells import CELL_FAMILIES, Cell
from nvae.models.conditioning import ClassEmbedding, Condition
from nvae.models.config import (
    ModelConfig,
    groups_per_scale,
    is_vanilla,
    latent_scales,
    latent_shapes,
)
from nvae.models.hierarchical import Choose, HierarchicalVAE, Temperature
from nvae.models.latent_group import LatentGroup
from nvae.models.layers import WeightNormConv2d, as_callers_expect, without_autocast
from nvae.models.normalization import BatchNorm, counted_together
from nvae.models.output import GroupSample
from nvae.models.pixel_distribution import logit_channels
from nvae.models.together import weights_together


class Encoder(nn.Module):
    """Stem, pre-processing blocks, and a tower that remembers a map before every group."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        family = CELL_FAMILIES[config.cell_family]
        cell = partial(Cell, squeeze_excitation=config.squeeze_excitation)
        width = config.encoder_channels
        self.stem = WeightNormConv2d(config.image_channels, width, 3)

        self.preprocess = nn.Sequential()
        for _ in range(config.preprocess_blocks):
            for _ in range(config.preprocess_cells - 1):
                self.preprocess.append(cell(family.preprocess, width, width))
            self.preprocess.append(cell(family.preprocess, width, 2 * width, downsample=True))
            width *= 2

        cells_per_group = 0 if is_vanilla(config) else config.encoder_cells_per_group
        self.groups = nn.ModuleList()
        self.downsample = nn.ModuleList()
        self.downsample_before: set[int] = set()
        for index, scale in enumerate(latent_scales(config)):
            if index > 0:
                self.downsample_before.add(len(self.groups))
                self.downsample.append(
                    cell(family.encoder, width, scale.encoder_width, downsample=True)
                )
                width = scale.encoder_width
            for _ in range(scale.groups):
                cells = (cell(family.encoder, width, width) for _ in range(cells_per_group))
                self.groups.append(nn.Sequential(*cells))
        # enc0 of the paper's code: the top, seen by the coarsest group alone
        self.top = nn.Sequential(nn.ELU(), WeightNormConv2d(width, width, 1), nn.ELU())

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image ``(B, C, H, W)`` in [0, 1] to one map per group, coarsest first."""
        features = self.preprocess(self.stem(2 * x - 1))
        maps: list[Tensor] = []
        downsample = iter(self.downsample)
        for index, cells in enumerate(self.groups):
            if index in self.downsample_before:
                features = next(downsample)(features)
            features = cells(features)
            maps.append(features)
        maps[-1] = self.top(features)
        return maps[::-1]


class NVAE(HierarchicalVAE):
    """The whole network.

    Args:
        config: architecture and likelihood.
    """

    config_class = ModelConfig
    config: ModelConfig

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
            unused = torch.zeros(width, *coarsest.size)
            self.register_buffer("initial_state", unused, persistent=False)
        else:
            self.initial_state = nn.Parameter(torch.rand(width, *coarsest.size))
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

        if config.num_classes:
            widths = [
                scale.decoder_width for scale in reversed(scales) for _ in range(scale.groups)
            ]
            self.classes = ClassEmbedding(config.num_classes, widths)

        self.postprocess = nn.Sequential()
        for _ in range(config.preprocess_blocks):
            self.postprocess.append(cell(family.postprocess, width, width // 2, upsample=True))
            width //= 2
            for _ in range(config.postprocess_cells - 1):
                self.postprocess.append(cell(family.postprocess, width, width))
        self.image_head = nn.Sequential(
            nn.ELU(), WeightNormConv2d(width, logit_channels(config), 3, full_precision=True)
        )

    def encode(self, x: Tensor) -> list[Tensor]:
        """Image ``(B, C, H, W)`` in [0, 1] to one map per group, coarsest first."""
        maps: list[Tensor] = self.encoder(x)
        return maps

    def top_down(
        self,
        noise: Sequence[Tensor],
        *,
        encoder_maps: Sequence[Tensor] | None = None,
        latents: Sequence[Tensor | None] | None = None,
        temperature: Temperature = 1.0,
        condition: Condition | None = None,
        choose: Choose | None = None,
    ) -> tuple[Tensor, tuple[GroupSample, ...]]:
        """Walk through the groups (figure 2b of the paper); see the base class."""
        batch = noise[0].shape[0]
        temperatures = self.group_temperatures(temperature)
        given = self.group_latents(latents)
        state = self.initial_state.expand(batch, -1, -1, -1)
        samples: list[GroupSample] = []
        upsample = iter(self.upsample)
        for index, group in enumerate(self.groups):
            if index in self.upsample_before:
                state = next(upsample)(state)
            state, guidance = self.conditioned(state, index, condition)
            state, sample = group(
                state,
                encoder_map=None if encoder_maps is None else encoder_maps[index],
                noise=noise[index],
                z=given[index],
                temperature=temperatures[index],
                guidance=guidance,
                choose=None if choose is None else partial(choose, index),
            )
            samples.append(sample)
        return state, tuple(samples)

    def decode_state(self, state: Tensor) -> Tensor:
        """Final top-down state to likelihood parameters ``(B, K, H, W)``, float32 at least."""
        features = self.postprocess(state)
        with without_autocast(features):
            features = features.to(next(self.image_head.parameters()).dtype)
            return as_callers_expect(self.image_head(features))

    @classmethod
    def least_tensors(cls, config: ModelConfig) -> int:
        """One for every residual cell, those that change the resolution between scales left out."""
        groups = sum(groups_per_scale(config))
        around = config.preprocess_blocks * (config.preprocess_cells + config.postprocess_cells)
        return around + groups * (config.encoder_cells_per_group + config.decoder_cells_per_group)

    def blocks(self) -> list[nn.Module]:
        """The latent groups with all that is in them, and the residual cells around them."""
        inside = {id(module) for group in self.groups for module in group.modules()}
        cells = [module for module in self.modules() if isinstance(module, Cell)]
        return [*self.groups, *(cell for cell in cells if id(cell) not in inside)]

    @contextmanager
    def training_pass(self) -> Iterator[AbstractContextManager[None]]:
        """What the weights alone decide is done for many layers at once, norms' batches counted so.

        See :func:`~nvae.models.together.weights_together`.
        """
        modules = list(self.modules())
        norms = [m for m in modules if isinstance(m, BatchNorm)]
        with weights_together(modules) as for_regularizers, counted_together(norms):
            yield for_regularizers

    def without_encoder(self) -> Self:
        """A copy in evaluation mode that can only sample: encoder and posteriors are gone."""
        half = super().without_encoder()
        del half.encoder
        for group in half.groups:
            assert isinstance(group, LatentGroup)
            group.merge_encoder = group.flow = None
            del group.posterior
        return half
