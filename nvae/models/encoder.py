"""The bottom-up network: from an image to one feature map per latent group."""

from functools import partial

from torch import Tensor, nn

from nvae.models.cells import Cell
from nvae.models.config import ModelConfig
from nvae.models.families import CELL_FAMILIES
from nvae.models.layers import WeightNormConv2d
from nvae.models.topology import is_vanilla, latent_scales


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
