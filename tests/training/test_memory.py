"""The estimate against what real tensors take."""

from functools import partial

import pytest
import torch

from nvae.models import NVAE, ModelConfig
from nvae.training.memory import activation_bytes, estimate_memory

CONFIG = ModelConfig(
    image_size=16, image_channels=3, likelihood="logistic_mixture", num_mixtures=3, num_scales=2,
    groups_per_scale=2, preprocess_blocks=1, preprocess_cells=2, postprocess_cells=2,
    encoder_channels=8, decoder_channels=8, latent_channels=4, num_flows=1,
)  # fmt: skip
BUILD = partial(NVAE, CONFIG)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_traced_activations_are_the_real_ones(precision: str) -> None:
    """Shapes without storage keep what real tensors keep, in both precisions."""
    torch.manual_seed(0)
    real, real_inputs, real_cells = activation_bytes(NVAE(CONFIG), 3, precision)
    estimate = estimate_memory(BUILD, 3, precision=precision)
    recomputed = estimate_memory(BUILD, 3, precision=precision, checkpoint_cells=True)
    assert estimate.activations == pytest.approx(real, rel=0.02)
    assert recomputed.activations == pytest.approx(real_inputs, rel=0.02)
    assert recomputed.largest_cell == pytest.approx(max(real_cells), rel=0.02)
    assert recomputed.total < estimate.total


def test_activations_grow_with_the_batch_and_weights_do_not() -> None:
    one, four = estimate_memory(BUILD, 1), estimate_memory(BUILD, 4)
    assert 3 < four.activations / one.activations <= 4.01
    assert one.weights == four.weights
    parameters = sum(p.numel() for p in NVAE(CONFIG).parameters())
    assert one.gradients == 4 * parameters
    assert one.optimizer == 8 * parameters


def test_half_precision_takes_less() -> None:
    full = estimate_memory(BUILD, 4)
    half = estimate_memory(BUILD, 4, precision="bf16-mixed")
    assert half.activations < 0.8 * full.activations
