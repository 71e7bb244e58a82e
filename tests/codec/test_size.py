"""The size of a chain is the model's negative ELBO of its images."""

import math

import numpy as np
import torch
from sklearn.datasets import load_digits

from nvae.codec.chain import encode_block
from nvae.codec.walk import PassSettings, Walk
from nvae.data.dataset import ImageBatch
from nvae.evaluation import evaluate

from .models import model_of

BITS = 4


def test_net_size_is_within_one_percent_of_the_negative_elbo():
    """After some steps of training, so that latents carry bits: wrong ones would cost."""
    digits = np.minimum(load_digits().images[:700], 15).astype(np.uint8)
    levels = torch.from_numpy(digits)[:, None]
    x = levels / (2**BITS - 1)
    model = model_of("nvae", likelihood="logistic_mixture", bits=BITS).train()
    optimizer = torch.optim.Adamax(model.parameters(), 1e-2)
    for step in range(60):
        batch = x[(step * 64) % 640 :][:64]
        output = model(batch)
        loss = output.kl_per_group.sum(1) - model.likelihood(output.logits).log_prob(batch)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
    model.eval()
    result = evaluate(model, [ImageBatch(x, torch.arange(len(x)))], elbo_samples=3)
    assert result.kl.mean > 3  # nats
    walk = Walk(model, PassSettings(batch_size=32))
    with walk.running():
        _, size = encode_block(walk, levels)
    net = size.chain_bits / (size.images - size.starters)
    assert net * math.log(2) / result.negative_elbo.mean < 1.01
    assert net * math.log(2) / result.negative_elbo.mean > 0.98
