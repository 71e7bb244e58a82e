"""The binary decisions have the likelihood's masses."""

import math

import pytest
import torch

from nvae.codec.coder import Stack
from nvae.codec.pixels import coding_of, pop_pixels, push_pixels, window
from nvae.models.likelihoods import build_likelihood

from .models import model_of

CASES = [
    ("nvae", {"bits": 3, "likelihood": "logistic_mixture"}),
    ("nvae", {"bits": 3, "likelihood": "logistic_mixture", "image_channels": 3}),
    ("nvae", {"likelihood": "bernoulli"}),
    ("vdvae", {"bits": 3}),
    ("evdvae", {"bits": 3}),
]


def _logits(config):
    channels = config.pixel_distribution.logit_channels(config)
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_code_length_is_the_likelihood(family, changes):
    config = model_of(family, **changes).config
    logits = _logits(config)
    white = 1 if config.likelihood == "bernoulli" else 2**config.bits - 1
    levels = torch.randint(0, white + 1, (2, config.image_channels, 8, 8), dtype=torch.uint8)
    stack = Stack.holding(bytes(range(200)))
    before = stack.bits
    push_pixels(stack, config, logits, levels)
    x = levels.double() / white
    nats = -build_likelihood(config, logits.double()).log_prob(x).sum()
    assert stack.bits - before == pytest.approx(float(nats) / math.log(2), abs=8)
    assert torch.equal(pop_pixels(stack, config, logits), levels)
    assert stack.content() == bytes(range(200))


@pytest.mark.parametrize("bits", [1, 5])
@pytest.mark.parametrize("scale", [-12.0, -3.0, 2.0])
def test_masses_of_all_levels_sum_to_one(bits, scale):
    """Also where every logistic is far narrower than a level, or far wider than the image."""
    config = model_of("nvae", bits=bits, likelihood="logistic_mixture").config
    logits = _logits(config)
    logits[:, 2 * config.num_mixtures :] = scale
    total = 0.0
    for level in range(2**bits):
        decisions = coding_of(config, logits).channel(0)
        mass = torch.ones(2 * 8 * 8, dtype=torch.float64)
        for place in reversed(range(bits)):
            one = decisions.probability()
            assert one.isfinite().all()
            bit = (level >> place) & 1
            mass = mass * (one if bit else 1 - one)
            decisions.take(torch.full((len(one),), bit))
        total = total + mass
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-9)


def test_window():
    config = model_of("nvae", likelihood="bernoulli", counted_size=6).config
    assert window(config) == (slice(1, 7), slice(1, 7))
