"""The binary decisions have the likelihood's masses."""

import math

import pytest
import torch

from nvae.codec.coder import Stack
from nvae.codec.pixels import (
    coded_shape,
    coding_of,
    level_type,
    levels_of,
    pop_pixels,
    push_pixels,
)
from nvae.models.pixel_distribution import build_likelihood

from .models import model_of

CASES = [
    ("nvae", {"bits": 3, "likelihood": "logistic_mixture"}),
    ("nvae", {"bits": 3, "likelihood": "logistic_mixture", "image_channels": 3}),
    ("nvae", {"likelihood": "bernoulli"}),
    ("vdvae", {"bits": 3}),
    ("evdvae", {"bits": 3}),
    ("nvae", {"bits": 12, "likelihood": "logistic_mixture", "image_channels": 5}),
    ("nvae", {"bits": 16, "likelihood": "logistic_mixture"}),
    ("vdvae", {"bits": 16, "image_channels": 2}),
]


def _logits(config):
    channels = config.pixel_distribution.logit_channels(config)
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_code_length_is_the_likelihood(family, changes):
    config = model_of(family, **changes).config
    logits = _logits(config)
    white = 1 if config.likelihood == "bernoulli" else 2**config.bits - 1
    shape = 2, config.image_channels, 8, 8
    levels = torch.randint(0, white + 1, shape, dtype=level_type(config.bits))
    stack = Stack.holding(bytes(range(200)))
    before = stack.bits
    push_pixels(stack, config, logits, levels)
    x = levels.double() / white
    nats = -build_likelihood(config, logits.double()).log_prob(x).sum()
    assert stack.bits - before == pytest.approx(float(nats) / math.log(2), abs=8)
    assert torch.equal(pop_pixels(stack, config, logits), levels)
    assert stack.content() == bytes(range(200))


@pytest.mark.parametrize("bits", [8, 16])
def test_logistics_as_narrow_as_levels(bits):
    """The grid that parameters are rounded to is finer than levels are apart, however many."""
    config = model_of("nvae", bits=bits, likelihood="logistic_mixture").config
    logits = _logits(config)
    white, mixtures = 2**bits - 1, config.num_mixtures
    logits[:, mixtures : 2 * mixtures] = torch.linspace(-0.5, 0.5, 128).view(2, 1, 8, 8)
    logits[:, 2 * mixtures :] = math.log(1 / white)  # half of a level's width
    levels = ((logits[:, mixtures : mixtures + 1] + 1) / 2 * white).round()
    stack = Stack.holding(bytes(100))
    before = stack.bits
    push_pixels(stack, config, logits, levels.to(level_type(bits)))
    nats = -build_likelihood(config, logits.double()).log_prob(levels.double() / white).sum()
    assert stack.bits - before == pytest.approx(float(nats) / math.log(2), abs=3)


@pytest.mark.parametrize("bits", [1, 5, 9])
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
    config = model_of("nvae", likelihood="bernoulli", counted_size=[6, 8]).config
    assert config.counted_window == (slice(1, 7), slice(0, 8))
    assert coded_shape(config) == (1, 6, 8)


@pytest.mark.parametrize("bits", [1, 5, 8, 12, 16])
@pytest.mark.parametrize("family", ["nvae", "vdvae"])
def test_levels_of_what_data_sets_give(family, bits):
    config = model_of(family, bits=bits, likelihood="logistic_mixture").config
    level = torch.arange(2**bits).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    x = (level.double() / (2**bits - 1)).float()
    assert torch.equal(levels_of(config, x), level.to(level_type(bits)))
    if family == "vdvae" and bits < 8:  # 8-bit values whose low bits are zero
        assert torch.equal(levels_of(config, (level << (8 - bits)) / 255), level.to(torch.uint8))


def test_what_would_be_lost():
    """More than the model's gray levels, also where a likelihood drops the low bits itself; and
    anything beside the window."""
    x = torch.full((2, 1, 8, 8), 100 / 255)
    for family in ("nvae", "vdvae"):
        config = model_of(family, bits=5, likelihood="logistic_mixture").config
        with pytest.raises(ValueError, match="other values than the model's 32 gray levels"):
            levels_of(config, x)
    config = model_of("nvae", likelihood="logistic_mixture", counted_size=6).config
    with pytest.raises(ValueError, match="not black outside the window"):
        levels_of(config, x)
