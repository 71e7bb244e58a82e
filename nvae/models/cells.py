"""Residual cells: skip(x) + 0.1 * branch(x), the branch ending in squeeze-and-excitation.

Figure 3 of the paper: the generative cell (a) is a mobile convolution, the encoder's cell (b)
two BN-Swish-convolutions. A cell family says which operations stand in the encoder, the decoder
and around them; names and contents are the published ones (appendix A; `mconv_e6k5g0` there is
``MobileConvSpec(expansion=6, kernel_size=5)`` here). A family of one's own is a
:class:`CellFamily` in :data:`CELL_FAMILIES`, or ``package.module:NAME`` in the configuration.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvae.models.folding import Derived, fixed_conv
from nvae.models.layers import (
    DataInitConv2d,
    FactorizedSkip,
    PlainConv2d,
    SqueezeExcitation,
    UpsampleNearest,
    UpsampleSkip,
    WeightNormConv2d,
    upsample_nearest,
)
from nvae.models.normalization import EPS, BatchNorm
from nvae.ops import (
    BatchMoments,
    BnSwishDepthwise,
    bn_swish,
    bn_swish_depthwise,
    depthwise_conv2d,
)
from nvae.ops.library import will_take
from nvae.settings import Registry

RESIDUAL_SCALE = 0.1


class OpSpec(Protocol):
    """One operation of a cell's branch, before its channels are known."""

    def build(self, in_channels: int, out_channels: int, stride: int, upsample: bool) -> nn.Module:
        """The operation, ``(B, C_in, H, W)`` to ``(B, C_out, H', W')``.

        Args:
            in_channels: C_in.
            out_channels: C_out.
            stride: 2 halves the resolution, 1 keeps it.
            upsample: double the resolution.
        """
        ...


@dataclass(frozen=True)
class ActConvSpec:
    """[BN], activation, 3x3 convolution.

    Attributes:
        activation: ``swish`` or ``elu``.
        batchnorm: normalize before the activation; without it the convolution is
            initialized from its first batch.
        dilation: 2 gives the 5x5 receptive field of the published ``res_bnswish5``.
    """

    activation: str = "swish"
    batchnorm: bool = True
    dilation: int = 1

    def build(self, in_channels: int, out_channels: int, stride: int, upsample: bool) -> nn.Module:
        """See :class:`OpSpec`."""
        return ActConv(self, in_channels, out_channels, stride, upsample)


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

    def build(self, in_channels: int, out_channels: int, stride: int, upsample: bool) -> nn.Module:
        """See :class:`OpSpec`."""
        return MobileConv(self, in_channels, out_channels, stride, upsample)


@dataclass(frozen=True)
class CellFamily:
    """The operations of one cell's branch, in order, for each place in the network."""

    encoder: tuple[OpSpec, ...]
    decoder: tuple[OpSpec, ...]
    preprocess: tuple[OpSpec, ...]
    postprocess: tuple[OpSpec, ...]


