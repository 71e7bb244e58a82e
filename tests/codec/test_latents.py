"""Latents on their lattice."""

import numpy as np
import pytest
import torch

from nvae.codec.coder import EmptyStackError, Stack
from nvae.codec.latents import FINEST, REACH, Lattice, fitting
from nvae.models.distributions import Normal
from nvae.models.output import GroupSample


def _pair(n: int = 4000) -> tuple[Normal, Normal]:
    shape = (n, 2, 1, 1)
    prior = Normal(torch.full(shape, 0.3), torch.full(shape, 0.5))
    return prior, Normal(torch.full(shape, 0.8), torch.full(shape, 0.1))


def _full_stack() -> Stack:
    return Stack.holding(np.random.default_rng(0).bytes(40_000))


def test_draws_are_the_posteriors():
    prior, posterior = _pair()
    (lattice,) = fitting([GroupSample(prior.mean, prior, posterior, prior.mean)])
    assert lattice.bits.tolist() == [4, 4]  # 2 steps in 0.1 / 0.5 of a sigma: 10, so 16
    z = lattice.z(lattice.pop_posterior(_full_stack(), prior, posterior), prior)
    assert float(z.mean()) == pytest.approx(0.8, abs=0.005)
    assert float(z.std()) == pytest.approx(0.1, abs=0.005)


def test_the_net_length_is_the_kl():
    prior, posterior = _pair()
    (lattice,) = fitting([GroupSample(prior.mean, prior, posterior, prior.mean)])
    stack = _full_stack()
    before = stack.bits
    k = lattice.pop_posterior(stack, prior, posterior)
    lattice.push_prior(stack, k)
    kl = float(posterior.kl(prior).double().sum()) / np.log(2)
    assert stack.bits - before == pytest.approx(kl, rel=0.02)
    assert torch.equal(lattice.pop_prior(stack, k), k)
    lattice.push_posterior(stack, k, prior, posterior)
    assert stack.bits == before


def test_a_dry_stack_is_noticed():
    prior, posterior = _pair(100)
    with pytest.raises(EmptyStackError):
        Lattice(torch.tensor([4, 4])).pop_posterior(Stack.holding(b"12345678"), prior, posterior)


def test_extremes_stay_on_the_lattice():
    """A posterior that is a point, one far away, and one far wider than the prior."""
    shape = (3, 1, 1, 1)
    prior = Normal(torch.zeros(shape), torch.full(shape, 1e-3))
    mean, sigma = torch.tensor([0.0, 100.0, 0.0]), torch.tensor([1e-20, 1.0, 1e6])
    posterior = Normal(mean.view(shape), sigma.view(shape))
    lattice = Lattice(torch.tensor([FINEST]))
    k = lattice.pop_posterior(_full_stack(), prior, posterior)
    assert lattice.limit == REACH << FINEST
    assert int(k.abs().max()) <= lattice.limit


def test_numbers_that_are_not_finite():
    prior, posterior = _pair(2)
    posterior.mean[0] = float("nan")
    with pytest.raises(FloatingPointError, match="latent distributions"):
        Lattice(torch.tensor([4, 4])).under_posterior(prior, posterior)
