"""Residual cells of one's own: a family, and an operation that the package does not have.

PYTHONPATH=examples python train.py model.cell_family=own_cells:SEPARABLE
"""

from dataclasses import dataclass

from torch import nn

from nvae.models.cells import ActConvSpec, CellFamily, MobileConvSpec
from nvae.models.layers import PlainConv2d, WeightNormConv2d
from nvae.models.normalization import BatchNorm


@dataclass(frozen=True)
class SeparableSpec:
    """BN, Swish, depthwise convolution, 1x1 convolution; K is the depthwise kernel's size."""

    kernel_size: int = 5

    def build(self, in_channels: int, out_channels: int, stride: int, upsample: bool) -> nn.Module:
        """See :class:`nvae.models.cells.OpSpec`."""
        return nn.Sequential(
            BatchNorm(in_channels, "swish"),
            nn.Upsample(scale_factor=2) if upsample else nn.Identity(),
            PlainConv2d(in_channels, in_channels, self.kernel_size, stride=stride,
                        groups=in_channels),
            WeightNormConv2d(in_channels, out_channels, 1),
        )  # fmt: skip


SEPARABLE = CellFamily(
    encoder=(SeparableSpec(), ActConvSpec()),
    decoder=(MobileConvSpec(expansion=4, kernel_size=7),),
    preprocess=(SeparableSpec(),),
    postprocess=(SeparableSpec(7),),
)
