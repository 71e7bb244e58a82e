"""Images from a trained model: prior samples, reconstructions, paths through latent space."""

from nvae.sampling.compiled import CompiledDecoder
from nvae.sampling.latents import (
    Latents,
    concatenate,
    decode,
    encode,
    from_noise,
    interpolate,
    prior_latents,
    resample_finer,
    slerp,
    traverse,
)
from nvae.sampling.prior import Decode, PixelTemperature, sample_images, scale_temperatures

__all__ = [
    "CompiledDecoder",
    "Decode",
    "Latents",
    "PixelTemperature",
    "concatenate",
    "decode",
    "encode",
    "from_noise",
    "interpolate",
    "prior_latents",
    "resample_finer",
    "sample_images",
    "scale_temperatures",
    "slerp",
    "traverse",
]
