"""The size of coded images is the model's negative ELBO of them."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from nvae.codec.chain import encode_block
from nvae.codec.coder import Stack
from nvae.codec.walk import PassSettings, Walk
from nvae.data.dataset import ImageBatch
from nvae.evaluation import EvaluationResult, evaluate

from .models import model_of

BITS = 4
BATCH = 40


def _model(log_sigma: float):
    model = model_of("nvae", likelihood="logistic_mixture", bits=BITS)
    with torch.no_grad():
        for group in model.groups:
            group.posterior.conv.bias[group.latent_channels :] = log_sigma
    return model


def _levels() -> torch.Tensor:
    digits = np.minimum(load_digits().images[:400], 15).astype(np.uint8)
    return torch.from_numpy(digits)[:, None]


def _evaluated(model, levels) -> EvaluationResult:
    x = levels / (2**BITS - 1)
    return evaluate(model, [ImageBatch(x, torch.arange(len(x)))], elbo_samples=2)


def test_net_size_of_passes_with_random_bits():
    """Posteriors are made narrow, so that latents carry more bits than pixels: lost ones cost."""
    model, levels = _model(-2.0), _levels()
    result = _evaluated(model, levels)
    assert result.kl.mean > result.reconstruction.mean
    walk = Walk(model, PassSettings(batch_size=BATCH))
    random = np.random.default_rng(0)
    bits = 0
    with walk.running():
        lattices, _ = walk.lattices(levels[:BATCH])
        for images in levels.split(BATCH):
            stack = Stack.holding(random.bytes(20_000))
            before = stack.bits
            walk.push(stack, images, lattices)
            bits += stack.bits - before
    nats = bits * math.log(2) / len(levels)
    assert nats == pytest.approx(result.negative_elbo.mean, rel=0.005)


def test_net_size_of_a_chain():
    model, levels = _model(-0.5), _levels()
    walk = Walk(model, PassSettings(batch_size=BATCH))
    with walk.running():
        _, size = encode_block(walk, levels)
    assert size.starters < 20
    nats = size.chain_bits * math.log(2) / (size.images - size.starters)
    chained = _evaluated(model, levels[size.starters :])
    assert nats == pytest.approx(chained.negative_elbo.mean, rel=0.01)
