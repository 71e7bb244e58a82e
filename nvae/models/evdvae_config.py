"""What an Efficient-VDVAE is: lists with one entry a level, named as in its authors' files."""

import math
from dataclasses import dataclass, field

from nvae.models.stable_mixture import LogisticForm
from nvae.models.very_deep import MOST_LAYERS, VeryDeepConfig
from nvae.settings import Bounds, check_choice

BASES = ("std", "logstd")


@dataclass(frozen=True)
class EVDVAEConfig(VeryDeepConfig):
    """Architecture and likelihood of an :class:`~nvae.models.evdvae.EVDVAE`.

    Lists hold one entry a level: `up_...` from the image to the coarsest level, `down_...` back.

    Attributes:
        input_conv_filters: channels that the image becomes.
        input_kernel_size: side of that convolution.
        output_kernel_size: side of the last one.
        up_strides: what a level divides the resolution by, at its end.
        up_n_blocks_per_res: blocks of a level before the one with the skip.
        up_n_blocks: residual cells of each block.
        up_n_layers: k x k convolutions of each cell.
        up_filters: channels after the level.
        up_mid_filters_ratio: channels inside a cell, as a share of its width.
        up_kernel_size: k.
        up_skip_filters: channels of the skip; those of the state that reads it.
        down_strides: what a level multiplies the resolution by, at its beginning.
        down_n_blocks_per_res: stochastic layers of a level beside the first one.
        down_n_blocks: residual cells of each layer.
        down_n_layers: as `up_n_layers`.
        down_filters: channels of the level's state.
        down_mid_filters_ratio: as `up_mid_filters_ratio`.
        down_kernel_size: as `up_kernel_size`.
        down_latent_variates: channels of each layer's z.
        use_1x1_conv: a cell's first and last convolutions are 1x1; else k x k.
        stable_init: last convolutions of residual cells start smaller, the more layers there are.
        initialize_prior_weights_as_zero: so do those of the priors' cells, at 0.
        distribution_base: sigma is softplus(beta raw) / beta (``std``) or exp(beta raw)
            (``logstd``).
        gradient_smoothing_beta: that beta.
        use_residual_distribution: the posterior is relative to the prior.
        output_distribution_base: the same for the scales of the logistic mixture.
        output_gradient_smoothing_beta: their beta.
        min_mol_logscale: floor of their logarithm.

    Raises:
        ValueError: one line that says what cannot work and what could.
    """

    image_channels: int = 3
    input_conv_filters: int = 32
    input_kernel_size: int = 1
    output_kernel_size: int = 1
    up_strides: list[int] = field(default_factory=lambda: [2, 4, 4, 1])
    up_n_blocks_per_res: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    up_n_blocks: list[int] = field(default_factory=lambda: [1, 1, 1, 1])
    up_n_layers: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    up_filters: list[int] = field(default_factory=lambda: [64, 64, 64, 64])
    up_mid_filters_ratio: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5, 0.5])
    up_kernel_size: list[int] = field(default_factory=lambda: [3, 3, 3, 1])
    up_skip_filters: list[int] = field(default_factory=lambda: [32, 64, 64, 64])
    down_strides: list[int] = field(default_factory=lambda: [1, 4, 4, 2])
    down_n_blocks_per_res: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    down_n_blocks: list[int] = field(default_factory=lambda: [1, 1, 1, 1])
    down_n_layers: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    down_filters: list[int] = field(default_factory=lambda: [64, 64, 64, 32])
    down_mid_filters_ratio: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5, 0.5])
    down_kernel_size: list[int] = field(default_factory=lambda: [1, 3, 3, 3])
    down_latent_variates: list[int] = field(default_factory=lambda: [16, 16, 16, 16])
    use_1x1_conv: bool = True
    stable_init: bool = True
    initialize_prior_weights_as_zero: bool = False
    distribution_base: str = "std"
    gradient_smoothing_beta: float = 0.6931472
    use_residual_distribution: bool = False
    output_distribution_base: str = "std"
    output_gradient_smoothing_beta: float = 0.6931472
    min_mol_logscale: float = -250.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model.distribution_base", self.distribution_base, BASES)
        check_choice("model.output_distribution_base", self.output_distribution_base, BASES)
        self._check_lists("up_")
        self._check_lists("down_")
        if list(self.down_strides) != list(self.up_strides)[::-1]:
            raise ValueError(
                f"model.down_strides={list(self.down_strides)} must be model.up_strides in reverse,"
                f" {list(self.up_strides)[::-1]}"
            )
        factor = math.prod(self.up_strides)
        self.check_divides(
            factor, f"cannot be divided by the product of model.up_strides, {factor}"
        )
        for name in ("input_kernel_size", "output_kernel_size"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be odd")
        if self.cells > MOST_LAYERS:
            raise ValueError(f"the lists of model make {self.cells} cells, above {MOST_LAYERS}")
        self._check_widths()

    def _check_lists(self, way: str) -> None:
        names = [name for name in self.bounds() if name.startswith(way)]
        levels = len(self.up_strides)
        if not levels:
            raise ValueError("model.up_strides is empty; it has one entry a level")
        for name in names:
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"model.{name} has {len(getattr(self, name))} entries, model.up_strides "
                    f"{levels}; every list has one a level"
                )
        even = [k for k in getattr(self, f"{way}kernel_size") if k % 2 == 0]
        if even:
            raise ValueError(f"model.{way}kernel_size holds {even[0]}; all must be odd")

    def _check_widths(self) -> None:
        width = self.input_conv_filters
        for level, (stride, after) in enumerate(zip(self.up_strides, self.up_filters, strict=True)):
            self._check_middle("up_mid_filters_ratio", level, width)
            if stride == 1 and after != width:
                raise ValueError(
                    f"model.up_filters[{level}]={after} but the level has stride 1, which leaves "
                    f"the {width} channels as they are"
                )
            width = after
        width = self.down_filters[0]
        for level, own in enumerate(self.down_filters):
            self._check_middle("down_mid_filters_ratio", level, own)
            if self.down_strides[level] == 1 and own != width:
                raise ValueError(
                    f"model.down_filters[{level}]={own} but the level has stride 1, which leaves "
                    f"the {width} channels as they are"
                )
            skip = self.up_skip_filters[-1 - level]
            if (own + skip) // 2 != own:
                raise ValueError(
                    f"model.up_skip_filters[{len(self.up_filters) - 1 - level}]={skip} but "
                    f"model.down_filters[{level}]={own}; a skip is as wide as the state beside it"
                )
            width = own

    def _check_middle(self, name: str, level: int, width: int) -> None:
        ratio = getattr(self, name)[level]
        if int(width * ratio) < 1:
            raise ValueError(f"model.{name}[{level}]={ratio} leaves no channel of {width}")

    @classmethod
    def bounds(cls) -> dict[str, Bounds]:
        """Least and greatest value of the numbers."""
        stride, count, filters, ratio, kernel = (1, 4096), (0, 1000), (1, 65536), (0, 16), (1, 31)
        return super().bounds() | {
            "input_conv_filters": filters, "input_kernel_size": kernel,
            "output_kernel_size": kernel,
            "up_strides": stride, "up_n_blocks_per_res": count, "up_n_blocks": count,
            "up_n_layers": count, "up_filters": filters, "up_mid_filters_ratio": ratio,
            "up_kernel_size": kernel, "up_skip_filters": filters,
            "down_strides": stride, "down_n_blocks_per_res": count, "down_n_blocks": count,
            "down_n_layers": count, "down_filters": filters, "down_mid_filters_ratio": ratio,
            "down_kernel_size": kernel, "down_latent_variates": (1, 1024),
            "gradient_smoothing_beta": (1e-3, 1e3), "output_gradient_smoothing_beta": (1e-3, 1e3),
            "min_mol_logscale": (-1e3, 10),
        }  # fmt: skip

    @property
    def logistics(self) -> LogisticForm:
        """Scales as the settings say."""
        return LogisticForm(
            softplus=self.output_distribution_base == "std",
            beta=self.output_gradient_smoothing_beta,
            min_log_scale=self.min_mol_logscale,
            published=not self.normalized,
        )

    @property
    def levels(self) -> int:
        """Levels of either way."""
        return len(self.up_strides)

    @property
    def layers_per_level(self) -> list[int]:
        """Stochastic layers of every level, coarsest first."""
        return [1 + more for more in self.down_n_blocks_per_res]

    @property
    def cells(self) -> int:
        """Residual cells of both ways, and a prior and a posterior for every layer."""
        up = zip(self.up_n_blocks_per_res, self.up_n_blocks, strict=False)
        down = zip(self.layers_per_level, self.down_n_blocks, strict=False)
        return sum((1 + more) * n for more, n in up) + sum(k * (2 + n) for k, n in down)
