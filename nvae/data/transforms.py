"""What is done to the pixels of a batch, on whatever device it is on.

Pure functions, vectorized over the batch, whose randomness depends on seed, epoch and image index
only. Work stays in the stored type as long as it can: in uint8 a flip or a border costs a quarter
of what it costs in float32.
"""

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
        images: (B, H, W, C) uint8, int32 or float32.
        index: (B,) int64, positions of the images in their split.
        seed: seed of the run.
        epoch: epoch of the draw.
    """
    if images.is_floating_point():
        bits = random_flip(images.view(torch.int32), index, seed=seed, epoch=epoch)
        return bits.view(images.dtype)
    keys = image_keys(index, seed=seed, epoch=epoch, stream=STREAM_FLIP)
    # The sign bit is one fair coin: all bits set where heads, none where tails.
    ones = 255 if images.dtype == torch.uint8 else -1
    heads = ((keys < 0).to(images.dtype) * ones)[:, None, None, None]
    # Select by bits, a ^ ((a ^ b) & mask): six times as fast as torch.where on bytes on the CPU,
    # and unlike indexing by the flipped ones it does not make a GPU wait.
    return images.flip(2).bitwise_xor_(images).bitwise_and_(heads).bitwise_xor_(images)


def binarize(images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Draw every pixel from a Bernoulli whose mean is its intensity (Burda et al. 2016).

    Args:
        images: (B, H, W, C) uint8; 0 never gives a one, 255 always does.
        index: (B,) int64.
        seed: seed of the draw.
        epoch: epoch of the draw; a constant for a fixed binarization.

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


def quantize(images: Tensor, bits: int) -> Tensor:
    """Keep the `bits` upper bits of uint8 levels: floor(x / 2^(8 - bits))."""
    return images if bits == 8 else images >> (8 - bits)


def widen(images: Tensor) -> Tensor:
    """uint16 levels as int32, which torch can compute with."""
    # Bits taken for signed ones, and what is above cleared: no kernel for uint16 is needed.
    return images.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)


def dequantize(levels: Tensor, bits: int) -> Tensor:
    """Gray levels 0..2^bits - 1, (B, H, W, C), to float32 in [0, 1], (B, C, H, W).

    The result is channels_last in memory, as the batch is.
    """
    x = levels.permute(0, 3, 1, 2).to(torch.float32)
    # A tensor, not a Python number: CUDA multiplies by the reciprocal of a number, which rounds
    # differently from the CPU.
    return x.div_(torch.full((), float(2**bits - 1), device=x.device))


def model_input(images: Tensor, index: Tensor, *, epoch: int | None, config: DataConfig) -> Tensor:
    """Quantize or binarize, flip and pad a batch as the config says.

    Args:
        images: (B, H, W, C) as stored: uint8, uint16, or float32 in [0, 1].
        index: (B,) int64, indices in the split, on the same device.
        epoch: training epoch; None for evaluation, which neither flips nor draws afresh.
        config: the data set.

    Returns:
        (B, C, H + 2 pad, W + 2 pad) float32 in [0, 1].
    """
    if config.floats:
        levels = images
    elif config.bits > 8:
        levels = widen(images)
    elif config.binarize == "none":
        levels = quantize(images, config.bits)
    elif config.binarize == "dynamic" and epoch is not None:
        # Epochs are shifted by one: epoch 0 is the fixed draw's.
        levels = binarize(images, index, seed=config.seed, epoch=epoch + 1)
    else:
        levels = binarize(images, index, seed=config.eval_seed, epoch=0)
    if config.flip and epoch is not None:
        levels = random_flip(levels, index, seed=config.seed, epoch=epoch)
    levels = pad_zeros(levels, config.pad)
    return levels.permute(0, 3, 1, 2) if config.floats else dequantize(levels, config.bits)
