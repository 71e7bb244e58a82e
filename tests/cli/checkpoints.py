"""A checkpoint small enough to sample and evaluate in a test."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nvae.checkpoint import save_model
from nvae.data import DataConfig
from nvae.models import NVAE, ModelConfig

DATA = DataConfig(
    name="random", format="random", image_size=8, channels=1, bits=4,
    likelihood="logistic_mixture", train_size=24, valid_size=4, test_size=12, eval_batch_size=5,
)  # fmt: skip


def write_checkpoint(path: Path, *, with_data: bool = True, **images: Any) -> Path:
    """``images`` are settings of the data in place of those above."""
    data = replace(DATA, **images)
    torch.manual_seed(0)
    model = NVAE(
        ModelConfig(
            image_size=data.image_size, image_channels=data.channels, bits=data.bits,
            likelihood=data.likelihood, num_mixtures=2, num_scales=2,
            groups_per_scale=2, latent_channels=2, encoder_channels=4, decoder_channels=4,
            preprocess_blocks=0, preprocess_cells=1, postprocess_cells=1,
            encoder_cells_per_group=1, decoder_cells_per_group=1,
        )
    )  # fmt: skip
    save_model(model, path, {"data": asdict(data)} if with_data else None)
    return path
