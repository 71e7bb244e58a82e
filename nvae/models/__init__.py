"""The network: configuration, topology, cells, latent groups."""

from nvae.models.config import ModelConfig
from nvae.models.hierarchical import HierarchicalVAE, Output, Temperature
from nvae.models.nvae import NVAE

__all__ = ["NVAE", "HierarchicalVAE", "ModelConfig", "Output", "Temperature"]
