"""Pixels: odd and hostile pictures, crops, and the exact input of the model."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from nvae.data.config import DataConfig
from nvae.data.decoding import decode
from nvae.data.pixels import BadImageError, fit, fit_array
from nvae.data.transforms import (
    binarize,
    dequantize,
    model_input,
    pad_zeros,
    quantize,
    random_flip,
)
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


def test_palette_shows_its_colors_not_its_indices():
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
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
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
    got = fit(Image.fromarray(pixels), config)
    assert np.array_equal(got, np.asarray(wanted))


@pytest.mark.parametrize(
    ("crop", "shape"), [("center", (8, 8)), ("none", (8, 8)), ("random", (8, 16))]
)
def test_crops(make_config, crop, shape):
    config = make_config(crop=crop, resize="nearest")
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = 255
    got = fit(Image.fromarray(pixels), config)
    assert got.shape == (*shape, 3)
    assert (got.mean() == 255) == (crop == "center")


def test_a_crop_box_outside_the_picture_is_refused(make_config):
    config = make_config(crop_box=[0, 0, 9, 9])
    with pytest.raises(BadImageError, match="8x8, smaller than crop_box"):
        fit(Image.new("RGB", (8, 8)), config)


def test_arrays_of_the_right_size_are_not_touched(make_config):
    pixels = pictures(1, 8, 3)[0]
    assert fit_array(pixels, make_config(channels=3)) is pixels


def test_arrays_change_size_and_channels(make_config):
    gray = fit_array(pictures(1, 16, 3)[0], make_config(channels=1))
    assert gray.shape == (8, 8, 1)
    color = fit_array(pictures(1, 8, 1)[0], make_config(channels=3))
    assert color.shape == (8, 8, 3)


def all_values() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)


def make_transform(**overrides):
    values = {"name": "x", "format": "random", "image_size": 28, "channels": 3, "bits": 8}
    config = DataConfig(**(values | {"likelihood": "normal"} | overrides))
    return partial(model_input, config=config)


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantization_is_the_formula_of_the_spec(bits):
    """x <- floor(255 x / 2^(8-b)) / (2^b - 1), for every pixel value."""
    got = dequantize(quantize(all_values(), bits), bits).flatten().tolist()
    wanted = [
        torch.tensor((v // 2 ** (8 - bits)) / (2**bits - 1), dtype=torch.float32).item()
        for v in range(256)
    ]
    assert got == wanted


def test_flip_is_a_fair_coin_per_image_and_mirrors_the_width():
    images = torch.arange(12, dtype=torch.uint8).view(1, 2, 3, 2).expand(4000, -1, -1, -1)
    index = torch.arange(4000)
    flipped = random_flip(images, index, seed=1, epoch=0)
    is_flipped = (flipped == images.flip(2)).flatten(1).all(1)
    is_same = (flipped == images).flatten(1).all(1)
    assert (is_flipped ^ is_same).all()
    assert abs(is_flipped.double().mean() - 0.5) < 0.04
    other_epoch = random_flip(images, index, seed=1, epoch=1)
    assert not torch.equal(other_epoch, flipped)


def test_binarization_has_the_pixel_as_its_mean():
    images = all_values().expand(4000, -1, -1, -1)
    draws = binarize(images, torch.arange(4000), seed=0, epoch=0)
    assert set(draws.unique().tolist()) == {0, 1}
    mean = draws.double().mean(0).flatten()
    assert mean[0] == 0
    assert mean[255] == 1
    # The standard error is at most 0.008.
    assert (mean - torch.arange(256) / 255).abs().max() < 0.04


def test_pad_adds_a_border_of_zeros():
    padded = pad_zeros(torch.ones(2, 3, 3, 1, dtype=torch.uint8), 2)
    assert padded.shape == (2, 7, 7, 1)
    assert padded.sum() == 2 * 9
    assert padded[:, 2:5, 2:5].min() == 1


def test_input_is_channels_last_float_in_unit_range():
    images = torch.randint(0, 256, (2, 6, 6, 3), dtype=torch.uint8)
    x = make_transform(pad=1)(images, torch.arange(2), epoch=None)
    assert x.shape == (2, 3, 8, 8)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x[:, :, 1:-1, 1:-1], images.permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("epoch", [None, 0, 3])
@pytest.mark.parametrize("binarize_as", ["none", "dynamic", "static"])
def test_an_image_does_not_depend_on_its_batch(epoch, binarize_as):
    transform = make_transform(flip=True, binarize=binarize_as, bits=1)
    images = torch.randint(0, 256, (10, 4, 4, 3), dtype=torch.uint8)
    index = torch.arange(100, 110)
    together = transform(images, index, epoch=epoch)
    alone = [transform(images[i, None], index[i, None], epoch=epoch) for i in range(10)]
    assert torch.equal(together, torch.cat(alone))


def test_flips_happen_in_training_only():
    transform = make_transform(flip=True)
    images = torch.randint(0, 256, (32, 4, 4, 3), dtype=torch.uint8)
    plain = images.permute(0, 3, 1, 2).float() / 255
    index = torch.arange(32)
    assert torch.equal(transform(images, index, epoch=None), plain)
    assert not torch.equal(transform(images, index, epoch=0), plain)


def test_dynamic_is_fresh_each_epoch_static_never_and_evaluation_is_fixed():
    images = torch.full((8, 4, 4, 1), 128, dtype=torch.uint8)
    index = torch.arange(8)

    def draw(kind, epoch, seed=0):
        return make_transform(binarize=kind, bits=1, seed=seed)(images, index, epoch=epoch)

    assert not torch.equal(draw("dynamic", 0), draw("dynamic", 1))
    assert not torch.equal(draw("dynamic", 0), draw("dynamic", None))
    assert torch.equal(draw("static", 0), draw("static", 1))
    # A test NLL must be one number for every training seed.
    assert torch.equal(draw("dynamic", None, seed=1), draw("dynamic", None, seed=2))
    assert torch.equal(draw("dynamic", None), draw("static", None))
    other = make_transform(binarize="dynamic", bits=1, eval_seed=1)(images, index, epoch=None)
    assert not torch.equal(other, draw("dynamic", None))


def test_the_border_stays_zero_when_binarized():
    transform = make_transform(binarize="dynamic", bits=1, pad=2)
    x = transform(torch.full((4, 4, 4, 1), 255, dtype=torch.uint8), torch.arange(4), epoch=0)
    assert x.sum() == 4 * 16


@pytest.mark.gpu
@pytest.mark.parametrize("binarize_as", ["none", "dynamic"])
@pytest.mark.parametrize("bits", [1, 5, 8])
def test_same_input_on_cuda(cuda, binarize_as, bits):
    transform = make_transform(flip=True, pad=2, binarize=binarize_as, bits=bits)
    images = torch.randint(0, 256, (16, 28, 28, 3), dtype=torch.uint8)
    index = torch.arange(16)
    here = transform(images, index, epoch=4)
    there = transform(images.to(cuda), index.to(cuda), epoch=4)
    assert torch.equal(here, there.cpu())
