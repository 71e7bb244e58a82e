"""Files come back with their pixels, or are refused with a reason."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from nvae.codec.container import ImageFile
from nvae.codec.images import (
    VALUES,
    Wanted,
    check_names,
    read_image,
    restored_name,
    to_picture,
    write_image,
)
from tests.data.test_decoding import png16

GRAY, RGB = Wanted(1, 8, 8, 8), Wanted(3, 8, 8, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def _there_and_back(path, picture, wanted, **options):
    picture.save(path, **options)
    levels, file = read_image(path, path.name, wanted)
    assert levels.shape == (wanted.channels, 8, 8)
    assert int(levels.max()) < 2**wanted.bits
    back = to_picture(levels, file, wanted.bits)
    assert back.mode == picture.mode
    assert np.array_equal(np.asarray(back), np.asarray(picture))
    return file


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.webp"])
def test_formats(tmp_path, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    _there_and_back(tmp_path / name, Image.fromarray(PIXELS), RGB, **options)


def test_gray_in_a_color_model_and_the_other_way_round(tmp_path):
    gray = Image.fromarray(PIXELS[:, :, 0])
    assert _there_and_back(tmp_path / "a.png", gray, GRAY).mode == "L"
    assert _there_and_back(tmp_path / "b.png", gray, RGB).mode == "L"
    assert _there_and_back(tmp_path / "c.png", gray.convert("RGB"), GRAY).mode == "RGB"


def test_black_and_white(tmp_path):
    picture = Image.fromarray(PIXELS[:, :, 0]).convert("1")
    for wanted in (GRAY, Wanted(1, 8, 8, 1), RGB):
        assert _there_and_back(tmp_path / "a.png", picture, wanted).mode == "1"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("values", VALUES)
def test_levels_of_fewer_bits(tmp_path, bits, values):
    levels = np.arange(64).reshape(8, 8) % 2**bits
    for depth, dtype in ((8, np.uint8), (16, np.uint16)):
        picture = Image.fromarray(VALUES[values](levels, bits, depth).astype(dtype))
        _there_and_back(tmp_path / "a.png", picture, Wanted(1, 8, 8, bits))


def test_stretched_values_are_those_of_this_packages_pictures():
    for bits in range(1, 9):
        level = np.arange(2**bits)
        x = torch.from_numpy(level / (2**bits - 1))
        assert VALUES["full"](level, bits, 8).tolist() == (255 * x).round().int().tolist()


@pytest.mark.parametrize(
    ("picture", "wanted", "line"),
    [
        (Image.new("L", (8, 9)), GRAY,
         r"is 9x8 \(height x width\); the model codes 8x8 gray, 8 bits"),
        (Image.new("L", (8, 8)), Wanted(1, 16, 8, 12),
         r"is 8x8 \(height x width\); the model codes 16x8 gray, 12 bits"),
        (Image.new("L", (8, 8)), Wanted(1, 8, 8, 12), "has 8 bits; .* 8x8 gray, 12 bits"),
        (Image.new("L", (8, 8)), Wanted(5, 8, 8, 8), "has 1 channel; .* 8x8 5 channels, 8 bits"),
        (Image.fromarray(PIXELS), GRAY, "has 3 channels"),
        (Image.fromarray(PIXELS).convert("P"), RGB, "has mode P"),
        (Image.new("RGBA", (8, 8)), RGB, "has 4 channels"),
        (Image.new("LA", (8, 8)), GRAY, "has 2 channels"),
        (Image.fromarray(np.full((8, 8), 1000, np.uint16)), GRAY,
         "has values from 1000 to 1000 that are no 256 gray levels"),
        (Image.fromarray(PIXELS[:, :, 0]), Wanted(1, 8, 8, 4), "no 16 gray levels"),
    ],
)  # fmt: skip
def test_what_would_not_come_back(tmp_path, picture, wanted, line):
    picture.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=line) as error:
        read_image(tmp_path / "a.png", "a.png", wanted)
    assert str(error.value).startswith(str(tmp_path / "a.png"))


def test_what_pictures_hold_beside_pixels(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", transparency=(1, 2, 3))
    with pytest.raises(ValueError, match="transparency"):
        read_image(tmp_path / "a.png", "a.png", RGB)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "b.png", exif=turned)
    with pytest.raises(ValueError, match="turned"):
        read_image(tmp_path / "b.png", "b.png", RGB)
    pictures = [Image.fromarray(PIXELS), Image.fromarray(PIXELS.copy()[::-1])]
    pictures[0].save(tmp_path / "c.tif", save_all=True, append_images=pictures[1:])
    with pytest.raises(ValueError, match="2 frames"):
        read_image(tmp_path / "c.tif", "c.tif", RGB)
    (tmp_path / "d.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path / "d.png", "d.png", RGB)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a.png", "/a.png", "a/../../b.png", "a\\b.png", "C:/a.png", "a\n.png",
     "a//b.png", "x" * 300 + ".png", "a/", "\ud800.png"],
)  # fmt: skip
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match="refused"):
        restored_name(ImageFile(name, "L", "full"))


def test_names():
    files = [ImageFile(name, "L", "full") for name in ("a.png", "b/a.PNG", "a.jpg")]
    files += [ImageFile(name, "uint16 HWC", "low") for name in ("a.png", "b.npy")]
    assert check_names(files) == ["a.png", "b/a.PNG", "a.jpg.png", "a.png.npy", "b.npy"]
    with pytest.raises(ValueError, match=r"both be restored as a\.bmp\.png"):
        check_names(ImageFile(name, "L", "full") for name in ("a.bmp", "a.bmp.png"))


@pytest.mark.parametrize(
    ("mode", "values", "line"),
    [
        ("P", "full", "unknown"),
        ("L", "none", "unknown"),
        ("uint8 CHW", "low", "unknown"),
        ("L", "low", "12 bits as 'low' do not fit in mode L"),
        ("int32 HWC", "high", "do not fit"),
        ("RGBA", "full", "do not fit"),
        ("RGBA", "low", "do not fit"),
    ],
)
def test_modes_and_values_that_no_file_has(mode, values, line):
    """An archive may claim anything."""
    with pytest.raises(ValueError, match=line):
        to_picture(torch.zeros(1, 8, 8, dtype=torch.int32), ImageFile("a", mode, values), 12)


def test_values_that_do_not_fit_in_a_files_type():
    levels = torch.full((1, 8, 8), 40_000, dtype=torch.int32)
    with pytest.raises(ValueError, match="40000 does not fit in mode int16 HW"):
        to_picture(levels, ImageFile("a", "int16 HW", "low"), 16)


DEEP = np.random.default_rng(1).integers(0, 4096, (6, 8, 5), dtype=np.uint16)


def _array_there_and_back(path, array, wanted):
    """The file is there; its pixels come back in their own type."""
    levels, file = read_image(path, path.name, wanted)
    assert levels.shape == (wanted.channels, wanted.height, wanted.width)
    back = np.asarray(to_picture(levels, file, wanted.bits))
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)
    return file


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_deep_gray_pictures(tmp_path, name, bits):
    """As PNG of 16 bits."""
    gray = DEEP[:, :, 0]
    if name == "a.pgm":  # Pillow opens it as 32 bits
        (tmp_path / name).write_bytes(b"P5 8 6 65535\n" + gray.astype(">u2").tobytes())
    else:
        Image.fromarray(gray).save(tmp_path / name)
    file = _array_there_and_back(tmp_path / name, gray, Wanted(1, 6, 8, bits))
    assert (file.mode, file.values) == ("I;16", "low")


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("bits", [9, 12, 15, 16])
def test_deep_levels(tmp_path, bits, values):
    levels = np.random.default_rng(2).integers(0, 2**bits, (6, 8))
    stored = VALUES[values](levels, bits, 16).astype(np.uint16)
    Image.fromarray(stored).save(tmp_path / "a.png")
    file = _array_there_and_back(tmp_path / "a.png", stored, Wanted(1, 6, 8, bits))
    assert bits == 16 or file.values == values


def test_deep_color(tmp_path):
    """As an array; Pillow writes no such PNG."""
    color = np.ascontiguousarray(DEEP[:, :, :3])
    (tmp_path / "a.png").write_bytes(png16(color))
    file = _array_there_and_back(tmp_path / "a.png", color, Wanted(3, 6, 8, 12))
    assert restored_name(file) == "a.png.npy"
    with pytest.raises(ValueError, match="has 3 channels"):
        read_image(tmp_path / "a.png", "a.png", Wanted(1, 6, 8, 12))


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_tiff_of_five_channels(tmp_path, depth):
    tifffile = pytest.importorskip("tifffile")
    array = (DEEP >> 4).astype(depth)
    wanted = Wanted(5, 6, 8, 8)
    tifffile.imwrite(tmp_path / "a.tif", array, planarconfig="contig", photometric="minisblack")
    assert _array_there_and_back(tmp_path / "a.tif", array, wanted).mode.endswith("HWC")
    pages = [Image.fromarray(np.ascontiguousarray(array[:, :, c])) for c in range(5)]
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=pages[1:])
    _array_there_and_back(tmp_path / "b.tif", array, wanted)
    with pytest.raises(ValueError, match=r"b\.tif has 5 frames; the model codes 6x8 color"):
        read_image(tmp_path / "b.tif", "b.tif", Wanted(3, 6, 8, 8))


def test_transparency_is_a_channel(tmp_path):
    for mode, channels in (("LA", 2), ("RGBA", 4)):
        shape = (8, 8, channels)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        assert picture.mode == mode
        file = _there_and_back(tmp_path / "a.png", picture, Wanted(channels, 8, 8, 8))
        assert file.mode == mode


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.int64, ">u2"])
@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1), (6, 8, 5)])
def test_arrays(tmp_path, dtype, shape):
    """In their own type and with their own axes."""
    array = (DEEP >> 4).astype(dtype)[:, :, : (*shape, 1)[2]].reshape(shape)
    np.save(tmp_path / "a.npy", array)
    channels = 5 if shape[2:] == (5,) else 1
    file = _array_there_and_back(
        tmp_path / "a.npy", array.astype(array.dtype.newbyteorder("=")), Wanted(channels, 6, 8, 8)
    )
    assert restored_name(file) == "a.npy"


@pytest.mark.parametrize(
    ("array", "line"),
    [
        (DEEP.astype(np.float32), "holds float32, and only integers"),
        (DEEP[:, :7], r"is 6x7 \(height x width\); the model codes 6x8 5 channels, 12 bits"),
        (DEEP[:, :, :4], "has 4 channels"),
        (DEEP[0, 0], r"has shape \(5,\)"),
        (-DEEP.astype(np.int16), "has values from -4062 to -38 that are no 4096 gray levels"),
        (DEEP + np.uint16(60_000), "that are no 4096 gray levels"),
        (DEEP.astype(object), "cannot be read"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, array, line):
    np.save(tmp_path / "a.npy", np.ascontiguousarray(array), allow_pickle=True)
    with pytest.raises(ValueError, match=line) as error:
        read_image(tmp_path / "a.npy", "a.npy", Wanted(5, 6, 8, 12))
    assert str(error.value).startswith(f"{tmp_path}/a.npy ")


def test_arrays_that_claim_more_than_they_hold(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, DEEP)
    (tmp_path / "a.npy").write_bytes(buffer.getvalue()[:-1])
    with pytest.raises(ValueError, match="cannot be read: its header says"):
        read_image(tmp_path / "a.npy", "a.npy", Wanted(5, 6, 8, 12))


def test_arrays_and_deep_pictures_are_not_replaced(tmp_path):
    for name, good, bad in (
        ("a.npy", DEEP, DEEP[::-1]),
        ("a.png", Image.fromarray(DEEP[:, :, 0]), Image.fromarray(DEEP[:, :, 1])),
    ):
        for _ in range(2):
            write_image(tmp_path / name, good, overwrite=False)
        with pytest.raises(ValueError, match="holds something else"):
            write_image(tmp_path / name, bad, overwrite=False)
    assert np.array_equal(np.load(tmp_path / "a.npy"), DEEP)


def test_nothing_else_is_replaced(tmp_path):
    picture = Image.fromarray(PIXELS)
    write_image(tmp_path / "a.png", picture, overwrite=False)
    write_image(tmp_path / "a.png", picture, overwrite=False)
    (tmp_path / "b.png").write_text("notes")
    with pytest.raises(ValueError, match="holds something else"):
        write_image(tmp_path / "b.png", picture, overwrite=False)
    assert (tmp_path / "b.png").read_text() == "notes"
    (tmp_path / "link.png").symlink_to("b.png")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="else; remove the link"):
            write_image(tmp_path / "link.png", picture, overwrite=overwrite)
    assert (tmp_path / "b.png").read_text() == "notes"
    write_image(tmp_path / "b.png", picture, overwrite=True)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), PIXELS)
