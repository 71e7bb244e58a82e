"""Small models for tests of structure."""

import torch

from nvae.models import MODELS, NVAE, HierarchicalVAE, ModelConfig

from . import test_evdvae, test_vdvae

VERY_DEEP = {"vdvae": test_vdvae.config, "evdvae": test_evdvae.config}
"""Settings of small 8x8 networks, by family."""


def small_config(**overrides: object) -> ModelConfig:
    values: dict[str, object] = {
        "image_size": 16,
        "num_scales": 2,
        "groups_per_scale": 2,
        "preprocess_blocks": 1,
        "preprocess_cells": 1,
        "postprocess_cells": 1,
        "encoder_cells_per_group": 1,
        "decoder_cells_per_group": 1,
        "encoder_channels": 8,
        "decoder_channels": 8,
        "latent_channels": 3,
        "num_mixtures": 2,
    }
    return ModelConfig(**{**values, **overrides})  # type: ignore[arg-type]


def small_model(**overrides: object) -> NVAE:
    return NVAE(small_config(**overrides))


def small_very_deep(family: str, **overrides: object) -> HierarchicalVAE:
    """With weights such that every layer matters, in evaluation mode."""
    torch.manual_seed(0)
    model = MODELS[family](VERY_DEEP[family](**overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()
