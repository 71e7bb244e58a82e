import pytest

from nvae.models.config import groups_per_scale, latent_scales, latent_shapes
from tests.models.small import small_config


@pytest.mark.parametrize(
    ("scales", "groups", "adaptive", "floor", "expected"),
    [
        (2, 10, True, 1, (10, 5)),
        (3, 20, True, 1, (20, 10, 5)),
        (5, 16, True, 4, (16, 8, 4, 4, 4)),
        (3, 3, True, 1, (3, 1, 1)),
        (3, 7, False, 1, (7, 7, 7)),
    ],
)
def test_groups_per_scale(
    scales: int, groups: int, adaptive: bool, floor: int, expected: tuple[int, ...]
) -> None:
    config = small_config(
        image_size=64, num_scales=scales, groups_per_scale=groups, adaptive_groups=adaptive,
        min_groups_per_scale=floor,
    )  # fmt: skip
    assert groups_per_scale(config) == expected


def test_sizes_halve_and_widths_double() -> None:
    scales = latent_scales(small_config(decoder_channels=6))
    assert [(s.size, s.encoder_width, s.decoder_width) for s in scales] == [
        ((8, 8), 16, 12),
        ((4, 4), 32, 24),
    ]


def test_rectangles_keep_their_proportions() -> None:
    config = small_config(image_size=(24, 16))
    assert latent_shapes(config) == ((3, 6, 4), (3, 12, 8), (3, 12, 8))


def test_latents_are_listed_coarsest_first() -> None:
    assert latent_shapes(small_config()) == ((3, 4, 4), (3, 8, 8), (3, 8, 8))
