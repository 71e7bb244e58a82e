"""Hierarchical VAEs: what every model is, and the models."""

from nvae.models.config import ModelConfig
from nvae.models.hierarchical import HierarchicalVAE, Output, Temperature
from nvae.models.nvae import NVAE
from nvae.registry import Registry

__all__ = ["MODELS", "NVAE", "HierarchicalVAE", "ModelConfig", "Output", "Temperature"]

MODELS: Registry[type[HierarchicalVAE]] = Registry("model", HierarchicalVAE, {"nvae": NVAE})
