"""Hierarchical VAEs: what every model is, and the models."""

from collections.abc import Iterable

from nvae.models.cells import CELL_FAMILIES
from nvae.models.config import ModelConfig
from nvae.models.evdvae import EVDVAE
from nvae.models.evdvae_config import EVDVAEConfig
from nvae.models.hierarchical import HierarchicalVAE, Temperature
from nvae.models.likelihoods import LIKELIHOODS, ImageConfig
from nvae.models.nvae import NVAE
from nvae.models.output import Output
from nvae.models.vdvae import VDVAE
from nvae.models.vdvae_config import VDVAEConfig
from nvae.settings import Registry

__all__ = [
    "EVDVAE",
    "MODELS",
    "NVAE",
    "VDVAE",
    "EVDVAEConfig",
    "HierarchicalVAE",
    "ImageConfig",
    "ModelConfig",
    "Output",
    "Temperature",
    "VDVAEConfig",
    "use_plugins",
]

MODELS: Registry[type[HierarchicalVAE]] = Registry(
    "architecture", HierarchicalVAE, {"nvae": NVAE, "vdvae": VDVAE, "evdvae": EVDVAE}
)


def use_plugins(names: Iterable[str]) -> None:
    """Let files name models, likelihoods and cell families that are not ours.

    Args:
        names: each ``package.module:Class``, imported here.

    Raises:
        ValueError: one cannot be imported, or is nothing that a file may name.
    """
    for name in names:
        if not any(registry.plug_in(name) for registry in (MODELS, LIKELIHOODS, CELL_FAMILIES)):
            raise ValueError(f"plugins={name} is no model, likelihood or cell family")
