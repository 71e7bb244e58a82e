"""Efficient-VDVAE (Hazami et al. 2022): read this file beside the paper's figure 2.

The network is a list of levels, each with a stride. Bottom-up, a level ends in a skip, which all
stochastic layers of the level across from it read, and in pooling; top-down, the first layer of a
level enlarges the state. Settings have the names of the authors' files, one list entry a level.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.models.conditioning import ClassEmbedding
from nvae.models.evdvae_config import EVDVAEConfig
from nvae.models.layers import without_autocast
from nvae.models.pixel_distribution import DATA_BITS, logit_channels
from nvae.models.stable_mixture import gray_level, log_softplus
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
from nvae.settings import height_width

SLOPE = 0.1
"""Of the leaky ReLU after pooling and before enlarging."""


class Level(nn.Module):
    """One level of the way up: blocks of residual cells, a skip, pooling.

    Attributes:
        blocks: of residual cells; the last of them is followed by the skip.
        pool: None where the level has stride 1.
    """

    def __init__(self, config: EVDVAEConfig, level: int, width: int) -> None:
        super().__init__()
        c = config
        self.blocks = nn.Sequential(
            *(
                _residual_cells(config, "up_", level, width)
                for _ in range(1 + c.up_n_blocks_per_res[level])
            )
        )
        self.skip = same_conv(width, c.up_skip_filters[level])
        stride = c.up_strides[level]
        self.pool: nn.Conv2d | None = None
        if stride > 1:
            self.pool = nn.Conv2d(width, c.up_filters[level], stride, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, C, h, w)`` to the next level's input and the skip."""
        x = self.blocks(x)
        skip = self.skip(x)
        return x if self.pool is None else F.leaky_relu(self.pool(x), SLOPE), skip


class Encoder(nn.Module):
    """The way up: one skip a level."""

    def __init__(self, config: EVDVAEConfig) -> None:
        super().__init__()
        width = config.input_conv_filters
        self.stem = same_conv(config.image_channels, width, config.input_kernel_size)
        self.levels = nn.ModuleList()
        for level in range(config.levels):
            self.levels.append(Level(config, level, width))
            width = config.up_filters[level]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image in network units ``(B, C, H, W)`` to the skips, coarsest first."""
        x = self.stem(x)
        skips = []
        for level in self.levels:
            x, skip = level(x)
            skips.append(skip)
        return skips[::-1]


class Unpool(nn.Module):
    """1x1 convolution, nearest-neighbor enlargement, and a learned map that is added."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.stride = stride
        self.scale_bias = nn.Parameter(torch.zeros(1, out_channels, *size))
        self.conv = same_conv(in_channels, out_channels)

    def forward(self, state: Tensor) -> Tensor:
        """``(B, C, h, w)`` to ``(B, C', *size)``."""
        state = F.leaky_relu(self.conv(state), SLOPE)
        with without_autocast(state):
            return F.interpolate(state, scale_factor=self.stride, mode="nearest") + self.scale_bias


