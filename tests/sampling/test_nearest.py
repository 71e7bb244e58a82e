"""Nearest training images against a search by hand."""

from types import SimpleNamespace

import pytest
import torch

from nvae.sampling.nearest import nearest_images


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