class ActConv(nn.Module):
    """[BN], activation, [nearest x2], 3x3 convolution."""

    def __init__(
        self, spec: ActConvSpec, in_channels: int, out_channels: int, stride: int, upsample: bool
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.norm = BatchNorm(in_channels, spec.activation) if spec.batchnorm else nn.ELU()
        conv = WeightNormConv2d if spec.batchnorm else DataInitConv2d
        self.conv = conv(in_channels, out_channels, 3, stride=stride, dilation=spec.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` to ``(B, C_out, H', W')``."""
        x = self.norm(x)
        return self.conv(upsample_nearest(x) if self.upsample else x)


class MobileConv(nn.Module):
    """[nearest x2], BN, 1x1 expansion, BN+Swish, depthwise KxK, BN+Swish, 1x1 projection, BN.

    Upsampling commutes with everything before the depthwise convolution; done there, the
    expansion costs a quarter.
    """

    def __init__(
        self, spec: MobileConvSpec, in_channels: int, out_channels: int, stride: int, upsample: bool
    ) -> None:
        super().__init__()
        hidden = round(spec.expansion * in_channels)
        self.upsample = upsample
        self.depthwise = not spec.groups
        repeats = 4 if upsample else 1
        self.norm_in = BatchNorm(in_channels, repeats=repeats)
        self.expand = PlainConv2d(in_channels, hidden, 1)
        self.norm_expand = BatchNorm(hidden, "swish", repeats=repeats)
        self.spatial = PlainConv2d(
            hidden, hidden, spec.kernel_size, stride=stride, groups=spec.groups or hidden
        )
        self.norm_spatial = BatchNorm(hidden, "swish")
        self.project = PlainConv2d(hidden, out_channels, 1)
        self.norm_out = BatchNorm(out_channels)
        self._folded = Derived[nn.Module]()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` to ``(B, C_out, H', W')``."""
        if self._folded.usable(self.training):
            return self._folded.get(self._folds_from(), self.folded)(x)
        x = self.expand(self.norm_in(x))
        if self.depthwise and not self.upsample:
            x, moments = self._normalized_depthwise(x)
        else:
            x = self.norm_expand(x)
            x, moments = self.spatial(upsample_nearest(x) if self.upsample else x), None
        return self.norm_out(self.project(self.norm_spatial(x, moments)))

    def _folds_from(self) -> list[Tensor]:
        # named one by one: a walk through the modules takes as long as a convolution of one image
        norms = self.norm_in, self.norm_expand, self.norm_spatial, self.norm_out
        return [
            self.expand.weight, self.spatial.weight, self.project.weight,
            *(t for n in norms for t in (n.weight, n.bias, n.running_mean, n.running_var)),
        ]  # fmt: skip

    def _normalized_depthwise(self, x: Tensor) -> BnSwishDepthwise:
        """BN+Swish and the depthwise convolution in one op; the next BN's moments come with it."""
        norm, conv = self.norm_expand, self.spatial
        done = bn_swish_depthwise(
            x, norm.weight, norm.bias, conv.weight, conv.stride[0], moments=norm.running(),
            tracked=norm.tracked(), tracked_next=self.norm_spatial.tracked(), eps=EPS,
            group=norm.group, impl=norm.kernels,
        )  # fmt: skip
        norm.count()
        return done

    def folded(self) -> nn.Module:
        """The same without the normalizations, which the weights take over."""
        expand = _fold_around(self.norm_in, self.expand, self.norm_expand)
        spatial = _fold_after(self.spatial, self.norm_spatial)
        project = _fold_after(self.project, self.norm_out)
        if self.depthwise and will_take(self.spatial.kernels, spatial.weight):
            return _FoldedChain(expand, spatial, project, self.upsample)
        layers = [expand, nn.SiLU(inplace=True), spatial, nn.SiLU(inplace=True), project]
        if self.upsample:
            layers.insert(2, UpsampleNearest())
        return nn.Sequential(*layers)


class _FoldedChain(nn.Module):
    """A folded :class:`MobileConv` for the kernels: 1x1, Swish, depthwise, Swish, 1x1.

    The biases of the first two convolutions are added while the next kernel loads, together with
    Swish, which saves a pass over the tensor for each of the four.
    """

    one: Tensor
    moments: Tensor

    def __init__(
        self, expand: nn.Conv2d, spatial: nn.Conv2d, project: nn.Conv2d, upsample: bool
    ) -> None:
        super().__init__()
        self.expand, self.spatial, self.project = expand, spatial, project
        self.upsample = UpsampleNearest() if upsample else None
        # what is left of a normalization is its shift, the convolution's bias
        one = torch.ones_like(spatial.weight[:, 0, 0, 0])
        self.register_buffer("one", one)
        self.register_buffer("moments", torch.stack([torch.zeros_like(one), one, one]).double())

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` to ``(B, C_out, H', W')``."""
        expand_bias, bias = self.expand.bias, self.spatial.bias
        weight, stride = self.spatial.weight, self.spatial.stride[0]
        assert expand_bias is not None
        assert bias is not None
        fixed = BatchMoments(self.moments)
        x = F.conv2d(x, self.expand.weight)
        if self.upsample is None:
            x = bn_swish_depthwise(
                x, self.one, expand_bias, weight, stride, moments=fixed, eps=0.0
            ).output
        else:
            x = bn_swish(x, self.one, expand_bias, moments=fixed, eps=0.0)
            x = depthwise_conv2d(self.upsample(x), weight, stride)
        y: Tensor = self.project(bn_swish(x, self.one, bias, moments=fixed, eps=0.0))
        return y


def _fold_after(conv: nn.Conv2d, after: BatchNorm) -> nn.Conv2d:
    """A convolution without bias followed by ``after``, as one convolution."""
    scale, shift = after.affine()
    return fixed_conv(
        conv.weight * scale.view(-1, 1, 1, 1), shift, stride=conv.stride[0],
        padding=int(conv.padding[0]), dilation=conv.dilation[0], groups=conv.groups,
    )  # fmt: skip


def _fold_around(before: BatchNorm, conv: nn.Conv2d, after: BatchNorm) -> nn.Conv2d:
    """``before``, a 1x1 convolution, ``after``; 1x1, since padding would see the shift."""
    in_scale, in_shift = before.affine()
    scale, shift = after.affine()
    weight = conv.weight * in_scale.view(1, -1, 1, 1) * scale.view(-1, 1, 1, 1)
    return fixed_conv(weight, scale * (conv.weight.flatten(1) @ in_shift) + shift)


class Cell(nn.Module):
    """One residual cell.

    Args:
        ops: the branch's operations, in order; stride and upsampling go to the first.
        in_channels: channels of the input.
        out_channels: channels of the output.
        downsample: halve the resolution.
        upsample: double the resolution.
        squeeze_excitation: end the branch in channel attention.
    """

    def __init__(
        self,
        ops: tuple[OpSpec, ...],
        in_channels: int,
        out_channels: int,
        *,
        downsample: bool = False,
        upsample: bool = False,
        squeeze_excitation: bool = True,
    ) -> None:
        super().__init__()
        self.skip: nn.Module = nn.Identity()
        if downsample:
            self.skip = FactorizedSkip(in_channels, out_channels)
        elif upsample:
            self.skip = UpsampleSkip(in_channels, out_channels)
        branch: list[nn.Module] = []
        for index, spec in enumerate(ops):
            first = index == 0
            channels = in_channels if first else out_channels
            stride = 2 if downsample and first else 1
            branch.append(spec.build(channels, out_channels, stride, upsample and first))
        self.branch = nn.Sequential(*branch)
        self.attention = SqueezeExcitation(out_channels) if squeeze_excitation else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` to ``(B, C_out, H', W')``."""
        y = self.branch(x)
        if self.attention is None:
            return self.skip(x) + RESIDUAL_SCALE * y
        return _add_scaled(self.skip(x), y, RESIDUAL_SCALE * self.attention.gate(y))


def _add_scaled(skip: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """skip + y * scale, all ``(B, C, H, W)`` but the scale, ``(B, C, 1, 1)``."""
    if torch.is_grad_enabled() and skip.dtype == y.dtype == scale.dtype:
        out: Tensor = _AddScaled.apply(skip, y, scale)
        return out
    return torch.addcmul(skip, y, scale)


class _AddScaled(torch.autograd.Function):
    """Torch's own backward pass multiplies both factors by 1 first, y in a pass of its own."""

    @staticmethod
    def forward(ctx: Any, skip: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(y, scale)
        return torch.addcmul(skip, y, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, scale = ctx.saved_tensors
        return grad, grad * scale, (grad * y).sum((2, 3), keepdim=True)


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


CELL_FAMILIES: Registry[CellFamily] = Registry(
    "model.cell_family",
    CellFamily,
    {
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
    },
)
