"""From the numbers of a source to what is stored: depth, range, channels and shape."""

import numpy as np
import pytest
from PIL import Image

from nvae.data.pixels import BadImageError, fit, fit_array, fit_picture, to_levels
from tests.data.files import pictures


def shaped(values, dtype=None):
    return np.asarray(values, dtype).reshape(1, -1, 1)


def levels(make_config, values, dtype=None, **overrides):
    config = make_config(likelihood="normal", channels=1, **overrides)
    return to_levels(shaped(values, dtype), config).ravel().tolist()


def refusal(make_config, values, dtype, **overrides):
    with pytest.raises(BadImageError) as error:
        levels(make_config, values, dtype, **overrides)
    return str(error.value)


def test_bytes_stay_what_they_are(make_config):
    pixels = pictures(1, 8, 3)[0]
    assert to_levels(pixels, make_config()) is pixels


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int16", "int32", "int64"])
def test_beyond_eight_bits_integers_are_the_levels(make_config, dtype):
    assert levels(make_config, [0, 1, 4095], dtype, bits=12) == [0, 1, 4095]
    stored = to_levels(shaped([0, 4095], dtype), make_config(channels=1, bits=12))
    assert stored.dtype == np.uint16


def test_a_value_beyond_the_bits_says_what_to_set(make_config):
    error = refusal(make_config, [0, 16383], "uint16", bits=12)
    assert "it has values up to 16383, and data.bits=12 goes to 4095" in error
    assert "set data.bits=14, or data.value_range=[0, 16383] to keep the upper 12 bits" in error


def test_eight_bits_do_not_pass_for_twelve(make_config):
    error = refusal(make_config, [0, 255], "uint8", bits=12)
    assert "it has 8 bits a pixel, and data.bits=12 needs 16: set data.bits=8" in error


def test_sixteen_bits_do_not_pass_for_eight(make_config):
    """Silently they would lose a byte, or be black where an instrument gives twelve."""
    error = refusal(make_config, [0, 3000], "uint16")
    assert "from 0 to 3000: say what the values mean with data.value_range=[0, 4095]" in error
    assert error.endswith("or keep them with data.bits=12")


def test_a_range_of_as_many_values_changes_none(make_config):
    """-1024 to 3071 of computed tomography are 12 bits."""
    got = levels(make_config, [-1024, 0, 3071], "int16", bits=12, value_range=[-1024, 3071])
    assert got == [0, 1024, 4095]


def test_a_wider_range_keeps_the_upper_bits(make_config):
    values = np.arange(0, 65536, 97, dtype=np.uint16)
    for bits in (8, 10, 12):
        got = levels(make_config, values, bits=bits, value_range=[0, 65535])
        assert got == (values >> (16 - bits)).tolist()


def test_few_levels_in_bytes_come_out_again(make_config):
    """A byte of the prepared form keeps `bits` upper bits when a batch is made."""
    got = levels(make_config, [0, 1, 14, 15], "uint8", bits=4, value_range=[0, 15])
    assert [value >> 4 for value in got] == [0, 1, 14, 15]


def test_bins_of_a_range_are_equally_wide(make_config):
    got = levels(make_config, np.arange(1000), "int32", value_range=[0, 999])
    counts = np.bincount(got, minlength=256)
    assert counts.min() >= 3
    assert counts.max() <= 4


def test_values_outside_of_the_range_are_refused(make_config):
    error = refusal(make_config, [-5, 70000], "int32", bits=12, value_range=[0, 4095])
    assert "values from -5 to 70000, beyond 0 to 4095: set data.value_range=[-5, 70000]" in error


def test_a_range_of_integers_takes_integers(make_config):
    error = refusal(make_config, [0, 1], "uint16", value_range=[0, 1.5])
    assert "is not of integers" in error


def test_numbers_with_a_point_are_in_the_unit_range(make_config):
    assert levels(make_config, [0, 0.5, 1], "float32") == [0, 128, 255]
    assert levels(make_config, [0, 1], "float64", bits=16) == [0, 65535]
    error = refusal(make_config, [-2.5, 7], "float32")
    assert "not between 0 and 1, but from -2.5 to 7: set data.value_range=[-2.5, 7]" in error
    assert "not finite" in refusal(make_config, [0, np.nan], "float32")


def test_floats_stay_floats(make_config):
    values = np.array([0, 0.1, 1], np.float32)
    config = make_config(channels=1, likelihood="normal", floats=True)
    stored = to_levels(shaped(values), config)
    assert stored.dtype == np.float32
    assert np.array_equal(stored.ravel(), values)


def test_floats_of_a_range_become_the_unit_range(make_config):
    got = levels(make_config, [-40, 0, 60], "float64", floats=True, value_range=[-40, 60])
    assert got == [0, np.float32(0.4), 1]


