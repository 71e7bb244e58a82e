"""Small networks that still have every part sampling touches."""

import torch

from nvae.models import NVAE, ModelConfig


def small_nvae(likelihood: str = "bernoulli", *, channels: int = 1, flows: int = 0) -> NVAE:
    """Two scales, three groups, random weights large enough that latents matter."""
    torch.manual_seed(0)
    model = NVAE(
        ModelConfig(
            image_size=8, image_channels=channels, likelihood=likelihood, bits=4,
            num_mixtures=2, num_scales=2, groups_per_scale=2, latent_channels=2,
            encoder_channels=4, decoder_channels=4, preprocess_blocks=1, preprocess_cells=1,
            postprocess_cells=1, encoder_cells_per_group=1, decoder_cells_per_group=1,
            num_flows=flows,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_gain"):
                parameter += 1.0
    return model.eval()
