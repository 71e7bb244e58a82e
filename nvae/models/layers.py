"""The bricks of a residual cell: normalized convolutions, skips, attention.

A convolution here knows the matrices that spectral regularization looks at
(:meth:`SpectralConv.spectral_matrices`), so that the regularizer needs no list of special cases.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.models.folding import Derived, evaluated_conv2d, fixed_conv
from nvae.ops import depthwise_conv2d
from nvae.ops.library import Impl
from nvae.ops.weight_norm import NORM_EPS, row_norm, weight_norm

NORM_INIT_EPS = 1e-2


def is_autocast_on(x: Tensor) -> bool:
    """Whether mixed precision chooses the types of what is computed with ``x``."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Mixed precision off for the device of ``x`` inside the block; operands keep their types.

    Where it is off already nothing is entered, so that an exported program has no context either.
    """
    return torch.autocast(x.device.type, enabled=False) if is_autocast_on(x) else nullcontext()


def as_callers_expect(x: Tensor) -> Tensor:
    """What leaves the network, ``(B, C, H, W)``, in rows where evaluation on the CPU turned it.

    See :func:`~nvae.models.folding.evaluated_conv2d`; whoever calls ``view`` may go on.
    """
    return x.contiguous() if x.device.type == "cpu" and not torch.is_grad_enabled() else x


def upsample_nearest(x: Tensor) -> Tensor:
    """Repeat every pixel of ``(B, C, H, W)`` in a 2x2 block, in x's own type.

    Autocast would make it float32 on a GPU, and with it all that follows up to a convolution.
    """
    with without_autocast(x):
        return F.interpolate(x, scale_factor=2, mode="nearest")


class UpsampleNearest(nn.Module):
    """:func:`upsample_nearest` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, 2H, 2W)``."""
        return upsample_nearest(x)


@dataclass(frozen=True)
class SpectralMatrix:
    """One matrix whose largest singular value is penalised.

    The matrix is ``diag(scale) @ weight`` with ``weight`` masked already.

    Attributes:
        weight: ``(out, in / groups * kh * kw)``, a differentiable view of the parameter.
        log_gain: ``(out,)``, g of the weight normalization, or None for a plain convolution.
    """

    weight: Tensor
    log_gain: Tensor | None


class SpectralConv(nn.Module):
    """Base of every convolution that spectral regularization counts.

    Attributes:
        kernels: see :meth:`~nvae.models.HierarchicalVAE.choose_kernels`.
    """

    weight: Tensor
    kernels: Impl = "auto"

    def spectral_matrices(self) -> list[SpectralMatrix]:
        """The matrices, one for each convolution of the published model."""
        return [SpectralMatrix(_as_matrix(self.weight), None)]


def _as_matrix(weight: Tensor) -> Tensor:
    """``(out, in, kh, kw)`` as ``(out, in * kh * kw)``, a view in either memory format.

    The order of the columns differs between the two; singular values do not depend on it.
    """
    if not weight.is_contiguous():
        weight = weight.permute(0, 2, 3, 1)
    return weight.flatten(1)


class PlainConv2d(nn.Conv2d, SpectralConv):
    """Convolution without weight normalization, "same" padding, no bias (mobile cells)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, 1, groups, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` to ``(B, C_out, H / stride, W / stride)``."""
        if self.groups == self.in_channels == self.out_channels > 1:
            return depthwise_conv2d(x, self.weight, self.stride[0], impl=self.kernels)
        return super().forward(x)


class WeightNormConv2d(SpectralConv):
    """Convolution with w_hat = exp(g) * w / (||w|| + 1e-5), the norm per output channel.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd; padding keeps the size.
        stride: 1 unless the convolution halves the resolution.
        dilation: spacing of the taps.
        groups: as in :class:`torch.nn.Conv2d`.
        bias: add a bias per output channel.
        mask: 0/1 tensor of the weight's shape, multiplied in before the norm is taken.
        log_gain_shift: added to the initial g, log(||w|| + 1e-2).
        full_precision: the convolution runs in its weight's type under mixed precision too; the
            caller turns autocast off around it.

    Attributes:
        ready: w_hat of the pass at hand, where :mod:`nvae.models.together` has made it.
    """

    mask: Tensor | None
    ready: Tensor | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        mask: Tensor | None = None,
        log_gain_shift: float = 0.0,
        full_precision: bool = False,
    ) -> None:
        super().__init__()
        self.full_precision = full_precision
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.padding = dilation * (kernel_size // 2)
        # torch's own initialization of weight and bias, which the published model keeps
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups, bias=bias)
        self.weight = conv.weight
        self.bias = conv.bias
        self.register_buffer("mask", mask, persistent=False)
        self._derived = Derived[Tensor]()
        with torch.no_grad():
            norm = row_norm(self._masked_weight())
            self.log_gain = nn.Parameter((norm + NORM_INIT_EPS).log() + log_gain_shift)

    def _masked_weight(self) -> Tensor:
        return self.weight if self.mask is None else self.weight * self.mask

    def normalized_weight(self) -> Tensor:
        """w_hat, of the weight's shape."""
        if self.ready is not None:
            return self.ready
        if self._derived.usable(self.training):
            return self._derived.get((self.weight, self.log_gain), self._normalize)
        return self._normalize()

    def _normalize(self) -> Tensor:
        return weight_norm(self._masked_weight(), self.log_gain)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` to ``(B, C_out, H / stride, W / stride)``."""
        weight = self.normalized_weight()
        if self.groups == len(weight) > 1 and self.bias is None:  # the flows' spatial step
            return depthwise_conv2d(x, weight, self.stride, impl=self.kernels)
        convolve = F.conv2d if self.training else evaluated_conv2d
        return convolve(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def folded(self) -> nn.Module:
        """A plain convolution with the normalized weight."""
        return fixed_conv(
            self._normalize(), self.bias, stride=self.stride, padding=self.padding,
            dilation=self.dilation, groups=self.groups, kernels=self.kernels,
        )  # fmt: skip

    def spectral_matrices(self) -> list[SpectralMatrix]:
        """The masked weight with its gain."""
        return [SpectralMatrix(_as_matrix(self._masked_weight()), self.log_gain)]


class DataInitConv2d(WeightNormConv2d):
    """Weight-normalized convolution whose first batch sets gain and bias.

    Without batch normalization in front, the output would start at an arbitrary scale: at the
    first training batch its mean is removed and its standard deviation set to 1/5, per channel
    (Salimans & Kingma 2016, section 3). All ranks use the same, averaged statistics.

    Attributes:
        initialized: saved with the weights.
        checked: whether ``initialized`` has been read from the device; nothing is initialized
            where it is true.
    """

    initialized: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("initialized", torch.tensor(False))
        self.checked = False

    def forward(self, x: Tensor) -> Tensor:
        """As the parent; the first call in training mode initializes."""
        # the flag is read from the device once, not at every step
        if self.training and not self.checked:
            self.checked = bool(self.initialized) or self._initialize(x)
        return super().forward(x)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> bool:
        """Whether it could: a batch that is not finite says nothing of the scale."""
        assert self.bias is not None
        gain, bias = self.log_gain.clone(), self.bias.clone()
        self.log_gain.zero_()
        self.bias.zero_()
        y = super().forward(x)
        mean, std = y.mean((0, 2, 3)), y.std((0, 2, 3))
        if dist.is_available() and dist.is_initialized():
            for statistic in (mean, std):
                dist.all_reduce(statistic, dist.ReduceOp.AVG if y.is_cuda else dist.ReduceOp.SUM)
                if not y.is_cuda:  # gloo has no average
                    statistic /= dist.get_world_size()
        if not torch.isfinite(mean + std).all():
            self.log_gain.copy_(gain)
            self.bias.copy_(bias)
            return False
        spread = 5 * std + NORM_EPS
        self.log_gain.copy_(-spread.log())
        self.bias.copy_(-mean / spread)
        self.initialized.fill_(True)
        return True


def skip_splits(out_channels: int) -> list[int]:
    """Output channels of the four convolutions of a :class:`FactorizedSkip`."""
    quarter = out_channels // 4
    return [quarter, quarter, quarter, out_channels - 3 * quarter]


class FactorizedSkip(WeightNormConv2d):
    """The stride-2 skip: Swish, then four 1x1 convolutions, each on another pixel of a 2x2 block.

    The four are one 2x2 convolution of stride 2 whose output channels see a single tap each: a
    quarter of them the pixel (0,0), then (1,1), (0,1), (1,0), the last taking the remainder. The
    norm is per output channel, so one weight and one gain hold all four.

    (A 1x1 convolution of stride 2 is also what crashes torch's CPU backward in channels_last.)
    """

    taps: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)
        self.splits = skip_splits(out_channels)
        taps = torch.zeros(out_channels, 1, 2, 2)
        for rows, (i, j) in zip(
            torch.arange(out_channels).split(self.splits),
            ((0, 0), (1, 1), (0, 1), (1, 0)),
            strict=True,
        ):
            taps[rows, 0, i, j] = 1.0
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` to ``(B, C_out, H / 2, W / 2)``."""
        return F.conv2d(F.silu(x), self.normalized_weight() * self.taps, self.bias, stride=2)

    def folded(self) -> nn.Module:
        """The same with the normalized weight."""
        return nn.Sequential(
            nn.SiLU(), fixed_conv(self._normalize() * self.taps, self.bias, stride=2)
        )

    def spectral_matrices(self) -> list[SpectralMatrix]:
        """Four matrices, as in the published model."""
        return [
            SpectralMatrix(weight, gain)
            for weight, gain in zip(
                self.weight.flatten(1).split(self.splits),
                self.log_gain.split(self.splits),
                strict=True,
            )
        ]


class UpsampleSkip(nn.Module):
    """The skip of an upsampling cell: bilinear x2 (corners aligned), 1x1 convolution, no bias.

    The convolution is pointwise and bilinear interpolation acts on each channel alone, so the two
    commute: projecting first costs a quarter.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` to ``(B, C_out, 2H, 2W)``, of the convolution's type."""
        y = self.conv(x)
        # in float32 under autocast, since the backward pass adds up to nine terms a pixel
        return F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True).to(y.dtype)


class SqueezeExcitation(nn.Module):
    """Channel attention: mean over space, two linear layers, sigmoid (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def gate(self, x: Tensor) -> Tensor:
        """Factors in (0, 1), ``(B, C, 1, 1)``."""
        hidden = F.relu(self.reduce(x.mean((2, 3))))
        return torch.sigmoid(self.expand(hidden))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of ``x`` ``(B, C, H, W)``."""
        return x * self.gate(x)
