"""Small models for tests of structure."""

from nvae.models import NVAE, ModelConfig


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
