"""The sampler as a `torch.export` program or machine code: noise and temperature in, images out.

Either needs torch and nothing of this package. Randomness stays outside: it is a pure
function of its inputs, so the caller decides where noise comes from.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nvae.models import HierarchicalVAE
from nvae.sampling.compiled import PriorDecoder, for_inductor, machine_code
from nvae.sampling.prior import PixelTemperature, check_pixel_temperature

TOLERANCE = 1e-5
MOST_FLIPPED = 1e-4
"""Share of drawn pixels that may differ: rounding can tip a random number across its threshold."""

_EXAMPLE_BATCH = 2  # torch.export takes 0 and 1 for constants
LARGEST_BATCH = 1 << 16


@dataclass(frozen=True)
class PixelInput:
    """One tensor of pixel noise: uniform in (0, 1] or standard normal, ``(C', H, W)`` an image."""

    distribution: Literal["uniform", "normal"]
    shape: tuple[int, ...]

    def draw(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise for ``batch`` images, ``(B, C', H, W)``."""
        make = torch.rand if self.distribution == "uniform" else torch.randn
        return make(batch, *self.shape, generator=generator)


class _Recorder:
    """Pixel randomness that notes what a likelihood asks for."""

    def __init__(self) -> None:
        self.inputs: list[PixelInput] = []

    def uniform(self, like: Tensor) -> Tensor:
        self.inputs.append(PixelInput("uniform", tuple(like.shape[1:])))
        return torch.full_like(like, 0.5)

    def normal(self, like: Tensor) -> Tensor:
        self.inputs.append(PixelInput("normal", tuple(like.shape[1:])))
        return torch.zeros_like(like)


class _Given:
    """Pixel randomness that hands out given tensors in order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = iter(tensors)

    def uniform(self, like: Tensor) -> Tensor:
        return next(self._tensors)

    normal = uniform


class Sampler(nn.Module):
    """A copy of the half of a model that makes images, as a function of noise.

    With ``pixel_temperature="mean"`` it gives the likelihood's mean, else a draw with this factor
    on the pixel noise.
    """

    def __init__(
        self, model: HierarchicalVAE, pixel_temperature: PixelTemperature = "mean"
    ) -> None:
        super().__init__()
        check_pixel_temperature(pixel_temperature)
        self.pixel_temperature = pixel_temperature
        # torch.export.save takes channels_last weights for parts of a larger tensor and warns
        decoder = PriorDecoder(model, stands_alone=True)
        self.decoder = decoder.to(memory_format=torch.contiguous_format)
        self.pixel_inputs = self._record_pixel_inputs()

    @property
    def model(self) -> HierarchicalVAE:
        """The decoding half."""
        return self.decoder.model

    def forward(
        self, noise: Sequence[Tensor], temperature: Tensor, pixel_noise: Sequence[Tensor]
    ) -> Tensor:
        """Images in [0, 1], ``(B, C, H, W)``.

        Args:
            noise: standard normal, one ``(B, L, h, w)`` a group, coarsest first.
            temperature: ``(G,)``, factor on every group's sigma, >= 0.
            pixel_noise: as ``pixel_inputs`` says; empty for the mean.
        """
        likelihood = self.model.likelihood(self.decoder(noise, temperature))
        if self.pixel_temperature == "mean":
            return likelihood.mean
        return likelihood.sample(float(self.pixel_temperature), _Given(pixel_noise))

    def example(self, batch: int, seed: int = 0) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Arguments of :meth:`forward` for ``batch`` images."""
        noise, temperature = self.decoder.example(batch, seed)
        generator = torch.Generator().manual_seed(seed)
        pixel_noise = [
            each.draw(batch, generator).to(temperature.device) for each in self.pixel_inputs
        ]
        return noise, temperature, pixel_noise

    @torch.no_grad()
    def _record_pixel_inputs(self) -> tuple[PixelInput, ...]:
        if self.pixel_temperature == "mean":
            return ()
        recorder = _Recorder()
        logits = self.decoder(*self.decoder.example(1))
        self.model.likelihood(logits).sample(1.0, recorder)
        return tuple(recorder.inputs)


def export_sampler(sampler: Sampler) -> ExportedProgram:
    """Trace the sampler for batches of any size.

    The result's ``module()`` takes what :meth:`Sampler.forward` takes.

    Raises:
        ValueError: the model cannot be traced, or only for one batch size.
    """
    batch = Dim("batch", min=1, max=LARGEST_BATCH)
    arguments = sampler.example(_EXAMPLE_BATCH)
    noise, _, pixel_noise = arguments
    shapes = ([{0: batch}] * len(noise), None, [{0: batch}] * len(pixel_noise))
    try:
        with torch.no_grad():
            program = torch.export.export(sampler.eval(), arguments, dynamic_shapes=shapes)
    except (RuntimeError, ValueError) as error:  # a model from elsewhere
        raise ValueError(f"the model cannot be traced for batches of any size: {error}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of the machine that exported
    return program


def compile_sampler(sampler: Sampler, batch: int) -> bytes:
    """The sampler as machine code for ``batch`` images at a time; see :func:`machine_code`.

    Raises:
        CompilerError: no working C++ compiler.
    """
    fast = copy.deepcopy(sampler)
    fast.decoder = for_inductor(sampler.decoder)
    return machine_code(fast, fast.example(batch))


@torch.no_grad()
def largest_difference(
    sampler: Sampler, run: Callable[..., Tensor], batches: Sequence[int] = (1, 3)
) -> float:
    """Largest difference of a pixel between ``run`` and the eager sampler, at some batch sizes.

    With drawn pixels, of all but the share ``MOST_FLIPPED``. ``run`` takes what
    :meth:`Sampler.forward` takes.

    Raises:
        FloatingPointError: a picture is not made of finite numbers.
    """
    worst = 0.0
    for batch in batches:
        arguments = sampler.example(batch, seed=batch)
        found, expected = run(*arguments), sampler(*arguments)
        for what, images in (("model", expected), ("program", found)):
            if not torch.isfinite(images).all():
                raise FloatingPointError(
                    f"the {what}'s pictures are not made of finite numbers; nothing was written"
                )
        difference = (found - expected).abs().flatten()
        flipped = int(MOST_FLIPPED * len(difference)) if sampler.pixel_inputs else 0
        worst = max(worst, float(difference.sort(descending=True).values[flipped]))
    return worst


def describe_sampler(sampler: Sampler) -> dict[str, Any]:
    """The program's inputs and output, for JSON; ``B`` is any batch size."""
    return {
        "noise": [["B", *shape] for shape in sampler.model.latent_shapes],
        "temperature": [sampler.model.num_groups],
        "pixel_temperature": sampler.pixel_temperature,
        "pixel_noise": [
            {"distribution": each.distribution, "shape": ["B", *each.shape]}
            for each in sampler.pixel_inputs
        ],
        "image": ["B", *sampler.model.config.image_shape],
    }
