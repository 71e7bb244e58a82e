"""One picture in, one uint8 array of the prepared size out. Used in preparation only."""

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nvae.command_line import brief
from nvae.data.config import DataConfig
from nvae.data.manifest import LARGEST_SIDE

LARGEST_AREA = (1 << 30) // 4 // 3
"""Pixels of a picture: more are taken for an attack, as PIL does."""

_KINDS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
"""What a picture may be, whatever its name says; PIL would start a PostScript interpreter."""

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


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
    """16-bit and floating grey to 8 bits; PIL's own conversion would clip at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        raise BadImageError("it holds floating-point pixels, whose range is not defined")
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError("its grey values do not fit in 16 bits")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    """To grey or RGB; what is transparent becomes black."""
    mode: Literal["L", "RGB"] = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # A hidden pixel may have any colour underneath; compositing makes it defined.
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
        upright = ImageOps.exif_transpose(image)
        return _to_channels(upright, channels)
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


def fit(image: Image.Image, *, size: int, config: DataConfig) -> NDArray[np.uint8]:
    """Crop and resize a picture as the config says.

    Returns:
        (size, size, C) uint8; with `crop: random` the shorter side is `size` and the longer one
        keeps the proportions.
    """
    image = _crop(image, config)
    if config.crop == "random":
        short = min(image.size)
        target = (image.width * size // short, image.height * size // short)
        check_sides(*target)
    else:
        target = (size, size)
    if image.size != target:
        image = image.resize(target, _FILTERS[config.resize])
    array = np.array(image, dtype=np.uint8)
    return array.reshape(*array.shape[:2], -1)


def fit_array(
    pixels: NDArray[np.uint8], *, size: int, channels: int, config: DataConfig
) -> NDArray[np.uint8]:
    """The same for pixels that need no decoding, (H, W, 1 or 3) uint8."""
    height, width, have = pixels.shape
    check_sides(width, height)
    if (height, width, have) == (size, size, channels) and config.crop_box is None:
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if have == 1 else pixels)
    return fit(_to_channels(image, channels), size=size, config=config)
