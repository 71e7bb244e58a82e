"""Small models of every family and likelihood, and images for them."""

import copy
from typing import Any

import torch
from torch import Tensor

from nvae.codec.codec import Codec
from nvae.codec.pixels import level_type
from nvae.models import EVDVAE, VDVAE, HierarchicalVAE
from tests.models import test_evdvae, test_vdvae
from tests.models.small import small_model


def model_of(family: str, **changes: Any) -> HierarchicalVAE:
    """With weights that make posteriors differ from priors, in every group."""
    torch.manual_seed(0)
    if family == "nvae":
        model: HierarchicalVAE = small_model(**{"image_size": 8, **changes})
    elif family == "vdvae":
        model = VDVAE(test_vdvae.config(**changes))
    else:
        model = EVDVAE(test_evdvae.config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def images_for(codec: Codec, count: int) -> Tensor:
    """Smooth gray levels with some noise, over the whole range."""
    generator = torch.Generator().manual_seed(count)
    channels, height, width = codec.image_shape
    white = 2**codec.bits - 1
    start = torch.rand(count, channels, 1, 1, generator=generator)
    slope = torch.rand(count, 1, 1, 1, generator=generator) * torch.linspace(-1, 1, width)
    noise = 0.1 * torch.randn(count, channels, height, width, generator=generator)
    x = (start + slope + noise).clamp(0, 1)
    return (white * x).round().to(level_type(codec.bits))


def flipped(data: bytes, position: int) -> bytes:
    """One bit is another."""
    changed = bytearray(data)
    changed[position] ^= 0x10
    return bytes(changed)


def nudged(model: HierarchicalVAE) -> HierarchicalVAE:
    """The same model with one weight that is larger by 1e-6."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0].add_(1e-6)
    return other
