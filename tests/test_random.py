"""The counter-based generator: right bits, fair, normal, and independent of the batch."""

import pytest
import torch

from nvae.random import (
    STREAM_FLIP,
    STREAM_ORDER,
    STREAM_PIXELS,
    STREAM_PRIOR,
    PixelNoise,
    fold_in,
    image_keys,
    latent_noise,
    normal,
    permutation,
    uniform,
    uniform_bits,
)


def test_is_splitmix64():
    """The published test vector of splitmix64 with seed 1234567; fails on any wrong constant."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = uniform_bits(torch.tensor([1234567]), 4)[0].tolist()
    assert got == [value >> 40 for value in outputs]


def test_an_image_has_its_numbers_whatever_the_batch():
    index = torch.tensor([3, 1000, 7, 2**40])
    together = image_keys(index, seed=5, epoch=2, stream=STREAM_FLIP)
    alone = torch.cat([image_keys(i[None], seed=5, epoch=2, stream=STREAM_FLIP) for i in index])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 3}, {"stream": STREAM_ORDER}])
def test_every_argument_changes_the_numbers(change):
    arguments = {"seed": 5, "epoch": 2, "stream": STREAM_FLIP}
    index = torch.arange(64)
    a = image_keys(index, **arguments)
    b = image_keys(index, **(arguments | change))
    assert not (a == b).any()


def test_seed_and_epoch_are_not_interchangeable():
    index = torch.arange(64)
    a = image_keys(index, seed=1, epoch=2, stream=0)
    b = image_keys(index, seed=2, epoch=1, stream=0)
    assert not (a == b).any()


def test_uniforms_are_uniform_and_uncorrelated():
    keys = image_keys(torch.arange(2000), seed=0, epoch=0, stream=STREAM_FLIP)
    u = uniform_bits(keys, 64).double() / 2**24
    assert u.min() >= 0
    assert u.max() < 1
    # Standard error of the mean of 128,000 uniforms is 0.0008; five of them.
    assert abs(u.mean() - 0.5) < 0.004
    histogram = torch.histc(u, 16, 0, 1) / u.numel()
    assert (histogram - 1 / 16).abs().max() < 0.004
    correlation = torch.corrcoef(u.T) - torch.eye(64)
    assert correlation.abs().max() < 0.11
    neighbors = torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1]
    assert abs(neighbors) < 0.015


def test_permutation_is_one_and_changes_with_the_epoch():
    first = permutation(1000, seed=0, epoch=0, stream=STREAM_ORDER)
    again = permutation(1000, seed=0, epoch=0, stream=STREAM_ORDER)
    second = permutation(1000, seed=0, epoch=1, stream=STREAM_ORDER)
    assert torch.equal(first, again)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert (first == second).sum() < 20


@pytest.mark.gpu
def test_same_bits_on_cuda(cuda):
    index = torch.arange(1000)
    here = uniform_bits(image_keys(index, seed=3, epoch=9, stream=1), 50)
    there = uniform_bits(image_keys(index.to(cuda), seed=3, epoch=9, stream=1), 50)
    assert torch.equal(here, there.cpu())


def _keys(n, seed=0, stream=STREAM_PRIOR):
    return image_keys(torch.arange(n), seed=seed, stream=stream)


def test_moments_and_tails_are_those_of_the_normal():
    z = normal(_keys(1000), (401,), torch.float64).flatten()
    n = len(z)
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    beyond = torch.special.erfc(torch.tensor(3 / 2**0.5)).item()
    assert abs((z.abs() > 3).double().mean() - beyond) < 5 * (beyond / n) ** 0.5


def test_elements_groups_draws_and_images_are_uncorrelated():
    keys = fold_in(_keys(300)[:, None], torch.arange(4)).flatten()
    groups = latent_noise(keys, [(1, 4, 4), (1, 4, 4)])
    rows = torch.cat([g.reshape(300, 4 * 16) for g in groups], dim=1).double()
    correlation = torch.corrcoef(rows.T) - torch.eye(128)
    assert correlation.abs().max() < 6 / 300**0.5
    between_images = torch.corrcoef(rows[:100]) - torch.eye(100)
    assert between_images.abs().max() < 6 / 128**0.5


def test_a_row_depends_on_its_key_only():
    """Batch size and order must not change an image's noise: not even its last bit."""
    keys = _keys(7)
    together = latent_noise(keys, [(2, 3, 3), (2, 6, 6)])
    alone = latent_noise(keys[[4]], [(2, 3, 3), (2, 6, 6)])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[4:5], b)


def test_seed_and_stream_change_everything():
    base = normal(_keys(3), (5,))
    assert not torch.isclose(base, normal(_keys(3, seed=1), (5,))).any()
    assert not torch.isclose(base, normal(_keys(3, stream=STREAM_PIXELS), (5,))).any()


def test_uniform_is_uniform_and_never_zero():
    u = uniform(_keys(500), (501,), torch.float64).flatten()
    n = len(u)
    assert u.min() > 0
    assert u.max() <= 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    counts = torch.histc(u, 20, 0, 1)
    chi2 = ((counts - n / 20) ** 2 / (n / 20)).sum()
    assert chi2 < 19 + 5 * 38**0.5


def test_each_call_of_pixel_noise_continues_the_stream():
    noise = PixelNoise(_keys(2))
    like = torch.zeros(2, 1, 4, 4)
    first, second = noise.uniform(like), noise.uniform(like)
    assert not torch.isclose(first, second).any()
    assert torch.equal(PixelNoise(_keys(2)).uniform(like), first)
    assert noise.normal(like).dtype == torch.float32


def test_float64_noise_is_computed_in_float64():
    """Float64 noise must carry more than float32's digits, or exactness tests are blind."""
    z = normal(_keys(4), (50,), torch.float64)
    assert (z != z.float().double()).any()
    assert torch.allclose(z.float(), normal(_keys(4), (50,)), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("draw", [normal, uniform])
def test_half_precision_noise_is_rounded_and_nothing_else(draw, dtype):
    """Drawn in half precision, float16 gave NaN only and bfloat16 a fifth of its values."""
    found = draw(_keys(200), (41,), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, draw(_keys(200), (41,)).to(dtype))


def test_half_precision_uniform_is_never_zero(monkeypatch):
    """2^-33, the smallest number of all, is below float16's range."""
    monkeypatch.setattr("nvae.random._words", lambda keys, n: keys.new_zeros(len(keys), n))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert (uniform(_keys(1), (2,), dtype) > 0).all()
