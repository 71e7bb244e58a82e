"""From logits to images: the likelihood's mean, or a draw with one stream an image."""

import math
import numbers
from typing import Literal

import torch
from torch import Tensor

from nvae.models import HierarchicalVAE
from nvae.random import STREAM_PIXELS, PixelNoise, image_keys

PixelTemperature = float | Literal["mean"]


def check_pixel_temperature(pixel_temperature: PixelTemperature) -> None:
    """Raise a ValueError unless it is ``"mean"`` or a finite number >= 0."""
    if pixel_temperature == "mean":
        return
    is_number = isinstance(pixel_temperature, numbers.Real)
    if not is_number or not 0 <= float(pixel_temperature) < math.inf:
        raise ValueError(
            f"pixel_temperature is {pixel_temperature!r}; allowed: mean, or a number >= 0"
        )


def render(
    model: HierarchicalVAE, logits: Tensor, seeds: Tensor, pixel_temperature: PixelTemperature
) -> Tensor:
    """Images in [0, 1], ``(B, C, H, W)``.

    Args:
        model: gives the likelihood.
        logits: ``(B, K, H, W)``.
        seeds: ``(B,)`` int64; an image's pixel noise depends on its seed only.
        pixel_temperature: ``"mean"`` for the likelihood's mean, or the factor on the pixel noise;
            0 takes the mode.

    Raises:
        FloatingPointError: logits are not finite; the message names the seed.
    """
    finite = torch.isfinite(logits).flatten(1).all(1)
    if not finite.all():  # a draw from them would look like a picture
        seed = int(seeds[int(finite.logical_not().nonzero()[0])])
        raise FloatingPointError(
            f"the picture of seed {seed} is not made of finite numbers; the temperature may be too "
            "high for this model"
        )
    likelihood = model.likelihood(logits)
    if pixel_temperature == "mean":
        return likelihood.mean
    keys = image_keys(seeds.to(logits.device), seed=0, stream=STREAM_PIXELS)
    return likelihood.sample(float(pixel_temperature), PixelNoise(keys))
