"""Lossless codecs that everybody has: size and CPU time, one picture an image and all in one."""

import io
import lzma
import time
import zlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Coded = Callable[[NDArray[Any]], bytes]
Restored = Callable[[bytes, NDArray[Any]], NDArray[Any]]
"""Given the picture too, for its shape and type."""


def measured(images: NDArray[Any], encode: Coded, decode: Restored) -> dict[str, Any]:
    """Sizes and speeds of a codec; None where it takes no picture as large as all in one."""
    try:
        together = _timed([images.reshape(-1, *images.shape[2:])], encode, decode)
    except (ValueError, OSError):  # WebP ends at 16,383 pixels a side
        together = None
    return {"one_an_image": _timed(list(images), encode, decode), "all_in_one": together}


def _timed(pictures: Sequence[NDArray[Any]], encode: Coded, decode: Restored) -> dict[str, float]:
    start = time.process_time()
    coded = [encode(picture) for picture in pictures]
    middle = time.process_time()
    restored = [decode(c, p) for c, p in zip(coded, pictures, strict=True)]
    end = time.process_time()
    for picture, back in zip(pictures, restored, strict=True):
        assert (back == picture).all()
    dims = sum(picture.size for picture in pictures)
    return {
        "bits_per_dim": 8 * sum(map(len, coded)) / dims,
        "encode_dims_per_s": dims / (middle - start),
        "decode_dims_per_s": dims / (end - middle),
    }


def installed(images: NDArray[Any]) -> list[tuple[str, Coded, Restored]]:
    """Those that are installed and take such images ``(N, H, W, C)``."""

    def pillow(kind: str, **options: Any) -> tuple[Coded, Restored]:
        def encode(pixels: NDArray[Any]) -> bytes:
            buffer = io.BytesIO()
            picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            picture.save(buffer, kind, **options)
            return buffer.getvalue()

        def decode(data: bytes, like: NDArray[Any]) -> NDArray[Any]:
            found = np.asarray(Image.open(io.BytesIO(data)))
            return found.reshape(*found.shape[:2], -1)[:, :, : like.shape[2]]

        return encode, decode

    def plain(compress: Callable[[bytes], bytes], inflate: Callable[[bytes], bytes]) -> Any:
        return (
            lambda pixels: compress(pixels.tobytes()),
            lambda data, like: np.frombuffer(inflate(data), like.dtype).reshape(like.shape),
        )

    def xz(data: bytes) -> bytes:
        # a dictionary of 64 MiB, the preset's, would take longer to make than a picture to pack
        size = max(4096, len(data))
        preset = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}
        return lzma.compress(data, filters=[preset])

    found: list[Any] = []
    depth, channels = 8 * images.itemsize, images.shape[-1]
    if channels == 1 or (channels, depth) == (3, 8):
        found.append(("PNG, optimized", *pillow("PNG", optimize=True)))
    if channels in (1, 3) and depth == 8:
        found.append(("WebP, lossless", *pillow("WEBP", lossless=True, quality=100, method=6)))
        if find_spec("pillow_jxl"):  # pip install pillow-jxl-plugin
            __import__("pillow_jxl")
            found.append(("JPEG XL, effort 9", *pillow("JXL", lossless=True, effort=9)))
    found.append(("zlib, level 9", *plain(lambda data: zlib.compress(data, 9), zlib.decompress)))
    found.append(("xz, preset 9e", *plain(xz, lzma.decompress)))
    return found
