"""The counter-based generator: right bits, fair, and independent of the batch."""

import pytest
import torch

from nvae.counter_rng import (
    STREAM_FLIP,
    STREAM_ORDER,
    image_keys,
    permutation,
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
    neighbours = torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.015


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
