"""Grids must show in each row and column what their labels say."""

from types import SimpleNamespace

import pytest
import torch

from nvae.sampling import decode, encode, prior_latents
from nvae.sampling.grids import (
    column_seeds,
    interpolation_grid,
    nearest_images,
    partial_grid,
    reconstruction_grid,
    spread,
    traversal_grid,
)
from tests.models.small import VERY_DEEP, small_very_deep

from .models import small_nvae


@pytest.fixture(params=["nvae", *VERY_DEEP])
def model(request):
    return small_nvae("normal") if request.param == "nvae" else small_very_deep(request.param)


@pytest.fixture
def x():
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def test_reconstruction_rows_are_input_mean_and_a_seeded_draw(model, x):
    grid = reconstruction_grid(model, x, torch.tensor([5, 6, 7]))
    assert grid.row_labels == ("input", "mean", "sample")
    assert torch.equal(grid.rows[0], x)
    assert torch.allclose(grid.rows[1], decode(model, encode(model, x)), atol=1e-5)
    alone = reconstruction_grid(model, x[1:2], torch.tensor([6]))
    assert torch.allclose(grid.rows[2][1:2], alone.rows[2], atol=1e-4)


def test_partial_rows_keep_more_and_more_of_the_image(model, x):
    latents, all_of_them = encode(model, x[:1]), model.num_groups
    grid = partial_grid(model, latents, [0, 2, all_of_them], column_seeds(0, 4), decode)
    assert grid.row_labels == tuple(f"{k} of {all_of_them}" for k in (0, 2, all_of_them))
    original = decode(model, latents)
    for row in grid.rows:
        assert row.shape == (5, 1, 8, 8)
        assert torch.allclose(row[:1], original, atol=1e-5)
    assert torch.allclose(grid.rows[2], original.expand(5, -1, -1, -1), atol=1e-5)
    assert not torch.allclose(grid.rows[0][1], grid.rows[0][2], atol=1e-3)


def test_interpolation_rows_go_from_each_image_to_the_next(model):
    latents = prior_latents(model, torch.tensor([0, 1, 2]))
    grid = interpolation_grid(model, latents, ["a", "b", "c"], 4, decode)
    assert grid.row_labels == ("a to b", "b to c")
    ends = decode(model, latents)
    assert torch.allclose(grid.rows[0][0], ends[0], atol=1e-3)
    assert torch.allclose(grid.rows[0][-1], ends[1], atol=1e-3)
    assert torch.allclose(grid.rows[1][-1], ends[2], atol=1e-3)
    with pytest.raises(ValueError, match="at least two"):
        interpolation_grid(model, latents[:1], ["a"], 4, decode)


def test_traversal_rows_start_from_the_image(model):
    latents = prior_latents(model, torch.tensor([3]))
    grid = traversal_grid(model, latents, [0, 2], 3, 3, decode)
    assert grid.row_labels == ("group 0", "group 2")
    assert grid.column_labels == ("0", "90", "180")
    for row in grid.rows:
        assert torch.allclose(row[:1], decode(model, latents), atol=1e-3)
    assert not torch.allclose(grid.rows[0][2], grid.rows[1][2], atol=1e-3)


def test_columns_of_different_images_are_drawn_apart():
    assert not set(column_seeds(0, 9).tolist()) & set(column_seeds(1, 9).tolist())
    assert torch.equal(column_seeds(4, 3), column_seeds(4, 9)[:3])


def test_spread_includes_both_ends():
    assert spread(4, 8) == [0, 1, 2, 3]
    assert spread(31, 8)[0] == 0
    assert spread(31, 8)[-1] == 30
    assert len(spread(31, 8)) == 8


@pytest.mark.parametrize("size", [3, 7, 50])
def test_finds_what_a_full_search_finds(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 1, 4, 4, generator=generator)
    queries = torch.rand(6, 1, 4, 4, generator=generator)
    index = torch.arange(100, 150)
    batches = [
        SimpleNamespace(x=x, index=i)
        for x, i in zip(images.split(size), index.split(size), strict=True)
    ]
    found = nearest_images(queries, batches, 4)
    distance = (queries[:, None] - images[None]).flatten(2).square().mean(2).sqrt()
    expected, order = distance.sort(dim=1)
    assert torch.allclose(found.distance, expected[:, :4], atol=1e-6)
    assert torch.equal(found.index, order[:, :4] + 100)
    assert torch.equal(found.images, images[order[:, :4]])


def test_a_training_image_finds_itself_at_distance_zero():
    images = torch.rand(5, 3, 4, 4)
    found = nearest_images(images[2:3], [SimpleNamespace(x=images, index=torch.arange(5))], 9)
    assert found.index[0, 0] == 2
    assert found.distance[0, 0] == 0
    assert found.index.shape == (1, 5)


def test_nothing_to_search_is_refused():
    with pytest.raises(ValueError, match="no images to search"):
        nearest_images(torch.zeros(1, 1, 2, 2), [], 1)
    with pytest.raises(ValueError, match="at least 1"):
        nearest_images(torch.zeros(1, 1, 2, 2), [], 0)
