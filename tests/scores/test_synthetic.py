"""Inverted images and noise: of the model's levels, and only where the likelihood counts."""

import pytest
import torch

from nvae.scores import Synthetic


@pytest.fixture
def x():
    levels = torch.randint(16, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return levels.float() / 15


def test_inverted_is_the_negative_and_leaves_the_border(x):
    change = Synthetic("inverted", 4, counted_size=6)
    index = torch.arange(20)
    changed = change.of(x, index)
    assert torch.equal(changed[..., 1:7, 1:7], 1 - x[..., 1:7, 1:7])
    assert torch.equal(changed[..., 0, :], x[..., 0, :])
    assert torch.allclose(change.of(changed, index), x, atol=1e-6)


def test_faded_is_half_as_bright_on_the_same_levels(x):
    changed = Synthetic("faded", 4, counted_size=6).of(x, torch.arange(20))
    levels, before = changed * 15, (x * 15).round()
    assert torch.allclose(levels[..., 1:7, 1:7], before[..., 1:7, 1:7] // 2, atol=1e-5)
    assert torch.equal(changed[..., 0], x[..., 0])
    assert torch.equal(Synthetic("faded", None).of(x, torch.arange(20)), x / 2)


@pytest.mark.parametrize("bits", [1, 4])
def test_noise_takes_every_level_equally_often(x, bits):
    noise = Synthetic("noise", bits, counted_size=6).of(x, torch.arange(20))
    inside = noise[..., 1:7, 1:7] * (2**bits - 1)
    assert torch.equal(noise[..., 7], x[..., 7])
    assert torch.allclose(inside, inside.round(), atol=1e-5)
    counts = torch.bincount(inside.round().long().flatten(), minlength=2**bits)
    assert len(counts) == 2**bits
    expected = inside.numel() / 2**bits
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_noise_is_its_images_own(x):
    """Whatever batch it comes in, and another one with another seed."""
    change = Synthetic("noise", 8)
    apart = torch.cat([change.of(x[i], i) for i in torch.arange(20).split(7)])
    assert torch.equal(apart, change.of(x, torch.arange(20)))
    assert not torch.equal(apart[0], apart[1])
    assert not torch.equal(apart, Synthetic("noise", 8, seed=1).of(x, torch.arange(20)))


def test_noise_of_floating_point_pixels_is_no_grid(x):
    noise = Synthetic("noise", None).of(x, torch.arange(20))
    assert 0 < noise.min() < 0.01 < 0.99 < noise.max() <= 1
    assert len(noise.unique()) > 0.9 * noise.numel()


def test_an_unknown_change_is_refused():
    with pytest.raises(ValueError, match="allowed: inverted, noise, faded"):
        Synthetic("upside_down", 8)
