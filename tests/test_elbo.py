"""Annealing, balancing, and the ELBO itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvae.elbo import balancing_alpha, balancing_weights, bits_per_dim, elbo, kl_coefficient
from nvae.models import NVAE, ModelConfig


def test_kl_coefficient_follows_the_schedule() -> None:
    """clamp((step - cT) / (aT), 1e-4, 1)."""
    assert kl_coefficient(0, 10_000) == 1e-4
    assert kl_coefficient(1501, 10_000) == pytest.approx(0.5)
    assert kl_coefficient(3001, 10_000) == 1.0
    assert kl_coefficient(10_000, 10_000) == 1.0
    assert kl_coefficient(0, 10_000, anneal_portion=0) == 1.0


def test_alpha_of_the_published_topologies() -> None:
    """4^k over the groups of the k-th scale from the top, smallest 1."""
    assert balancing_alpha((10, 5)).tolist() == [1.0] * 5 + [2.0] * 10
    assert balancing_alpha((30,)).tolist() == [1.0] * 30


@given(st.lists(st.floats(0, 1e5), min_size=3, max_size=3))
def test_balancing_weights_have_mean_one_and_no_gradient(kl: list[float]) -> None:
    per_group = torch.tensor([kl], requires_grad=True)
    weights = balancing_weights(per_group, torch.tensor([1.0, 2.0, 4.0]))
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert not weights.requires_grad


def test_beta_one_is_the_plain_elbo() -> None:
    """From beta = 1 on nothing is balanced, and the loss is the negative ELBO."""
    model = NVAE(ModelConfig(image_size=8, num_scales=1, groups_per_scale=2, preprocess_blocks=1,
                             encoder_channels=4, decoder_channels=4))  # fmt: skip
    x = torch.zeros(2, 1, 8, 8)
    output = model(x)
    log_likelihood = model.likelihood(output.logits).log_prob(x)
    alpha = balancing_alpha((2,))
    full = elbo(output, log_likelihood, 1.0, alpha)
    torch.testing.assert_close(full.loss, full.negative_elbo.mean())
    half = elbo(output, log_likelihood, 0.5, alpha)
    expected = 0.5 * (balancing_weights(output.kl_per_group, alpha) * output.kl_per_group).sum(1)
    torch.testing.assert_close(half.kl_term, expected)


def test_bits_per_dim() -> None:
    assert bits_per_dim(78.01, 784) == pytest.approx(0.14355, abs=1e-5)
