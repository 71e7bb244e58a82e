"""Cell families: which operations stand in the encoder, the decoder and around them.

Names and contents are the published ones (appendix A of the paper; `mconv_e6k5g0` there is
``MobileConvSpec(expansion=6, kernel_size=5)`` here).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ActConvSpec:
    """[BN], activation, 3x3 convolution.

    Attributes:
        activation: ``swish`` or ``elu``.
        batchnorm: normalise before the activation; without it the convolution is
            initialised from its first batch.
        dilation: 2 gives the 5x5 receptive field of the published ``res_bnswish5``.
    """

    activation: str = "swish"
    batchnorm: bool = True
    dilation: int = 1


@dataclass(frozen=True)
class MobileConvSpec:
    """Inverted bottleneck: 1x1 expansion, depthwise KxK, 1x1 projection (paper, figure 3a).

    Attributes:
        expansion: hidden channels per input channel, E.
        kernel_size: K.
        groups: groups of the middle convolution; 0 makes it depthwise.
    """

    expansion: int
    kernel_size: int = 5
    groups: int = 0


OpSpec = ActConvSpec | MobileConvSpec


@dataclass(frozen=True)
class CellFamily:
    """The operations of one cell's branch, for each place in the network."""

    encoder: tuple[OpSpec, ...]
    decoder: tuple[OpSpec, ...]
    preprocess: tuple[OpSpec, ...]
    postprocess: tuple[OpSpec, ...]


_SWISH, _DILATED = ActConvSpec(), ActConvSpec(dilation=2)
_BN_ELU = ActConvSpec(activation="elu")
_ELU = ActConvSpec(activation="elu", batchnorm=False)
_E3, _E6 = MobileConvSpec(3), MobileConvSpec(6)
_E3_GROUPED = MobileConvSpec(3, groups=8)
_E6_K11 = MobileConvSpec(6, kernel_size=11)


def _everywhere(op: OpSpec) -> CellFamily:
    return CellFamily((op, op), (op, op), (op, op), (op, op))


def _residual_encoder(first: OpSpec, second: OpSpec) -> CellFamily:
    return CellFamily((first, second), (_E6,), (first, second), (_E3,))


CELL_FAMILIES: dict[str, CellFamily] = {
    "res_mbconv": _residual_encoder(_SWISH, _SWISH),
    "res53_mbconv": _residual_encoder(_DILATED, _SWISH),
    "res35_mbconv": _residual_encoder(_SWISH, _DILATED),
    "res55_mbconv": _residual_encoder(_DILATED, _DILATED),
    "mbconv_sep": CellFamily((_E6,), (_E6,), (_E3,), (_E3,)),
    "mbconv_sep11": CellFamily((_E6_K11,), (_E6_K11,), (_E3,), (_E3,)),
    "mbconv_den": CellFamily((_E6,), (_E6,), (_E3_GROUPED,), (_E3_GROUPED,)),
    "mbconv_res": CellFamily((_E6,), (_SWISH, _SWISH), (_E3,), (_SWISH, _SWISH)),
    "res_bnswish": _everywhere(_SWISH),
    "res_bnelu": _everywhere(_BN_ELU),
    "res_elu": _everywhere(_ELU),
}