def test_integers_become_floats_by_their_range(make_config):
    assert levels(make_config, [0, 51, 255], "uint8", floats=True) == [0, np.float32(0.2), 1]
    assert levels(make_config, [0, 65535], "uint16", floats=True) == [0, 1]
    error = refusal(make_config, [0, 7], "int64", floats=True)
    assert "say what the values mean" in error
    assert "keep them" not in error


def test_black_and_white_uses_the_whole_range(make_config):
    assert levels(make_config, [False, True]) == [0, 255]
    assert levels(make_config, [False, True], bits=10) == [0, 1023]
    assert levels(make_config, [False, True], floats=True) == [0, 1]


def test_what_is_no_number_is_refused(make_config):
    assert "complex64, which is no number" in refusal(make_config, [0], "complex64")


@pytest.mark.parametrize(("have", "wanted"), [(2, 1), (5, 3), (3, 5), (4, 3), (1, 2)])
def test_channels_are_neither_dropped_nor_made_up(make_config, have, wanted):
    pixels = np.zeros((8, 8, have), np.uint8)
    with pytest.raises(BadImageError, match=rf"{have} channels?, and data\.channels={wanted}: set"):
        fit_array(pixels, make_config(channels=wanted))


def test_measured_color_does_not_become_gray(make_config):
    """Weights of red, green and blue are for pictures for people."""
    with pytest.raises(BadImageError, match="3 channels"):
        fit_array(np.zeros((8, 8, 3), np.uint16), make_config(channels=1, bits=12))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_any_number_of_channels_is_resized_like_each_alone(make_config, dtype):
    options = {"uint16": {"bits": 12}, "float32": {"floats": True}}.get(dtype, {})
    config = make_config(image_size=[6, 9], channels=5, likelihood="normal", **options)
    rng = np.random.default_rng(0)
    pixels = rng.random((20, 31, 5)) if dtype == "float32" else rng.integers(0, 256, (20, 31, 5))
    pixels = pixels.astype(dtype)
    got = fit_array(pixels, config)
    assert got.shape == (6, 9, 5)
    assert got.dtype.str == config.stored_type
    one = make_config(image_size=[6, 9], channels=1, likelihood="normal", **options)
    for channel in range(5):
        alone = fit_array(pixels[:, :, channel : channel + 1], one)
        assert np.array_equal(got[:, :, channel], alone[:, :, 0])


@pytest.mark.parametrize("resize", ["bicubic", "lanczos"])
def test_filters_that_overshoot_stay_in_range(make_config, resize):
    pixels = np.zeros((8, 8, 1), np.uint16)
    pixels[:, 4:] = 4095
    got = fit_array(pixels, make_config(image_size=13, channels=1, bits=12, resize=resize))
    assert got.max() == 4095
    assert got.min() == 0


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((40, 20), (0, 5, 20, 35)),  # higher than 3:2
        ((20, 40), (13, 0, 26, 20)),  # wider
        ((30, 20), (0, 0, 20, 30)),
    ],
)
def test_the_center_has_the_proportions_of_the_model(make_config, size, box):
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    got = fit(image, make_config(image_size=[12, 8]))
    wanted = image.crop(box).resize((8, 12), Image.Resampling.BILINEAR)
    assert np.array_equal(got, np.asarray(wanted))


@pytest.mark.parametrize(("height", "width"), [(30, 90), (90, 30), (60, 40)])
def test_a_random_window_fits_into_what_is_kept(make_config, height, width):
    config = make_config(image_size=[12, 8], crop="random")
    got = fit(Image.new("RGB", (width, height)), config)
    assert got.shape[0] >= 12
    assert got.shape[1] >= 8
    assert got.shape[0] == 12 or got.shape[1] == 8


def test_another_shape_is_refused_where_nothing_may_be_resized(make_config):
    config = make_config(image_size=[6, 9], channels=1, crop="none", resize="none", bits=12)
    assert fit_array(np.ones((6, 9, 1), np.uint16), config).shape == (6, 9, 1)
    with pytest.raises(BadImageError) as error:
        fit_array(np.ones((9, 6, 1), np.uint16), config)
    assert str(error.value) == (
        "it is 9x6 (height x width), and data.image_size=[6, 9] needs 6x9: set data.image_size, "
        "or data.resize=bilinear"
    )


def test_transparency_can_be_a_channel(make_config):
    pixels = pictures(1, 8, 4)[0]
    assert np.array_equal(fit_picture(Image.fromarray(pixels), make_config(channels=4)), pixels)
    with pytest.raises(BadImageError, match=r"3 channels, and data\.channels=4"):
        fit_picture(Image.new("RGB", (8, 8)), make_config(channels=4))


def test_a_mode_that_pillow_does_not_convert_is_a_bad_picture(make_config):
    """And no error that would end what may skip it."""
    with pytest.raises(BadImageError, match="mode LAB is not read"):
        fit_picture(Image.new("LAB", (8, 8)), make_config(channels=1))
