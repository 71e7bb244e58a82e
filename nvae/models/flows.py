"""Volume-preserving autoregressive shifts that bend the posterior (paper, section 3.1; IAF).

z <- z - mu(z), where mu of a pixel sees only the pixels before it, once in raster order and once
mirrored. The Jacobian is unit triangular, so the density does not change: log q(z) = log q(z_0).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.models.layers import WeightNormConv2d

EXPANSION = 6
SPATIAL_KERNEL = 5
SHIFT_INIT = math.log(0.1)


def channel_mask(in_channels: int, out_channels: int, strict: bool) -> Tensor:
    """Which inputs an output channel may see at its own pixel: 0/1, ``(out, in)``.

    Channels are ordered; ``strict`` hides an output's own channel too. Where the widths differ,
    channels go in equal blocks (one width must divide the other).
    """
    blocks = min(in_channels, out_channels)
    input_block = torch.arange(in_channels) // (in_channels // blocks)
    output_block = torch.arange(out_channels) // (out_channels // blocks)
    if strict:
        return (input_block[None, :] < output_block[:, None]).float()
    return (input_block[None, :] <= output_block[:, None]).float()


def autoregressive_mask(
    in_channels: int, out_channels: int, kernel_size: int, *, depthwise: bool = False,
    strict: bool = False, mirrored: bool = False,
) -> Tensor:  # fmt: skip
    """Mask of a causal convolution's weight, ``(out, in or 1, K, K)``.

    Rows above the center and the center row's left are open, the center pixel takes the channel
    mask, the rest is closed. ``mirrored`` turns the two spatial axes round, for the reverse order.
    """
    middle = (kernel_size - 1) // 2
    mask = torch.zeros(out_channels, 1 if depthwise else in_channels, kernel_size, kernel_size)
    mask[:, :, :middle] = 1
    mask[:, :, middle, :middle] = 1
    if depthwise:
        mask[:, :, middle, middle] = 0.0 if strict else 1.0
    else:
        mask[:, :, middle, middle] = channel_mask(in_channels, out_channels, strict)
    return mask.flip(2, 3) if mirrored else mask


class AutoregressiveShift(nn.Module):
    """z - mu(z) with a causal mu, in raster order or mirrored."""

    def __init__(self, latent_channels: int, mirrored: bool) -> None:
        super().__init__()
        hidden = EXPANSION * latent_channels
        self.widen = WeightNormConv2d(
            latent_channels, hidden, 3, bias=False,
            mask=autoregressive_mask(latent_channels, hidden, 3, strict=True, mirrored=mirrored),
        )  # fmt: skip
        self.spatial = WeightNormConv2d(
            hidden, hidden, SPATIAL_KERNEL, groups=hidden, bias=False,
            mask=autoregressive_mask(
                hidden, hidden, SPATIAL_KERNEL, depthwise=True, mirrored=mirrored
            ),
        )  # fmt: skip
        self.mean = WeightNormConv2d(
            hidden, latent_channels, 1, log_gain_shift=SHIFT_INIT,
            mask=autoregressive_mask(hidden, latent_channels, 1, mirrored=mirrored),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        """``(B, L, h, w)`` to the same shape."""
        hidden = F.elu(self.spatial(F.elu(self.widen(z))))
        # the published model applies ELU twice here
        return z - self.mean(F.elu(hidden))


class Flow(nn.Sequential):
    """``pairs`` times a shift in raster order and one mirrored."""

    def __init__(self, latent_channels: int, pairs: int) -> None:
        super().__init__(
            *(
                AutoregressiveShift(latent_channels, mirrored)
                for _ in range(pairs)
                for mirrored in (False, True)
            )
        )
