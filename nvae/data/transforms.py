"""From a batch of uint8 pixels to the model's input, on whatever device the batch is on.

Everything here is a pure function, vectorised over the batch. Randomness comes from
`counter_rng`, so it depends on seed, epoch and image index only. Work stays in uint8 as long as
it can: a flip or a border costs a quarter of what it costs in float32.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.data.config import DataConfig
from nvae.random import (
    STREAM_BINARIZE,
    STREAM_FLIP,
    UNIFORM_BITS,
    image_keys,
    uniform_bits,
)


def random_flip(images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: (B, H, W, C) uint8.
        index: (B,) int64.
        seed: seed of the run.
        epoch: epoch of the draw.
    """
    keys = image_keys(index, seed=seed, epoch=epoch, stream=STREAM_FLIP)
    # The sign bit is one fair coin: 255 where heads, 0 where tails.
    heads = ((keys < 0).to(torch.uint8) * 255)[:, None, None, None]
    # Select by bits, a ^ ((a ^ b) & mask): six times as fast as torch.where on bytes on the CPU,
    # and unlike indexing by the flipped ones it does not make a GPU wait.
    return images.flip(2).bitwise_xor_(images).bitwise_and_(heads).bitwise_xor_(images)


def binarize(images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Draw every pixel from a Bernoulli whose mean is its intensity (spec, section 1).

    Args:
        images: (B, H, W, C) uint8; 0 never gives a one, 255 always does.
        index: (B,) int64.
        seed: seed of the draw.
        epoch: epoch of the draw; a constant for a fixed binarisation.

    Returns:
        (B, H, W, C) uint8 of zeros and ones.
    """
    keys = image_keys(index, seed=seed, epoch=epoch, stream=STREAM_BINARIZE)
    uniform = uniform_bits(keys, images[0].numel()).view(images.shape)
    # u < v / 255 in integers: no rounding, hence the same picture on every device.
    return (uniform * 255 < images.to(torch.int64) << UNIFORM_BITS).to(torch.uint8)


def pad_zeros(images: Tensor, pad: int) -> Tensor:
    """Add `pad` rows and columns of zeros on every side of (B, H, W, C)."""
    return F.pad(images, (0, 0, pad, pad, pad, pad)) if pad else images


def dequantise(levels: Tensor, bits: int) -> Tensor:
    """Grey levels 0..2^bits - 1, (B, H, W, C), to float32 in [0, 1], (B, C, H, W).

    The result is channels_last in memory, as the batch is.
    """
    x = levels.permute(0, 3, 1, 2).to(torch.float32)
    # A tensor, not a Python number: CUDA multiplies by the reciprocal of a number, which rounds
    # differently from the CPU.
    return x.div_(torch.full((), float(2**bits - 1), device=x.device))


def quantise(images: Tensor, bits: int) -> Tensor:
    """Keep the `bits` upper bits: floor(255 x / 2^(8-b)), the numerator of spec section 1."""
    return images if bits == 8 else images >> (8 - bits)


@dataclass(frozen=True)
class InputTransform:
    """All of the above in order, as one data set wants it.

    Attributes:
        bits, pad, flip, binarize, seed, eval_seed: as in `DataConfig`.
    """

    bits: int
    pad: int
    flip: bool
    binarize: str
    seed: int
    eval_seed: int

    @classmethod
    def from_config(cls, config: DataConfig) -> Self:
        """Take the fields that concern the device side."""
        return cls(
            bits=config.bits,
            pad=config.pad,
            flip=config.flip,
            binarize=config.binarize,
            seed=config.seed,
            eval_seed=config.eval_seed,
        )

    def __call__(self, images: Tensor, index: Tensor, *, epoch: int | None) -> Tensor:
        """Make the model's input.

        Args:
            images: (B, H, W, C) uint8, as stored.
            index: (B,) int64, indices in the split, on the same device.
            epoch: training epoch; None for evaluation, which neither flips nor draws afresh.

        Returns:
            (B, C, H + 2 pad, W + 2 pad) float32 in [0, 1].
        """
        if self.binarize == "none":
            levels = quantise(images, self.bits)
        elif self.binarize == "dynamic" and epoch is not None:
            # Epochs are shifted by one: epoch 0 is the fixed draw's.
            levels = binarize(images, index, seed=self.seed, epoch=epoch + 1)
        else:
            levels = binarize(images, index, seed=self.eval_seed, epoch=0)
        if self.flip and epoch is not None:
            levels = random_flip(levels, index, seed=self.seed, epoch=epoch)
        return dequantise(pad_zeros(levels, self.pad), self.bits)
