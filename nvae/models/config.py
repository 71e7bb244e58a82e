"""What a network is, as plain numbers: the one thing a checkpoint needs to rebuild it."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from nvae.models.families import CELL_FAMILIES, MobileConvSpec
from nvae.settings import Bounds, check_choice, check_fields

LIKELIHOODS = ("bernoulli", "logistic_mixture", "normal")

_BOUNDS: dict[str, Bounds] = {
    "image_size": (1, 4096),
    "image_channels": (1, 1024),
    "counted_size": (1, 4096),
    "bits": (1, 8),
    "num_mixtures": (1, 1000),
    "num_scales": (1, 12),
    "groups_per_scale": (1, 1000),
    "min_groups_per_scale": (1, 1000),
    "latent_channels": (1, 1024),
    "encoder_channels": (1, 4096),
    "decoder_channels": (1, 4096),
    "preprocess_blocks": (0, 12),
    "preprocess_cells": (1, 100),
    "postprocess_cells": (1, 100),
    "encoder_cells_per_group": (1, 100),
    "decoder_cells_per_group": (1, 100),
    "num_flows": (0, 100),
}
"""Far beyond any network in use: what lies outside is a slip or an attack."""

MOST_CELLS = 20_000


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and likelihood of an :class:`~nvae.models.nvae.NVAE`.

    Scale 0 is the finest latent scale; widths double at every halving of the resolution.

    Attributes:
        image_size: side of the square input in pixels (after padding).
        image_channels: 1 for grey, 3 for colour.
        counted_size: side of the central window that the likelihood counts; None: the whole image.
            MNIST padded from 28 to 32 counts 28.
        bits: bits of a pixel value, 1 to 8; the discretised likelihood has ``2**bits`` bins.
        likelihood: ``bernoulli`` | ``logistic_mixture`` | ``normal``.
        num_mixtures: components of the logistic mixture.
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

    image_size: int = 32
    image_channels: int = 1
    counted_size: int | None = None
    bits: int = 8
    likelihood: str = "bernoulli"
    num_mixtures: int = 10
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
        check_fields(self, "model.", **_BOUNDS)
        check_choice("model.likelihood", self.likelihood, LIKELIHOODS)
        check_choice("model.cell_family", self.cell_family, CELL_FAMILIES)
        if self.likelihood == "logistic_mixture" and self.image_channels not in (1, 3):
            raise ValueError(
                f"model.likelihood=logistic_mixture models 1 or 3 image channels, not "
                f"{self.image_channels}; likelihood=normal takes any number"
            )
        halvings = self.preprocess_blocks + self.num_scales - 1
        if self.image_size % 2**halvings:
            raise ValueError(
                f"model.image_size={self.image_size} cannot be halved {halvings} times "
                f"(preprocess_blocks={self.preprocess_blocks}, num_scales={self.num_scales}); "
                f"it must be a multiple of {2**halvings}"
            )
        if self.counted_size is not None:
            border = self.image_size - self.counted_size
            if self.counted_size < 1 or border < 0 or border % 2:
                raise ValueError(
                    f"model.counted_size={self.counted_size} is no central window of "
                    f"image_size={self.image_size}; the difference must be even and not negative"
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

    @property
    def counted_pixels(self) -> int:
        """Dimensions that bits/dim divides by: C * H * W of the counted window."""
        side = self.image_size if self.counted_size is None else self.counted_size
        return self.image_channels * side * side

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for a checkpoint or JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Inverse of :meth:`to_dict`; an unknown key is a ValueError that names it."""
        unknown = sorted(map(str, set(values) - {f.name for f in fields(cls)}))
        if unknown:
            raise ValueError(f"unknown model setting(s): {', '.join(unknown)}")
        return cls(**values)
