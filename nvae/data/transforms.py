"""What is done to pixels: once in preparation (decode, crop, resize), and at every batch.

The second half works on whatever device the batch is on: pure functions, vectorized over the batch,
whose randomness depends on seed, epoch and image index only. Work stays in uint8 as long as it can:
a flip or a border costs a quarter of what it costs in float32.
"""

import io
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from nvae.command_line import brief
from nvae.data.config import LARGEST_SIDE, DataConfig
from nvae.random import (
    STREAM_BINARIZE,
    STREAM_FLIP,
    UNIFORM_BITS,
    image_keys,
    uniform_bits,
)

LARGEST_AREA = (1 << 30) // 4 // 3
"""Pixels of one picture; PIL too takes more for an attack."""

_KINDS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
"""What a picture may be, whatever its name says; PIL would start a PostScript interpreter."""


class BadImageError(ValueError):
    """A picture cannot be read; the message says why, without its name."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message, 300))


def check_sides(width: int, height: int) -> None:
    """Raise a BadImageError unless a picture has a size that pictures have."""
    if not (1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE):
        raise BadImageError(f"it is {width}x{height}; allowed are 1 to {LARGEST_SIDE} a side")
    if width * height > LARGEST_AREA:
        raise BadImageError(f"it is {width}x{height}, more than {LARGEST_AREA} pixels")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray to 8 bits; PIL's own conversion would clip at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        raise BadImageError("it holds floating-point pixels, whose range is not defined")
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError("its gray values do not fit in 16 bits")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """To gray or RGB; what is transparent becomes black."""
    mode: Literal["L", "RGB"] = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # A hidden pixel may have any color underneath; compositing makes it defined.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def decode(data: bytes, channels: int) -> Image.Image:
    """Read an encoded picture (PNG, JPEG, WebP, ...): first frame, upright, 8 bits.

    Raises:
        BadImageError: It is empty, truncated, not a picture, or too large to be one.
    """
    if not data:
        raise BadImageError("it is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_KINDS)
        check_sides(*image.size)
        image.load()
        return to_channels(ImageOps.exif_transpose(image), channels)
    except BadImageError:
        raise
    # PIL's decoders raise almost anything on damaged input.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadImageError(reason) from error


def _crop(image: Image.Image, config: DataConfig) -> Image.Image:
    """The crop box, then the central square where the config asks for it."""
    if config.crop_box is not None:
        left, top, right, bottom = config.crop_box
        if right > image.width or bottom > image.height:
            raise BadImageError(
                f"it is {image.width}x{image.height}, smaller than crop_box {config.crop_box}"
            )
        image = image.crop((left, top, right, bottom))
    if config.crop == "center" and image.width != image.height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image


def fit(image: Image.Image, config: DataConfig) -> NDArray[np.uint8]:
    """Crop and resize a picture as the config says.

    Returns:
        (size, size, C) uint8, of side `stored_size`; with `crop: random` the shorter side has it
        and the longer one keeps the proportions.
    """
    image, size = _crop(image, config), config.stored_size
    target = (size, size)
    if config.crop == "random":
        short = min(image.size)
        target = (image.width * size // short, image.height * size // short)
        check_sides(*target)
    if image.size != target:
        image = image.resize(target, Image.Resampling[config.resize.upper()])
    array = np.array(image, dtype=np.uint8)
    return array.reshape(*array.shape[:2], -1)


def fit_array(pixels: NDArray[np.uint8], config: DataConfig) -> NDArray[np.uint8]:
    """The same for pixels that need no decoding, (H, W, 1 or 3) uint8."""
    height, width, have = pixels.shape
    size, channels = config.stored_size, config.channels
    check_sides(width, height)
    if (height, width, have) == (size, size, channels) and config.crop_box is None:
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if have == 1 else pixels)
    return fit(to_channels(image, channels), config)


def random_flip(images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: (B, H, W, C) uint8.
        index: (B,) int64, positions of the images in their split.
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
        images: (B, H, W, C) uint8, as stored.
        index: (B,) int64, indices in the split, on the same device.
        epoch: training epoch; None for evaluation, which neither flips nor draws afresh.
        config: the data set.

    Returns:
        (B, C, H + 2 pad, W + 2 pad) float32 in [0, 1].
    """
    if config.binarize == "none":
        levels = quantize(images, config.bits)
    elif config.binarize == "dynamic" and epoch is not None:
        # Epochs are shifted by one: epoch 0 is the fixed draw's.
        levels = binarize(images, index, seed=config.seed, epoch=epoch + 1)
    else:
        levels = binarize(images, index, seed=config.eval_seed, epoch=0)
    if config.flip and epoch is not None:
        levels = random_flip(levels, index, seed=config.seed, epoch=epoch)
    return dequantize(pad_zeros(levels, config.pad), config.bits)
