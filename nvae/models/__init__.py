"""Hierarchical VAEs: what every model is, and the models."""

from collections.abc import Iterable
from typing import Any

from nvae.models.cells import CELL_FAMILIES
from nvae.models.config import ModelConfig
from nvae.models.evdvae import EVDVAE
from nvae.models.evdvae_config import EVDVAEConfig
from nvae.models.hierarchical import HierarchicalVAE, Temperature
from nvae.models.likelihoods import Bernoulli, NormalPixels
from nvae.models.logistic_mixture import LogisticMixture
from nvae.models.nvae import NVAE
from nvae.models.output import Output
from nvae.models.pixel_distribution import LIKELIHOODS, ImageConfig
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
    "plugins_of",
    "use_plugins",
]

MODELS: Registry[type[HierarchicalVAE]] = Registry(
    "architecture", HierarchicalVAE, {"nvae": NVAE, "vdvae": VDVAE, "evdvae": EVDVAE}
)

LIKELIHOODS.add(bernoulli=Bernoulli, logistic_mixture=LogisticMixture, normal=NormalPixels)

_NAMED_BY_FILES: tuple[Registry[Any], ...] = (MODELS, LIKELIHOODS, CELL_FAMILIES)


def use_plugins(names: Iterable[str]) -> None:
    """Let files name models, likelihoods and cell families that are not ours.

    Args:
        names: each ``package.module:Class``, imported here.

    Raises:
        ValueError: one cannot be imported, or is nothing that a file may name.
    """
    for name in names:
        if not any(registry.plug_in(name) for registry in _NAMED_BY_FILES):
            raise ValueError(f"plugins={name} is no model, likelihood or cell family")


def plugins_of(model: HierarchicalVAE) -> list[str]:
    """What :func:`use_plugins` must be given before a file of ``model`` is read.

    Returns:
        The ``package.module:Class`` of its class, likelihood and cells, as far as they are not
        ours.
    """
    words = {MODELS.name_of(type(model)), *map(str, model.config.to_dict().values())}
    known = {name for registry in _NAMED_BY_FILES for name in registry}
    return sorted(word for word in words & known if ":" in word)
