"""What a network is, as plain numbers, and the skeleton of scales and groups that they imply."""

from dataclasses import dataclass
from typing import Any, Self

from nvae.models.cells import CELL_FAMILIES, MobileConvSpec
from nvae.models.pixel_distribution import ImageConfig
from nvae.settings import Bounds, height_width

MOST_CELLS = 20_000


@dataclass(frozen=True)
class ModelConfig(ImageConfig):
    """Architecture and likelihood of an :class:`~nvae.models.nvae.NVAE`.

    The images' settings are those of :class:`ImageConfig`. Scale 0 is the finest latent scale;
    widths double at every halving of the resolution.

    Attributes:
        num_scales: number of latent scales, S.
        groups_per_scale: latent groups of the finest scale.
        adaptive_groups: halve the number of groups at every coarser scale.
        min_groups_per_scale: floor of that halving.
        latent_channels: channels of each group's z, L.
        encoder_channels: width of the bottom-up network at full resolution.
        decoder_channels: width of the top-down network at full resolution.
        preprocess_blocks: halvings of the resolution before scale 0; as many doublings after it.
        preprocess_cells: cells of each block on the way in.
        postprocess_cells: cells of each block on the way out.
        encoder_cells_per_group: residual cells before each group's encoder map.
        decoder_cells_per_group: residual cells before each group's prior.
        cell_family: which residual cells stand where; a key of ``CELL_FAMILIES``.
        squeeze_excitation: end every cell's branch in squeeze-and-excitation.
        residual_distributions: the posterior is an offset to the prior (section 3.2 of the paper).
        num_flows: pairs of autoregressive shifts after each posterior sample.

    Raises:
        ValueError: one line that says which combination is impossible and what is allowed.
    """

    num_scales: int = 2
    groups_per_scale: int = 10
    adaptive_groups: bool = True
    min_groups_per_scale: int = 1
    latent_channels: int = 20
    encoder_channels: int = 32
    decoder_channels: int = 32
    preprocess_blocks: int = 2
    preprocess_cells: int = 3
    postprocess_cells: int = 3
    encoder_cells_per_group: int = 2
    decoder_cells_per_group: int = 2
    cell_family: str = "res_mbconv"
    squeeze_excitation: bool = True
    residual_distributions: bool = True
    num_flows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        halvings = self.preprocess_blocks + self.num_scales - 1
        self.check_divides(
            2**halvings,
            f"cannot be halved {halvings} times (preprocess_blocks={self.preprocess_blocks}, "
            f"num_scales={self.num_scales})",
        )
        cells = self.encoder_cells_per_group + self.decoder_cells_per_group
        if self.num_scales * self.groups_per_scale * cells > MOST_CELLS:
            raise ValueError(
                f"model.groups_per_scale={self.groups_per_scale} with num_scales={self.num_scales} "
                f"and {cells} cells a group makes more than {MOST_CELLS} residual cells"
            )
        self._check_grouped_convolutions()

    def _check_grouped_convolutions(self) -> None:
        family = CELL_FAMILIES[self.cell_family]
        for ops, name in (
            (family.encoder + family.preprocess, "encoder_channels"),
            (family.decoder + family.postprocess, "decoder_channels"),
        ):
            for op in ops:
                if not isinstance(op, MobileConvSpec) or not op.groups:
                    continue
                if getattr(self, name) * op.expansion % op.groups:
                    raise ValueError(
                        f"model.cell_family={self.cell_family} splits {op.expansion} x {name} "
                        f"channels into {op.groups} groups; {name}={getattr(self, name)} does not "
                        f"divide, use a multiple of {op.groups}"
                    )

    @classmethod
    def bounds(cls) -> dict[str, Bounds]:
        """Least and greatest value of the numbers."""
        return super().bounds() | {
            "num_scales": (1, 12), "groups_per_scale": (1, 1000), "min_groups_per_scale": (1, 1000),
            "latent_channels": (1, 1024), "encoder_channels": (1, 4096),
            "decoder_channels": (1, 4096), "preprocess_blocks": (0, 12),
            "preprocess_cells": (1, 100), "postprocess_cells": (1, 100),
            "encoder_cells_per_group": (1, 100), "decoder_cells_per_group": (1, 100),
            "num_flows": (0, 100),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """See the base class."""
        if "cell_family" in values:
            CELL_FAMILIES.check_known(values["cell_family"])
        return super().from_dict(values)


@dataclass(frozen=True)
class Scale:
    """One latent scale.

    Attributes:
        groups: number of latent groups at this scale.
        size: height and width of its feature maps in pixels.
        encoder_width: channels of the bottom-up features here.
        decoder_width: channels of the top-down state here.
    """

    groups: int
    size: tuple[int, int]
    encoder_width: int
    decoder_width: int


def groups_per_scale(config: ModelConfig) -> tuple[int, ...]:
    """Latent groups of each scale, finest first (paper, table 6: ``20, 10, 5`` for CelebA-64)."""
    counts = [config.groups_per_scale]
    for _ in range(config.num_scales - 1):
        previous = counts[-1]
        halved = max(config.min_groups_per_scale, previous // 2)
        counts.append(halved if config.adaptive_groups else previous)
    return tuple(counts)


def latent_scales(config: ModelConfig) -> tuple[Scale, ...]:
    """All latent scales, finest first."""
    scales = []
    height, width = height_width(config.image_size)
    for index, groups in enumerate(groups_per_scale(config)):
        factor = 2 ** (config.preprocess_blocks + index)
        scales.append(
            Scale(
                groups=groups,
                size=(height // factor, width // factor),
                encoder_width=config.encoder_channels * factor,
                decoder_width=config.decoder_channels * factor,
            )
        )
    return tuple(scales)


def latent_shapes(config: ModelConfig) -> tuple[tuple[int, int, int], ...]:
    """Shape ``(L, h, w)`` of every group's z, coarsest first."""
    return tuple(
        (config.latent_channels, *scale.size)
        for scale in reversed(latent_scales(config))
        for _ in range(scale.groups)
    )


def is_vanilla(config: ModelConfig) -> bool:
    """A single latent group: an ordinary VAE, without towers."""
    return config.num_scales == 1 and config.groups_per_scale == 1
