"""A picture or an array of numbers -> the pixels that are stored: their type, values and shape."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvae.command_line import brief
from nvae.data.config import LARGEST_SIDE, DataConfig
from nvae.settings import height_width

Pixels = NDArray[Any]
"""(H, W, C) of whatever type."""

LARGEST_AREA = (1 << 30) // 4 // 3
"""Pixels of one picture; PIL too takes more for an attack."""

_COLORS = {1: "gray", 3: "color"}


class BadImageError(ValueError):
    """A picture cannot be used; the message says why, without its name."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message, 300))


def check_sides(width: int, height: int) -> None:
    """Raise a BadImageError unless a picture has a size that pictures have."""
    if not (1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE):
        raise BadImageError(f"it is {width}x{height}; allowed are 1 to {LARGEST_SIDE} a side")
    if width * height > LARGEST_AREA:
        raise BadImageError(f"it is {width}x{height}, more than {LARGEST_AREA} pixels")


def keeps_depth(config: DataConfig) -> bool:
    """Whether pictures come in numbers of their own, and not in 8 bits of gray or color."""
    is_usual = config.channels in _COLORS and config.value_range is None
    return not is_usual or config.bits > 8 or config.floats


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray to 8 bits; PIL's own conversion would clip at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        raise BadImageError(
            "it holds floating-point pixels, whose range is not defined: set data.value_range"
        )
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError("its gray values do not fit in 16 bits")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """To gray or RGB; what is transparent becomes black.

    Raises:
        BadImageError: the picture's mode has no way there.
    """
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
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError:  # LAB to gray, for one
        raise BadImageError(f"mode {image.mode} is not read") from None


def to_levels(values: Pixels, config: DataConfig) -> Pixels:
    """The numbers of a source as they are stored: levels, or float32 in [0, 1].

    Args:
        values: any shape; booleans, integers or floating-point numbers.
        config: says what they mean (`value_range`) and how they are stored (`bits`, `floats`).

    Returns:
        The same shape, of `stored_type`; the same array where nothing changes.

    Raises:
        BadImageError: They are no numbers, or lie outside of the range; the message says what to
            set.
    """
    kind = values.dtype.kind
    top = 2**config.stored_bits - 1
    if kind == "b":
        levels = values * (1.0 if config.floats else top)
    elif kind in "iu":
        levels = _of_integers(values, config)
    elif kind == "f":
        levels = _of_floats(values, config)
        if not config.floats:
            levels = np.rint(levels * levels.dtype.type(top))
    else:
        raise BadImageError(f"it holds {values.dtype}, which is no number")
    return levels.astype(config.stored_type, copy=False)


def _of_integers(values: Pixels, config: DataConfig) -> Pixels:
    bits = config.stored_bits
    if config.value_range is not None:
        least, greatest = config.value_range
        if least != int(least) or greatest != int(greatest):
            raise BadImageError(
                f"it holds integers, and data.value_range={config.value_range} is not of integers"
            )
    elif config.floats and values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        least, greatest = 0, np.iinfo(values.dtype).max
    elif values.dtype == np.uint8 and bits == 8 and not config.floats:
        return values
    elif bits > 8 and not config.floats and values.dtype.itemsize > 1:
        least, greatest = 0, 2**bits - 1
    else:
        _refuse_depth(values, config)
    _check_range(values, least, greatest, config)
    shifted = values.astype(np.int64) - int(least)
    if config.floats:
        return (shifted / (greatest - least)).astype(np.float32)
    return (shifted << bits) // int(greatest - least + 1)


def _refuse_depth(values: Pixels, config: DataConfig) -> None:
    low, high = int(values.min()), int(values.max())
    if values.dtype.itemsize == 1 and config.bits > 8:
        raise BadImageError(
            f"it has 8 bits a pixel, and data.bits={config.bits} needs 16: set data.bits=8, or say "
            "what its values mean: data.value_range=[0, 255]"
        )
    keeps = not config.floats and low >= 0 and high < 1 << 16
    raise BadImageError(
        f"it holds {values.dtype} from {low} to {high}: say what the values mean with "
        f"data.value_range=[{min(low, 0)}, {_full(high)}]"
        + (f", or keep them with data.bits={_bits(high)}" if keeps and high >= 256 else "")
    )


def _of_floats(values: Pixels, config: DataConfig) -> Pixels:
    if values.dtype.itemsize < 4:
        values = values.astype(np.float32)
    least, greatest = config.value_range or (0.0, 1.0)
    _check_range(values, least, greatest, config)
    if (least, greatest) == (0, 1):
        return values
    # In double precision, so that the ends are 0 and 1; a number beside them must not be beyond.
    scaled = (values.astype(np.float64) - least) / (greatest - least)
    return scaled.clip(0, 1).astype(np.float32 if config.floats else np.float64)


def _check_range(values: Pixels, least: float, greatest: float, config: DataConfig) -> None:
    if not values.size:
        raise BadImageError("it holds no pixels")
    low, high = values.min(), values.max()  # NaN where there is one
    if low >= least and high <= greatest:
        return
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadImageError("it holds numbers that are not finite")
    needed = f"data.value_range=[{min(low, least):g}, {max(high, greatest):g}]"
    if values.dtype.kind == "f":
        what = "between 0 and 1" if config.value_range is None else f"in {config.value_range}"
        raise BadImageError(
            f"it has values that are not {what}, but from {low:g} to {high:g}: set {needed}"
        )
    if config.value_range is not None or low < 0 or high >= 1 << 16:
        raise BadImageError(
            f"it has values from {low} to {high}, beyond {least:.0f} to {greatest:.0f}: set "
            f"data.value_range=[{min(int(low), int(least))}, {max(int(high), int(greatest))}]"
        )
    raise BadImageError(
        f"it has values up to {high}, and data.bits={config.bits} goes to {greatest}: set "
        f"data.bits={_bits(int(high))}, or data.value_range=[0, {_full(int(high))}] to keep the "
        f"upper {config.bits} bits"
    )


