"""The network: configuration, topology, cells, latent groups."""

from nvae.models.config import ModelConfig
from nvae.models.nvae import NVAE, NVAEOutput

__all__ = ["NVAE", "ModelConfig", "NVAEOutput"]
