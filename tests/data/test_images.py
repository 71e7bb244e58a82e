"""Odd and hostile pictures: read as a viewer would show them, or refused with a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from nvae.data.images import BadImageError, decode, fit, fit_array
from tests.data.files import encoded, pictures


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(data: bytes, channels: int) -> np.ndarray:
    return np.asarray(decode(data, channels))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_out_as_they_went_in(kind):
    pixels = pictures(1, 9, 3)[0]
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(array(encoded(pixels, kind, **options), 3), pixels)


def test_jpeg_is_close():
    pixels = np.asarray(Image.new("RGB", (16, 16), (200, 100, 50)))
    difference = array(encoded(pixels, "JPEG", quality=95), 3).astype(int) - pixels
    assert abs(difference).max() < 6


def test_sixteen_bits_keep_their_upper_byte():
    """PIL's own conversion clips everything above 255 to white."""
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    got = array(saved(Image.fromarray(values)), 1)
    assert np.array_equal(got, (values >> 8).astype(np.uint8))
    assert np.array_equal(array(saved(Image.fromarray(values)), 3)[..., 2], got)


def test_palette_shows_its_colours_not_its_indices():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    image.putpixel((1, 0), 1)
    assert array(saved(image), 3).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_transparency_becomes_black_not_what_hides_beneath():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 255, 0, 255))
    assert array(saved(image), 3).tolist() == [[[0, 0, 0], [0, 255, 0]]]


def test_cmyk_is_converted():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = array(saved(image, "JPEG", quality=95), 3)[4, 4].astype(int)
    assert red > 200
    assert max(green, blue) < 60


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert array(data, 3)[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode(saved(image, "JPEG", exif=exif), 3).size == (4, 6)


def test_bilevel_is_black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert array(saved(image), 1).tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not a picture", "cannot identify"),
        (encoded(pictures(1, 64, 3)[0])[:300], "truncated"),
        (encoded(pictures(1, 64, 3)[0], "JPEG")[:700], "truncated"),
    ],
)
def test_damaged_data_is_refused_with_a_reason(data, reason):
    with pytest.raises(BadImageError, match=reason):
        decode(data, 3)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImageError, match="exceeds limit"):
        decode(encoded(pictures(1, 16, 3)[0]), 3)


def test_floating_point_pictures_are_refused():
    image = Image.fromarray(np.zeros((4, 4), np.float32))
    with pytest.raises(BadImageError, match="floating-point"):
        decode(saved(image, "TIFF"), 1)


def test_crop_box_then_resize_is_that_of_celeba(make_config):
    """Spec, section 1: box (15, 40, 163, 188) of 178x218, then resize to 64."""
    config = make_config(image_size=64, crop_box=[15, 40, 163, 188])
    pixels = np.random.default_rng(0).integers(0, 256, (218, 178, 3), np.uint8)
    wanted = Image.fromarray(pixels[40:188, 15:163]).resize((64, 64), Image.Resampling.BILINEAR)
    got = fit(Image.fromarray(pixels), size=64, config=config)
    assert np.array_equal(got, np.asarray(wanted))


@pytest.mark.parametrize(
    ("crop", "shape"), [("center", (8, 8)), ("none", (8, 8)), ("random", (8, 16))]
)
def test_crops(make_config, crop, shape):
    config = make_config(crop=crop, resize="nearest")
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = 255
    got = fit(Image.fromarray(pixels), size=8, config=config)
    assert got.shape == (*shape, 3)
    assert (got.mean() == 255) == (crop == "center")


def test_a_crop_box_outside_the_picture_is_refused(make_config):
    config = make_config(crop_box=[0, 0, 9, 9])
    with pytest.raises(BadImageError, match="8x8, smaller than crop_box"):
        fit(Image.new("RGB", (8, 8)), size=8, config=config)


def test_arrays_of_the_right_size_are_not_touched(make_config):
    pixels = pictures(1, 8, 3)[0]
    assert fit_array(pixels, size=8, channels=3, config=make_config()) is pixels


def test_arrays_change_size_and_channels(make_config):
    grey = fit_array(pictures(1, 16, 3)[0], size=8, channels=1, config=make_config())
    assert grey.shape == (8, 8, 1)
    colour = fit_array(pictures(1, 8, 1)[0], size=8, channels=3, config=make_config())
    assert colour.shape == (8, 8, 3)
