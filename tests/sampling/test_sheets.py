"""Sheets must show in each row and column what their labels say."""

import pytest
import torch

from nvae.sampling import decode, encode, prior_latents
from nvae.sampling.sheets import (
    Decoder,
    column_seeds,
    interpolation_sheet,
    partial_sheet,
    reconstruction_sheet,
    spread,
    traversal_sheet,
)

from .models import small_nvae


@pytest.fixture
def x():
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def test_reconstruction_rows_are_input_mean_and_a_seeded_draw(x):
    model = small_nvae("normal")
    sheet = reconstruction_sheet(model, x, torch.tensor([5, 6, 7]))
    assert sheet.row_labels == ("input", "mean", "sample")
    assert torch.equal(sheet.rows[0], x)
    assert torch.allclose(sheet.rows[1], decode(model, encode(model, x)), atol=1e-5)
    alone = reconstruction_sheet(model, x[1:2], torch.tensor([6]))
    assert torch.allclose(sheet.rows[2][1:2], alone.rows[2], atol=1e-4)


def test_partial_rows_keep_more_and_more_of_the_image(x):
    model = small_nvae("normal")
    latents = encode(model, x[:1])
    sheet = partial_sheet(model, latents, [0, 2, 3], column_seeds(0, 4), Decoder())
    assert sheet.row_labels == ("0 of 3", "2 of 3", "3 of 3")
    original = decode(model, latents)
    for row in sheet.rows:
        assert row.shape == (5, 1, 8, 8)
        assert torch.allclose(row[:1], original, atol=1e-5)
    assert torch.allclose(sheet.rows[2], original.expand(5, -1, -1, -1), atol=1e-5)
    assert not torch.allclose(sheet.rows[0][1], sheet.rows[0][2], atol=1e-3)


def test_interpolation_rows_go_from_each_image_to_the_next():
    model = small_nvae("normal")
    latents = prior_latents(model, torch.tensor([0, 1, 2]))
    sheet = interpolation_sheet(model, latents, ["a", "b", "c"], 4, Decoder())
    assert sheet.row_labels == ("a to b", "b to c")
    ends = decode(model, latents)
    assert torch.allclose(sheet.rows[0][0], ends[0], atol=1e-3)
    assert torch.allclose(sheet.rows[0][-1], ends[1], atol=1e-3)
    assert torch.allclose(sheet.rows[1][-1], ends[2], atol=1e-3)
    with pytest.raises(ValueError, match="at least two"):
        interpolation_sheet(model, latents[:1], ["a"], 4, Decoder())


def test_traversal_rows_start_from_the_image():
    model = small_nvae("normal")
    latents = prior_latents(model, torch.tensor([3]))
    sheet = traversal_sheet(model, latents, [0, 2], 3, 3, Decoder())
    assert sheet.row_labels == ("group 0", "group 2")
    assert sheet.column_labels == ("0", "90", "180")
    for row in sheet.rows:
        assert torch.allclose(row[:1], decode(model, latents), atol=1e-3)
    assert not torch.allclose(sheet.rows[0][2], sheet.rows[1][2], atol=1e-3)


def test_columns_of_different_images_are_drawn_apart():
    assert not set(column_seeds(0, 9).tolist()) & set(column_seeds(1, 9).tolist())
    assert torch.equal(column_seeds(4, 3), column_seeds(4, 9)[:3])


def test_spread_includes_both_ends():
    assert spread(4, 8) == [0, 1, 2, 3]
    assert spread(31, 8)[0] == 0
    assert spread(31, 8)[-1] == 30
    assert len(spread(31, 8)) == 8
