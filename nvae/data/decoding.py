"""Encoded pictures -> PIL images, or arrays where PIL would lose bits or channels.

PIL reduces 16-bit color to 8 bits and knows no TIFF of five channels; such a TIFF is read by
tifffile, an optional package. A header is looked at before pixels are.
"""

import io
import logging
import zlib
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence

from nvae.data.pixels import BadImageError, Pixels, check_sides, to_channels

LARGEST_PICTURE = 1 << 28
"""Bytes of one picture, encoded or not."""

KINDS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
"""What a picture may be, whatever its name says; PIL would start a PostScript interpreter."""
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I", "F")
_PNG, _PNG_DEPTH, _PNG_COLOR = b"\x89PNG\r\n\x1a\n", 24, 25
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_BITS_PER_SAMPLE = 258
_TIFF_DEFLATE = (8, 32946)
_TIFF_PACKINGS = {1: "none", 5: "LZW", 32773: "PackBits", 8: "deflate", 32946: "deflate"}
"""Compressions of a TIFF that tifffile may unpack; others are not bounded."""


def decode(data: bytes, channels: int) -> Image.Image:
    """Read an encoded picture (PNG, JPEG, WebP, ...): first frame, upright, 8 bits.

    Raises:
        BadImageError: It is empty, truncated, not a picture, or too large to be one.
    """
    return to_channels(_opened(data), channels)


def decode_deep(data: bytes) -> Image.Image | Pixels:
    """Read an encoded picture with all its bits and channels, upright.

    Pages of a TIFF are channels, if each is gray; of other animations the first frame is taken.

    Returns:
        A PIL image of 8 bits a channel, or an array (H, W, C).

    Raises:
        BadImageError: As `decode`; or it needs a package that is not there.
    """
    is_deep = data.startswith(_PNG) and data[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10"
    if is_deep and data[_PNG_COLOR : _PNG_COLOR + 1] != b"\0":
        return _deep_png(data)
    if data.startswith(_TIFF):
        return _tiff(data)
    return _opened(data)


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise BadImageError("it is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=KINDS)
        check_sides(*image.size)
        image.load()
        return ImageOps.exif_transpose(image)
    except BadImageError:
        raise
    except Exception as error:
        raise _bad(error) from error


def _bad(error: Exception) -> BadImageError:
    """Decoders raise almost anything on damaged input."""
    return BadImageError(str(error).splitlines()[0] if str(error) else type(error).__name__)


def _deep_png(data: bytes) -> Pixels:
    """PIL keeps one byte of each number, and its name of the layout says which: it reads twice."""
    high, low = (np.asarray(_png_bytes(data, end)) for end in "BL")
    return high.astype(np.uint16) << 8 | low


def _png_bytes(data: bytes, end: str) -> Image.Image:
    """The upper bytes of 16-bit color, in big-endian order as in the file; the lower ones if they
    are taken for little-endian."""
    try:
        image: Any = Image.open(io.BytesIO(data), formats=("PNG",))
        check_sides(*image.size)
        if image.tile[0][3] != f"{image.mode};16B":
            raise BadImageError("it has 16 bits of gray and transparency: save it without one")
        tile = (*image.tile[0][:3], f"{image.mode};16{end}")
        image.tile = [getattr(image.tile[0], "_make", tuple)(tile)]
        image.load()
        upright: Image.Image = ImageOps.exif_transpose(image)
        return upright
    except BadImageError:
        raise
    except Exception as error:
        raise _bad(error) from error


def _tiff(data: bytes) -> Image.Image | Pixels:
    # PIL raises anything on damaged files, and on depths and channels that it does not know.
    with suppress(Exception):
        image: Any = Image.open(io.BytesIO(data), formats=("TIFF",))
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (1,))
        if image.mode in _DEEP_MODES or max(bits) <= 8:
            return _pages(image)
    return _by_tifffile(data)


def _pages(image: Any) -> Image.Image | Pixels:
    """A TIFF of one page as it is, of several gray ones as channels."""
    check_sides(*image.size)
    if image.n_frames == 1:
        image.load()
        return ImageOps.exif_transpose(image)
    size, mode = image.size, image.mode
    if prod(size) * image.n_frames * 4 > LARGEST_PICTURE:
        raise ValueError("its pages take more memory than a picture may")
    pages: list[NDArray[Any]] = []
    for page in ImageSequence.Iterator(image):
        if page.size != size or page.mode != mode or len(page.getbands()) > 1:
            raise ValueError("its pages are not gray and of one size and depth")
        pages.append(np.array(page))
    return np.stack(pages, axis=2)


def _by_tifffile(data: bytes) -> Pixels:
    try:
        from tifffile import TiffFile
    except ImportError:
        raise BadImageError(
            "a TIFF of this depth and number of channels needs tifffile: pip install "
            "'nvae[formats]'"
        ) from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says is raised as well
    try:
        with TiffFile(io.BytesIO(data)) as file:
            if len(file.series) != 1:
                raise BadImageError(f"it holds {len(file.series)} pictures")
            series = file.series[0]
            _check_tiff(series, data)
            axes, values = series.axes, series.asarray(maxworkers=1)
    except BadImageError:
        raise
    except Exception as error:
        raise _bad(error) from error
    others = [i for i, axis in enumerate(axes) if axis not in "YX"]
    if sorted(set(axes) & {"X", "Y"}) != ["X", "Y"] or len(others) > 1:
        raise BadImageError(f"it is {axes} {values.shape}, not height, width and channels")
    order = (axes.index("Y"), axes.index("X"), *others)
    return np.ascontiguousarray(values.transpose(order)).reshape(
        *(values.shape[i] for i in order[:2]), -1
    )


def _check_tiff(series: Any, data: bytes) -> None:
    """Raise a BadImageError where a TIFF claims or unpacks to more than a picture may have."""
    if prod(series.shape) * series.dtype.itemsize > LARGEST_PICTURE:
        raise BadImageError(f"it claims {series.shape}, more than {LARGEST_PICTURE} bytes")
    packing = int(series.keyframe.compression)
    if packing not in _TIFF_PACKINGS:
        raise BadImageError(
            f"it is packed by a method that is not read here ({series.keyframe.compression.name}); "
            "save it uncompressed or with deflate"
        )
    if packing in _TIFF_DEFLATE:
        left = LARGEST_PICTURE
        for segment in _segments(series, data):
            stream = zlib.decompressobj()
            while segment and not stream.eof:
                left -= len(stream.decompress(segment, 1 << 20))
                segment = stream.unconsumed_tail
                if left < 0:
                    raise BadImageError(f"it unpacks to more than {LARGEST_PICTURE} bytes")


def _segments(series: Any, data: bytes) -> Iterator[bytes]:
    for page in series.pages:
        if page is not None:
            for start, size in zip(page.dataoffsets, page.databytecounts, strict=True):
                yield data[start : start + size]
