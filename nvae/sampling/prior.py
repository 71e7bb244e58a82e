"""Images from the prior, each a function of its own seed."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from nvae.models import HierarchicalVAE, Temperature
from nvae.random import STREAM_PIXELS, STREAM_PRIOR, PixelNoise, image_keys, latent_noise

PixelTemperature = float | Literal["mean"]
"""Factor on the pixel noise, >= 0; 0 takes the likelihood's mode, ``"mean"`` its mean."""

Decode = Callable[[Sequence[Tensor], Temperature, Tensor | None], Tensor]
"""Noise of every group, temperature, and labels if any, to logits ``(B, K, H, W)``."""


def check_pixel_temperature(pixel_temperature: PixelTemperature) -> None:
    """Raise a ValueError unless it is ``"mean"`` or a finite number >= 0."""
    if pixel_temperature == "mean":
        return
    is_number = isinstance(pixel_temperature, numbers.Real)
    if not is_number or not 0 <= float(pixel_temperature) < math.inf:
        raise ValueError(
            f"pixel_temperature is {pixel_temperature!r}; allowed: mean, or a number >= 0"
        )


def scale_temperatures(model: HierarchicalVAE, per_scale: Sequence[float]) -> list[float]:
    """One temperature a group from one a scale; both coarsest first.

    Raises:
        ValueError: not as many temperatures as the model has scales, or one that is no number
            >= 0.
    """
    groups = model.groups_per_scale
    for each in per_scale:
        if not 0 <= each < math.inf:
            raise ValueError(f"scale_temperatures holds {each}; allowed: finite numbers >= 0")
    if len(per_scale) != len(groups):
        raise ValueError(
            f"{len(per_scale)} temperatures for {len(groups)} latent scales; give one a scale, "
            "coarsest first"
        )
    return [t for t, n in zip(per_scale, groups, strict=True) for _ in range(n)]


def seed_noise(model: HierarchicalVAE, seeds: Tensor) -> list[Tensor]:
    """The prior's noise for every seed ``(B,)``: one ``(B, L, h, w)`` a group, coarsest first."""
    keys = image_keys(seeds.to(model.device), seed=0, stream=STREAM_PRIOR)
    return latent_noise(keys, model.latent_shapes, model.dtype)


@torch.inference_mode()
def sample_images(
    model: HierarchicalVAE,
    seeds: Sequence[int] | Tensor,
    *,
    temperature: Temperature = 1.0,
    pixel_temperature: PixelTemperature = 1.0,
    labels: Sequence[int] | Tensor | None = None,
    guidance: float = 1.0,
    batch_size: int = 64,
    decode: Decode | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw images from the prior.

    Args:
        model: any mode; sampled in eval mode and left as it was.
        seeds: one an image, each in [-2^63, 2^63); an image depends on its seed only, whatever
            else is drawn.
        temperature: factor on the priors' sigma, >= 0; one number or one a group, coarsest first.
        pixel_temperature: factor on the pixel noise, or ``"mean"``.
        labels: classes ``(N,)``, one an image; None: drawn without.
        guidance: how closely to follow them; see :meth:`HierarchicalVAE.draw_state`.
        batch_size: images in one pass.
        decode: noise, temperature and labels to logits; None: ``model`` itself. A
            :class:`CompiledDecoder`, which has a guidance of its own, is faster where many batches
            are drawn.
        progress: called with the number of images just done.

    Returns:
        ``(N, C, H, W)`` in [0, 1], on the CPU.

    Raises:
        ValueError: no seeds, a temperature that is no number >= 0, or labels that are not one a
            seed.
        FloatingPointError: a picture is not made of finite numbers.
    """
    check_pixel_temperature(pixel_temperature)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    all_seeds = torch.as_tensor(seeds, dtype=torch.int64).flatten()
    if not len(all_seeds):
        raise ValueError("no seeds: give at least one")
    all_labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64).flatten()
    if all_labels is not None and len(all_labels) != len(all_seeds):
        raise ValueError(f"{len(all_labels)} labels for {len(all_seeds)} seeds; give one a seed")
    images = []
    with model.evaluating():
        for start in range(0, len(all_seeds), batch_size):
            batch = all_seeds[start : start + batch_size]
            own = None if all_labels is None else all_labels[start : start + batch_size]
            noise = seed_noise(model, batch)
            if decode is None:
                logits = model.sample_logits(
                    len(batch), temperature, noise, labels=own, guidance=guidance
                )
            else:
                logits = decode(noise, temperature, own)
            images.append(render(model, logits, batch, pixel_temperature).cpu())
            if progress is not None:
                progress(len(batch))
    return torch.cat(images)


def render(
    model: HierarchicalVAE, logits: Tensor, seeds: Tensor, pixel_temperature: PixelTemperature
) -> Tensor:
    """Images in [0, 1], ``(B, C, H, W)``, of logits ``(B, K, H, W)``.

    An image's pixel noise depends on its seed only; ``seeds`` are ``(B,)`` int64.

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
