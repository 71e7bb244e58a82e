"""Encoded pictures of more than 8 bits or of many channels: every bit comes out."""

import contextlib
import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from nvae.data import decoding
from nvae.data.decoding import decode, decode_deep
from nvae.data.pixels import BadImageError
from tests.data.files import encoded, pictures

tifffile = pytest.importorskip("tifffile")


def deep(*shape):
    return np.random.default_rng(0).integers(0, 65536, shape).astype(np.uint16)


def png16(pixels):
    """By hand, from the PNG specification: PIL writes no 16-bit color."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def tiff(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **({"photometric": "minisblack"} | options))
    return buffer.getvalue()


def with_tags(data, **values):
    """The same TIFF with other values of its tags."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = file.pages[0].tags
        places = [(tags[name].valueoffset, int(tags[name].dtype), v) for name, v in values.items()]
    for start, kind, value in places:
        size = {3: 2, 4: 4, 16: 8}[kind]
        data = data[:start] + value.to_bytes(size, "little") + data[start + size :]
    return data


def array(data):
    found = decode_deep(data)
    pixels = np.asarray(found)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_png_keeps_all_bits(channels):
    pixels = deep(5, 7, channels)
    assert np.array_equal(array(png16(pixels)), pixels)


def test_sixteen_bits_of_gray_and_transparency_are_refused():
    with pytest.raises(BadImageError, match="gray and transparency"):
        decode_deep(png16(deep(5, 7, 2)))


def test_sixteen_bit_color_still_becomes_eight_bits_where_those_are_wanted():
    pixels = deep(5, 7, 3)
    assert np.asarray(decode(png16(pixels), 3)).dtype == np.uint8


@pytest.mark.parametrize("cut", [20, 40, 60])
def test_a_cut_png_is_refused(cut):
    with pytest.raises(BadImageError):
        decode_deep(png16(deep(5, 7, 3))[:cut])


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (deep(6, 8), {}),
        (deep(6, 8, 5), {"planarconfig": "contig"}),
        (deep(6, 8, 5), {"planarconfig": "contig", "compression": "zlib", "predictor": True}),
        (deep(6, 8, 3), {"photometric": "rgb"}),
        (deep(6, 8, 5).astype(np.uint8), {"planarconfig": "contig"}),
        (np.random.default_rng(0).random((6, 8)).astype(np.float32), {}),
        (np.random.default_rng(0).random((6, 8, 2)).astype(np.float32), {"planarconfig": "contig"}),
        (deep(6, 8).astype(np.int16), {}),
    ],
    ids=["gray", "5", "5 packed", "color", "5 of 8 bits", "float", "2 floats", "signed"],
)
def test_tiffs_come_out_as_they_went_in(pixels, options):
    wanted = pixels[:, :, None] if pixels.ndim == 2 else pixels
    got = array(tiff(pixels, **options))
    assert np.array_equal(got, wanted)
    assert got.dtype.kind == wanted.dtype.kind


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pages_and_planes_are_channels(dtype):
    pixels = deep(5, 6, 8).astype(dtype)
    wanted = pixels.transpose(1, 2, 0)
    assert np.array_equal(array(tiff(pixels)), wanted)
    assert np.array_equal(array(tiff(pixels, planarconfig="separate")), wanted)


def test_pages_of_different_sizes_are_no_channels():
    buffer = io.BytesIO()
    pages = [Image.fromarray(deep(6, 8)), Image.fromarray(deep(8, 6))]
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(BadImageError, match="holds 2 pictures"):
        decode_deep(buffer.getvalue())


def test_ordinary_pictures_stay_pictures():
    pixels = pictures(1, 9, 3)[0]
    for kind in ("PNG", "TIFF", "BMP"):
        assert np.array_equal(np.asarray(decode_deep(encoded(pixels, kind))), pixels)


def test_without_tifffile_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadImageError, match=r"needs tifffile: pip install 'nvae\[formats\]'"):
        decode_deep(tiff(deep(6, 8, 5), planarconfig="contig"))
    assert array(tiff(deep(6, 8))).shape == (6, 8, 1)  # which PIL can read


def test_a_tiff_that_claims_the_moon_is_refused():
    data = tiff(deep(8, 8, 5), planarconfig="contig")
    data = with_tags(data, ImageWidth=60000, ImageLength=60000)
    with pytest.raises(BadImageError, match="more than 268435456 bytes"):
        decode_deep(data)


def test_a_tiff_that_unpacks_to_more_than_it_says_is_refused(monkeypatch):
    monkeypatch.setattr(decoding, "LARGEST_PICTURE", 10_000)
    data = tiff(deep(8, 8, 5), planarconfig="contig", compression="zlib")
    at, bomb = len(data), zlib.compress(bytes(1 << 20), 9)
    data = with_tags(data, StripOffsets=at, StripByteCounts=len(bomb))
    with pytest.raises(BadImageError, match="unpacks to more than 10000 bytes"):
        decode_deep(data + bomb)


def test_a_tiff_of_another_packing_is_refused():
    data = tiff(deep(8, 8, 5), planarconfig="contig")
    data = with_tags(data, Compression=34925)  # LZMA
    with pytest.raises(BadImageError, match="a method that is not read here"):
        decode_deep(data)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_tiff_is_a_bad_picture(seed):
    data = bytearray(tiff(deep(8, 8, 5), planarconfig="contig", compression="zlib"))
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(data), 4):
        data[at] ^= 1 << int(rng.integers(8))
    with contextlib.suppress(BadImageError):
        decode_deep(bytes(data))
