import json

import pytest

from nvae.models import ModelConfig
from tests.models.small import small_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 30}, "image_size=30 cannot be halved 2 times.*multiple of 4"),
        ({"image_size": [97, 30]}, r"=\[97, 30\] cannot be halved 2 times.*nearest is \[96, 32\]"),
        ({"image_size": [96, 64, 3]}, "is not an integer or a list of two integers"),
        ({"image_size": [16, 8192]}, "image_size is 8192; it must be at most 4096"),
        ({"image_size": [16, 8], "counted_size": 12}, "no central window of image_size="),
        ({"bits": 17}, "bits is 17; it must be at most 16"),
        ({"likelihood": "gauss"}, "'gauss' is unknown; allowed: bernoulli, logistic_mixture"),
        ({"cell_family": "resnet"}, "cell_family='resnet' is unknown; allowed: .*mbconv_sep11"),
        ({"latent_channels": 0}, "latent_channels is 0; it must be at least 1"),
        ({"num_flows": -1}, "num_flows is -1"),
        ({"counted_size": 15}, "no central window"),
        ({"counted_size": 18}, "no central window"),
        (
            {"cell_family": "mbconv_den", "encoder_channels": 5},
            "encoder_channels=5 does not divide, use a multiple of 8",
        ),
    ],
)
def test_impossible_settings_are_one_clear_line(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        small_config(**overrides)
    assert "\n" not in str(error.value)


def test_round_trip_through_plain_types() -> None:
    config = small_config(num_flows=2, counted_size=12)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_unknown_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown model setting.*color"):
        ModelConfig.from_dict({"color": 3})


def test_a_size_has_one_form_whatever_file_it_comes_from() -> None:
    """Squares stay the number that older files hold; JSON gives lists where we have tuples."""
    assert small_config(image_size=[16, 16]) == small_config()
    config = small_config(image_size=[24, 16], counted_size=(20, 16))
    assert (config.image_size, config.image_shape) == ((24, 16), (1, 24, 16))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.counted_pixels == 320


def test_counted_pixels() -> None:
    assert small_config(counted_size=12).counted_pixels == 144
    assert small_config(image_channels=3).counted_pixels == 3 * 256
