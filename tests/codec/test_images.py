"""Files come back with their pixels, or are refused with a reason."""

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

GRAY, RGB = Wanted(1, 8, 8), Wanted(3, 8, 8)
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
    for wanted in (GRAY, Wanted(1, 8, 1), RGB):
        assert _there_and_back(tmp_path / "a.png", picture, wanted).mode == "1"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("values", VALUES)
def test_levels_of_fewer_bits(tmp_path, bits, values):
    levels = np.arange(64).reshape(8, 8) % 2**bits
    picture = Image.fromarray(VALUES[values](levels, bits).astype(np.uint8))
    _there_and_back(tmp_path / "a.png", picture, Wanted(1, 8, bits))


def test_stretched_values_are_those_of_this_packages_pictures():
    for bits in range(1, 9):
        level = np.arange(2**bits)
        x = torch.from_numpy(level / (2**bits - 1))
        assert VALUES["full"](level, bits).tolist() == (255 * x).round().int().tolist()


@pytest.mark.parametrize(
    ("picture", "wanted", "line"),
    [
        (Image.new("L", (8, 9)), GRAY, "has 8x9 pixels; the model codes 8x8 gray, 8 bits"),
        (Image.fromarray(PIXELS), GRAY, "has 3 channels"),
        (Image.fromarray(PIXELS).convert("P"), RGB, "has mode P"),
        (Image.new("RGBA", (8, 8)), RGB, "has mode RGBA"),
        (Image.new("LA", (8, 8)), GRAY, "has mode LA"),
        (Image.fromarray(np.full((8, 8), 1000, np.uint16)), GRAY, "has mode I;16"),
        (Image.fromarray(PIXELS[:, :, 0]), Wanted(1, 8, 4), "no 16 gray levels"),
    ],
)
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
        restored_name(name)


def test_names():
    assert check_names(["a.png", "b/a.PNG", "a.jpg"]) == ["a.png", "b/a.PNG", "a.jpg.png"]
    with pytest.raises(ValueError, match=r"both be restored as a\.bmp\.png"):
        check_names(["a.bmp", "a.bmp.png"])


@pytest.mark.parametrize("file", [ImageFile("a", "P", "full"), ImageFile("a", "L", "none")])
def test_unknown_modes_and_values(file):
    with pytest.raises(ValueError, match="unknown"):
        to_picture(torch.zeros(1, 8, 8, dtype=torch.uint8), file, 8)


def test_nothing_else_is_replaced(tmp_path):
    picture = Image.fromarray(PIXELS)
    write_image(tmp_path / "a.png", picture, overwrite=False)
    write_image(tmp_path / "a.png", picture, overwrite=False)
    (tmp_path / "b.png").write_text("notes")
    with pytest.raises(ValueError, match="holds something else"):
        write_image(tmp_path / "b.png", picture, overwrite=False)
    assert (tmp_path / "b.png").read_text() == "notes"
    write_image(tmp_path / "b.png", picture, overwrite=True)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), PIXELS)
