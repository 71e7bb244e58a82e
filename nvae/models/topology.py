"""Groups per scale, widths and sizes: the skeleton that a :class:`ModelConfig` implies."""

from dataclasses import dataclass

from nvae.models.config import ModelConfig


@dataclass(frozen=True)
class Scale:
    """One latent scale.

    Attributes:
        groups: number of latent groups at this scale.
        size: side of its feature maps in pixels.
        encoder_width: channels of the bottom-up features here.
        decoder_width: channels of the top-down state here.
    """

    groups: int
    size: int
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
    for index, groups in enumerate(groups_per_scale(config)):
        factor = 2 ** (config.preprocess_blocks + index)
        scales.append(
            Scale(
                groups=groups,
                size=config.image_size // factor,
                encoder_width=config.encoder_channels * factor,
                decoder_width=config.decoder_channels * factor,
            )
        )
    return tuple(scales)


def latent_shapes(config: ModelConfig) -> tuple[tuple[int, int, int], ...]:
    """Shape ``(L, h, w)`` of every group's z, coarsest first."""
    return tuple(
        (config.latent_channels, scale.size, scale.size)
        for scale in reversed(latent_scales(config))
        for _ in range(scale.groups)
    )


def is_vanilla(config: ModelConfig) -> bool:
    """A single latent group: an ordinary VAE, without towers."""
    return config.num_scales == 1 and config.groups_per_scale == 1


def num_cells(config: ModelConfig) -> int:
    """Residual cells of the network, those that change the resolution between scales left out."""
    groups = sum(groups_per_scale(config))
    around = config.preprocess_blocks * (config.preprocess_cells + config.postprocess_cells)
    return around + groups * (config.encoder_cells_per_group + config.decoder_cells_per_group)


def check_size(config: ModelConfig, tensors: int) -> None:
    """Refuse a network that is too large for its weights before any of it is made.

    Raises:
        ValueError: more residual cells than there are tensors; each has several.
    """
    cells = num_cells(config)
    if cells > tensors:
        raise ValueError(
            f"its configuration has {cells} residual cells, but it has {tensors} weights"
        )