def _bits(value: int) -> int:
    """Bits that hold a value, as instruments have them: 8, 10, 12, 14 or 16."""
    return next((bits for bits in (8, 10, 12, 14, 16) if value < 1 << bits), value.bit_length())


def _full(value: int) -> int:
    """The greatest value of an instrument that gives this one."""
    return (1 << _bits(value)) - 1


def _crop(
    size: tuple[int, int], config: DataConfig
) -> tuple[int, int, int, int]:  # (left, top, right, bottom)
    """Of a (width, height): the crop box, and in it the central window of the proportions."""
    left, top, right, bottom = config.crop_box or (0, 0, *size)
    if right > size[0] or bottom > size[1]:
        raise BadImageError(f"it is {size[0]}x{size[1]}, smaller than crop_box {config.crop_box}")
    width, height = right - left, bottom - top
    if config.crop == "center":
        to_height, to_width = height_width(config.stored_size)
        keep_width = min(width, max(1, height * to_width // to_height))
        keep_height = min(height, max(1, width * to_height // to_width))
        left += (width - keep_width) // 2
        top += (height - keep_height) // 2
        right, bottom = left + keep_width, top + keep_height
    return left, top, right, bottom


def _target(width: int, height: int, config: DataConfig) -> tuple[int, int]:
    """(width, height) to resize to; with `crop: random` the least that covers the window."""
    to_height, to_width = height_width(config.stored_size)
    if config.crop == "random":
        if width * to_height >= height * to_width:
            target = (width * to_height // height, to_height)
        else:
            target = (to_width, height * to_width // width)
        check_sides(*target)
    else:
        target = (to_width, to_height)
    if target != (width, height) and config.resize == "none":
        raise BadImageError(
            f"it is {height}x{width} (height x width), and data.image_size="
            f"{list(height_width(config.image_size))} needs {target[1]}x{target[0]}: set "
            "data.image_size, or data.resize=bilinear"
        )
    return target


def fit_picture(image: Image.Image, config: DataConfig) -> Pixels:
    """What is stored of a picture of any kind; see :func:`fit_array`."""
    if not keeps_depth(config):
        return fit(to_channels(image, config.channels), config)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
    elif config.channels in _COLORS:
        values = np.asarray(to_channels(image, config.channels))
    else:
        values = np.asarray(image.convert("RGBA") if image.mode == "P" else image)
    return fit_array(values.reshape(*values.shape[:2], -1), config)


def fit(image: Image.Image, config: DataConfig) -> Pixels:
    """Crop and resize a picture as the config says.

    Returns:
        (H, W, C) uint8, of `stored_size`; with `crop: random` the window of this size fits into
        it, and the longer side keeps the proportions.
    """
    box = _crop(image.size, config)
    if box != (0, 0, *image.size):
        image = image.crop(box)
    target = _target(*image.size, config)
    if image.size != target:
        image = image.resize(target, Image.Resampling[config.resize.upper()])
    array = np.array(image, dtype=np.uint8)
    return array.reshape(*array.shape[:2], -1)


def fit_array(pixels: Pixels, config: DataConfig) -> Pixels:
    """The same for pixels that need no decoding: an array (H, W, C) of any numbers.

    Returns:
        (H, W, C) of `stored_type`.

    Raises:
        BadImageError: Of another depth, shape or number of channels than the config can take.
    """
    height, width, have = pixels.shape
    channels = config.channels
    check_sides(width, height)
    is_color = have in _COLORS and channels in _COLORS and not config.floats and config.bits <= 8
    if have != channels and not is_color:
        raise BadImageError(
            f"it has {have} channel{'s' * (have > 1)}, and data.channels={channels}: set "
            f"data.channels={have}"
        )
    levels = to_levels(pixels, config)
    if levels.shape == config.stored_shape and config.crop_box is None:
        return levels
    if is_color:
        image = Image.fromarray(levels[:, :, 0] if have == 1 else levels)
        return fit(to_channels(image, channels), config)
    left, top, right, bottom = _crop((width, height), config)
    window = levels[top:bottom, left:right]
    target = _target(right - left, bottom - top, config)
    if window.shape[1::-1] == target:
        return np.ascontiguousarray(window)
    return np.stack([_resized(window[:, :, c], target, config) for c in range(channels)], axis=2)


def _resized(plane: Pixels, target: tuple[int, int], config: DataConfig) -> Pixels:
    """One channel, (H, W); filters that overshoot do not leave the range of values."""
    resampling = Image.Resampling[config.resize.upper()]
    plane = np.ascontiguousarray(plane)
    if plane.dtype == np.uint8:
        return np.asarray(Image.fromarray(plane).resize(target, resampling))
    out = np.asarray(Image.fromarray(plane.astype(np.float32)).resize(target, resampling))
    if config.floats:
        return out.clip(0, 1)
    return np.rint(out).clip(0, 2**config.stored_bits - 1).astype(config.stored_type)
