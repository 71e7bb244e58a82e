"""One pass of images through the model onto the stack and back.

Encoding walks down once, from the coarsest group to the finest: every z is popped from its
posterior, then the pixels are pushed, then all z under their priors, the finest first. Decoding
walks down once without the image, popping each z under its prior, pops the pixels, and walks down
once more with the image, to give back the bits that the posteriors took.

Models that know classes are run without labels: what they code is p(x), and no label is stored.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nvae.codec.coder import Stack
from nvae.codec.latents import Lattice, bits_to_draw, fitting
from nvae.codec.pixels import (
    bits_a_pixel,
    check_codable,
    coded_shape,
    pop_pixels,
    push_pixels,
)
from nvae.models import HierarchicalVAE
from nvae.models.distributions import Normal
from nvae.models.folding import forget
from nvae.models.output import GroupSample
from nvae.models.stable_mixture import DATA_BITS, StableLogisticMixture
from nvae.random import latent_noise
from nvae.settings import check_choice, check_fields

MOST_IN_BATCH = 4096
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class PassSettings:
    """What the bits of a model's output may depend on, beside weights, software and processor.

    Attributes:
        batch_size: rows of every pass; those that no image takes are zeros.
        threads: of the processor.
        precision: ``float32`` or ``float64``.

    Raises:
        ValueError: one is impossible.
    """

    batch_size: int = 16
    threads: int = 1
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_fields(self, "", batch_size=(1, MOST_IN_BATCH), threads=(1, 256))
        check_choice("precision", self.precision, PRECISIONS)


def check_model(model: HierarchicalVAE) -> None:
    """Raise a ValueError for a model whose images cannot be coded."""
    check_codable(model.config)
    if getattr(model.config, "num_flows", 0):
        raise ValueError(
            f"model.num_flows={model.config.num_flows}: the posterior's flows move latents off the "  # type: ignore[attr-defined]
            "lattice that they are coded on; compression takes models with num_flows=0"
        )
    if "choose" not in inspect.signature(model.top_down).parameters:
        raise ValueError(
            f"{type(model).__name__}.top_down takes no choose=, which compression needs; "
            "see HierarchicalVAE.top_down"
        )


class Walk:
    """A copy of a model that computes the same bits every time.

    On the CPU, in evaluation mode, with one memory layout, batch size and number of threads,
    whatever the model's are.

    Args:
        model: whose images are coded.
        settings: see there.

    Attributes:
        image_shape: ``(C, h, w)`` of what is coded of an image.
        bits: of a gray level.

    Raises:
        ValueError: its images cannot be coded.
    """

    def __init__(self, model: HierarchicalVAE, settings: PassSettings) -> None:
        check_model(model)
        own = copy.deepcopy(model).to("cpu", PRECISIONS[settings.precision])
        own.requires_grad_(False)
        own.choose_kernels("reference")
        self.model = own.to(memory_format=torch.channels_last).eval()
        self.settings, self.config = settings, model.config
        self.image_shape = coded_shape(self.config)
        self.bits = bits_a_pixel(self.config)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around all passes: the number of threads, no gradients."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads)
        forget(self.model)  # folded weights belong to a number of threads too
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(threads)

    def input(self, levels: Tensor) -> Tensor:
        """Gray levels ``(n, C, h, w)`` to what the model reads, a whole batch.

        The border around the counted window is black, as data sets are padded.
        """
        config = self.config
        batch = self.settings.batch_size
        padded = torch.zeros(batch, *config.image_shape, dtype=self.model.dtype)
        padded[: len(levels), :, *config.counted_window] = levels.to(self.model.dtype)
        white = float(2**self.bits - 1)
        if issubclass(config.pixel_distribution, StableLogisticMixture):
            form = config.logistics  # type: ignore[attr-defined]
            if form.published:  # 8-bit values whose low bits are zero
                white = 255 / 2 ** (DATA_BITS - config.bits)
        return (padded / white).to(memory_format=torch.channels_last)

    def lattices(self, levels: Tensor) -> tuple[list[Lattice], float]:
        """Lattices for images like these, n at most a batch, and the bits that a draw takes."""
        x = self.input(levels)
        keys = torch.arange(len(x))
        noise = latent_noise(keys, self.model.latent_shapes, self.model.dtype)
        _, groups = self.model.top_down(noise, encoder_maps=self.model.encode(x))
        some = [_rows(group, len(levels)) for group in groups]
        lattices = fitting(some)
        return lattices, float(bits_to_draw(some, lattices).max())

    def push(self, stack: Stack, levels: Tensor, lattices: Sequence[Lattice]) -> None:
        """Code images ``(n, C, h, w)``, n at most a batch.

        Raises:
            EmptyStackError: the stack has too few bits for n draws.
        """
        n = len(levels)
        popped: list[Tensor] = []

        def draw(group: int, prior: Normal, posterior: Normal | None) -> Tensor:
            assert posterior is not None
            lattice = lattices[group]
            popped.append(lattice.pop_posterior(stack, _first(prior, n), _first(posterior, n)))
            return lattice.z(self._padded(popped[-1]), prior)

        maps = self.model.encode(self.input(levels))
        state, _ = self.model.top_down(self._noise, encoder_maps=maps, choose=draw)
        push_pixels(stack, self.config, self.model.decode_state(state)[:n], levels)
        for lattice, k in zip(reversed(lattices), reversed(popped), strict=True):
            lattice.push_prior(stack, k)

    def pop(self, stack: Stack, n: int, lattices: Sequence[Lattice]) -> Tensor:
        """Inverse of :meth:`push`: the images."""
        popped: list[Tensor] = []
        taken: list[tuple[Normal, Normal]] = []

        def draw(group: int, prior: Normal, _: Normal | None) -> Tensor:
            popped.append(lattices[group].pop_prior(stack, prior.mean[:n]))
            return lattices[group].z(self._padded(popped[-1]), prior)

        def repeat(group: int, prior: Normal, posterior: Normal | None) -> Tensor:
            assert posterior is not None
            taken.append((_first(prior, n), _first(posterior, n)))
            return lattices[group].z(self._padded(popped[group]), prior)

        state, _ = self.model.top_down(self._noise, choose=draw)
        levels = pop_pixels(stack, self.config, self.model.decode_state(state)[:n])
        maps = self.model.encode(self.input(levels))
        self.model.top_down(self._noise, encoder_maps=maps, choose=repeat)
        for lattice, k, pair in reversed(list(zip(lattices, popped, taken, strict=True))):
            lattice.push_posterior(stack, k, *pair)
        return levels

    @property
    def _noise(self) -> list[Tensor]:
        """Nobody reads its values."""
        shapes = self.model.noise_shapes(self.settings.batch_size)
        return [torch.zeros((), dtype=self.model.dtype).expand(shape) for shape in shapes]

    def _padded(self, k: Tensor) -> Tensor:
        """Rows that no image takes are the prior's mean."""
        missing = self.settings.batch_size - len(k)
        return torch.cat([k, k.new_zeros(missing, *k.shape[1:])]) if missing else k


def _first(distribution: Normal, n: int) -> Normal:
    return Normal(distribution.mean[:n], distribution.sigma[:n])


def _rows(group: GroupSample, n: int) -> GroupSample:
    assert group.posterior is not None
    return GroupSample(group.z[:n], _first(group.prior, n), _first(group.posterior, n))