class Layer(TopDownLayer):
    """Cells and 1x1 heads of prior and posterior, and residual cells."""

    def __init__(self, config: EVDVAEConfig, level: int) -> None:
        super().__init__()
        c = config
        width, skip = c.down_filters[level], c.up_skip_filters[-1 - level]
        ratio, latent = c.down_mid_filters_ratio[level], c.down_latent_variates[level]
        self.is_std, self.beta = c.distribution_base == "std", c.gradient_smoothing_beta
        self.residual_distribution = c.use_residual_distribution
        both = width + skip
        self.cells = _residual_cells(config, "down_", level, width)
        middle = int(both * (ratio * 0.5))
        self.posterior = _cell(config, "down_", level, both, middle, int(both * 0.5))
        self.prior = _cell(config, "down_", level, width, int(width * ratio), 2 * width)
        self.prior_head = same_conv(width, 2 * latent)
        self.posterior_head = same_conv(width, 2 * latent)
        self.merge_latent = same_conv(latent, width)

    def read_prior(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        residual, features = self.prior(state).chunk(2, dim=1)
        mean, raw = raw_parameters(self.prior_head(features))
        return mean, self._log_sigma(raw), residual

    def read_posterior(
        self, state: Tensor, encoder_map: Tensor, prior: LogSigmaNormal
    ) -> tuple[Tensor, Tensor]:
        """See the base class; relative to the prior where the settings say so."""
        features = self.posterior(torch.cat([state, encoder_map], dim=1))
        mean, raw = raw_parameters(self.posterior_head(features))
        log_sigma = self._log_sigma(raw)
        if self.residual_distribution:
            return prior.mean + mean, prior.log_sigma + log_sigma
        return mean, log_sigma

    def _log_sigma(self, raw: Tensor) -> Tensor:
        return log_softplus(raw, self.beta) if self.is_std else self.beta * raw

    def without_posterior(self) -> None:
        """See the base class."""
        del self.posterior, self.posterior_head


class EVDVAE(VeryDeepVAE):
    """The whole network.

    Args:
        config: architecture and likelihood.
    """

    config_class = EVDVAEConfig
    config: EVDVAEConfig
    encoder: Encoder

    def __init__(self, config: EVDVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        height, breadth = height_width(config.image_size)
        factor = math.prod(config.down_strides)
        size = height // factor, breadth // factor
        width = config.down_filters[0]
        self.initial_state = nn.Parameter(torch.zeros(1, width, *size))
        self.groups = nn.ModuleList()
        # by the level's number, for those that enlarge the state
        self.unpool = nn.ModuleDict()
        self.level_of: list[int] = []
        shapes = []
        for level, layers in enumerate(config.layers_per_level):
            own, stride = config.down_filters[level], config.down_strides[level]
            size = size[0] * stride, size[1] * stride
            if stride > 1:
                self.unpool[str(level)] = Unpool(width, own, stride, size)
            width = own
            for _ in range(layers):
                self.groups.append(Layer(config, level))
                self.level_of.append(level)
                shapes.append((config.down_latent_variates[level], *size))
        self.latent_shapes = tuple(shapes)
        if config.num_classes:
            widths = [config.down_filters[level] for level in self.level_of]
            self.classes = ClassEmbedding(config.num_classes, widths)
        self.image_head = same_conv(width, logit_channels(config), config.output_kernel_size)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Xavier, but for the first convolution of every cell; what adds up starts small."""
        cells = [module for module in self.modules() if isinstance(module, Bottleneck)]
        first = {id(cell.convs[0]) for cell in cells}
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and id(module) not in first:
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        shrink = math.sqrt(1 / len(self.groups))
        if self.config.stable_init:
            for cell in cells:
                if cell.residual:
                    conv_weight(cell.convs[-1]).mul_(shrink)
        for layer in self.groups:
            assert isinstance(layer, Layer)
            layer.merge_latent.weight.mul_(shrink)
            if self.config.initialize_prior_weights_as_zero:
                conv_weight(layer.prior.convs[-1]).zero_()
        bound = math.sqrt(3 / self.initial_state.numel())
        nn.init.uniform_(self.initial_state, -bound, bound)

    @classmethod
    def least_tensors(cls, config: EVDVAEConfig) -> int:
        """Weights and biases of every cell's two outer convolutions."""
        return 4 * config.cells

    def encode(self, x: Tensor) -> list[Tensor]:
        """Image ``(B, C, H, W)`` in [0, 1] to one map a group; see the base class.

        The network reads what the likelihood counts: black and white pixels as 0 and 1, others in
        [-1, 1] with the model's bits.
        """
        skips = self.encoder(self._network_input(x))
        return [skips[level] for level in self.level_of]

    def _network_input(self, x: Tensor) -> Tensor:
        config = self.config
        if config.likelihood == "bernoulli":
            return x
        pixels = 255 * x
        if config.bits < DATA_BITS:
            pixels = gray_level(x, config.bits) * 2 ** (DATA_BITS - config.bits)
        return (pixels - 127.5) / 127.5

    def arrive(self, index: int, states: States, like: Tensor) -> Tensor:
        """The last layer's state, enlarged where a level with a stride begins."""
        level = self.level_of[index]
        if index == 0:
            state = self.initial_state.expand(like.shape[0], -1, -1, -1)
        else:
            state = states[resolution_of(self.latent_shapes[index - 1])]
            if level == self.level_of[index - 1]:
                return state
        key = str(level)
        return self.unpool[key](state) if key in self.unpool else state

    def layer_temperatures(self, per_level: Sequence[float]) -> list[float]:
        """One temperature a layer from one a level, coarsest first.

        Raises:
            ValueError: not as many as levels.
        """
        if len(per_level) != self.config.levels:
            raise ValueError(
                f"{len(per_level)} temperatures for {self.config.levels} levels; give one a level, "
                "coarsest first"
            )
        return [per_level[level] for level in self.level_of]


def _residual_cells(config: EVDVAEConfig, way: str, level: int, width: int) -> nn.Sequential:
    middle = int(width * getattr(config, f"{way}mid_filters_ratio")[level])
    count = getattr(config, f"{way}n_blocks")[level]
    return nn.Sequential(
        *(_cell(config, way, level, width, middle, width, residual=True) for _ in range(count))
    )


def _cell(
    config: EVDVAEConfig, way: str, level: int, inside: int, middle: int, out: int, **more: bool
) -> Bottleneck:
    kernel: int = getattr(config, f"{way}kernel_size")[level]
    depth: int = getattr(config, f"{way}n_layers")[level]
    outer = 1 if config.use_1x1_conv else kernel
    return Bottleneck(inside, middle, out, kernel, F.silu, depth=depth, outer_kernel=outer, **more)
