"""VDVAE (Child 2021): read this file beside the paper's figure 3.

Bottom-up, the encoder remembers its last activation of every resolution. Top-down, a table holds a
state of every resolution; a block takes its own resolution's, may add a coarser one to it, and
puts the result back.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.models.conditioning import ClassEmbedding
from nvae.models.layers import without_autocast
from nvae.models.pixel_distribution import logit_channels
from nvae.models.vdvae_config import VDVAEConfig
from nvae.models.very_deep import (
    Bottleneck,
    LogSigmaNormal,
    States,
    TopDownLayer,
    VeryDeepVAE,
    conv_weight,
    raw_parameters,
    resolution_of,
    same_conv,
)


def _bottleneck(config: VDVAEConfig, size: int, inside: int, out: int, **more: bool) -> Bottleneck:
    kernel = 3 if max(config.size_at(size)) > 2 else 1
    return Bottleneck(inside, config.middle_at(size), out, kernel, F.gelu, **more)


class Encoder(nn.Module):
    """Residual blocks, some of which end in average pooling."""

    def __init__(self, config: VDVAEConfig) -> None:
        super().__init__()
        self.plan = config.encoder_plan
        self.read_at = [block.resolution for block in config.decoder_plan]
        sizes = {block.resolution // (block.factor or 1) for block in self.plan}
        self.widths = {size: config.width_at(size) for size in sizes}
        self.stem = same_conv(config.image_channels, config.width, 3)
        self.blocks = nn.ModuleList()
        for size, _ in self.plan:
            width = config.width_at(size)
            self.blocks.append(_bottleneck(config, size, width, width, residual=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image in network units ``(B, C, H, W)`` to one map a decoder block, in its order."""
        features = self.stem(x)
        last = {resolution_of(features.shape): features}
        for (size, factor), block in zip(self.plan, self.blocks, strict=True):
            features = block(features)
            if factor is not None:
                size //= factor
                features = F.avg_pool2d(features, factor)
            missing = self.widths[size] - features.shape[1]
            if missing:
                features = F.pad(features, (0, 0, 0, 0, 0, missing))
            last[size] = features
        return [last[size] for size in self.read_at]


class DecoderBlock(TopDownLayer):
    """Prior, posterior and residual block, each a bottleneck."""

    cells: Bottleneck

    def __init__(self, config: VDVAEConfig, size: int) -> None:
        super().__init__()
        width, latent = config.width_at(size), config.latent_channels
        self.latent_channels = latent
        self.posterior = _bottleneck(config, size, 2 * width, 2 * latent)
        self.prior = _bottleneck(config, size, width, 2 * latent + width)
        self.merge_latent = same_conv(latent, width)
        self.cells = _bottleneck(config, size, width, width, residual=True)

    def read_prior(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        latent = self.latent_channels
        parameters, residual = self.prior(state).tensor_split((2 * latent,), dim=1)
        return *raw_parameters(parameters), residual

    def read_posterior(
        self, state: Tensor, encoder_map: Tensor, prior: LogSigmaNormal
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        return raw_parameters(self.posterior(torch.cat([state, encoder_map], dim=1)))

    def without_posterior(self) -> None:
        """See the base class."""
        del self.posterior


class VDVAE(VeryDeepVAE):
    """The whole network.

    Args:
        config: architecture and likelihood.
    """

    config_class = VDVAEConfig
    config: VDVAEConfig
    encoder: Encoder

    def __init__(self, config: VDVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.plan = config.decoder_plan
        used = [block.resolution for block in self.plan]
        self.latent_shapes = tuple((config.latent_channels, *config.size_at(r)) for r in used)
        self.state_shapes = {r: (config.width_at(r), *config.size_at(r)) for r in used}
        self.encoder = Encoder(config)
        self.groups = nn.ModuleList(DecoderBlock(config, r) for r in used)
        # the learned states that the table starts with, ascending
        self.learned_at = config.learned_states
        self.initial_states = nn.ParameterList(
            torch.zeros(1, *self.state_shapes[r]) for r in self.learned_at
        )
        if config.num_classes:
            widths = [self.state_shapes[r][0] for r in used]
            self.classes = ClassEmbedding(config.num_classes, widths)
        self.gain = nn.Parameter(torch.ones(1, config.width, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, config.width, 1, 1))
        self.image_head = same_conv(config.width, logit_channels(config))
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Every block's last convolution small, so that depth does not blow the state up."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                module.bias.zero_()
        for block in self.encoder.blocks:
            assert isinstance(block, Bottleneck)
            conv_weight(block.convs[-1]).mul_(math.sqrt(1 / len(self.encoder.blocks)))
        for layer in self.groups:
            assert isinstance(layer, DecoderBlock)
            shrink = math.sqrt(1 / len(self.groups))
            layer.merge_latent.weight.mul_(shrink)
            conv_weight(layer.cells.convs[-1]).mul_(shrink)
            conv_weight(layer.prior.convs[-1]).zero_()

    @classmethod
    def least_tensors(cls, config: VDVAEConfig) -> int:
        """Weights and biases of every block."""
        return 8 * len(config.encoder_plan) + 26 * len(config.decoder_plan)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Image ``(B, C, H, W)`` in [0, 1] to one map a group; see the base class."""
        maps: list[Tensor] = self.encoder(
            (255 * x - self.config.pixel_mean) / self.config.pixel_std
        )
        return maps

    def arrive(self, index: int, states: States, like: Tensor) -> Tensor:
        """The resolution's state, a coarser one added where the block mixes one in."""
        size, source = self.plan[index]
        state = self._state(size, states, like)
        if source is None:
            return state
        mixed = self._state(source, states, like)[:, : state.shape[1]]
        with without_autocast(mixed):
            return state + F.interpolate(mixed, scale_factor=size // source, mode="nearest")

    def _state(self, size: int, states: States, like: Tensor) -> Tensor:
        if size in states:
            return states[size]
        batch = like.shape[0]
        if size in self.learned_at:
            return self.initial_states[self.learned_at.index(size)].expand(batch, -1, -1, -1)
        return like.new_zeros(batch, *self.state_shapes[size], dtype=self.gain.dtype)

    def decode_state(self, state: Tensor) -> Tensor:
        """Final top-down state to likelihood parameters ``(B, K, H, W)``, float32 at least."""
        return super().decode_state(self.gain * state + self.bias)
