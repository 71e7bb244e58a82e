"""What a likelihood p(x | z) is, and what a model's configuration says of its images.

A likelihood is one class: derive from :class:`PixelDistribution`, and name it as
``package.module:Class`` in the configuration, or in `nvae/models/__init__.py`. Images are in
[0, 1]; everything is computed in float32 at least.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from nvae.models.distributions import at_least_float32
from nvae.settings import (
    Bounds,
    Registry,
    Size,
    check_fields,
    height_width,
    plain_size,
    show_size,
)

MOST_BITS = 16
"""Of a pixel value."""

DATA_BITS = 8
"""Bits of the published data sets; the published forms of the likelihoods are for so many or
fewer."""

_LARGEST_SIDE = 4096


class PixelRandomness(Protocol):
    """Random numbers from elsewhere than a generator: one stream an image, say.

    Both methods give numbers of ``like``'s shape, type and device.
    """

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in (0, 1]."""
        ...

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal."""
        ...


Randomness = torch.Generator | PixelRandomness | None


@dataclass(frozen=True)
class ImageConfig:
    """What the configuration of every model says of its images; models derive theirs from it.

    Attributes:
        image_size: of the input in pixels (after padding): the side of a square, or height and
            width.
        image_channels: 1 for gray, 3 for color, or any other number.
        counted_size: of the central window that the likelihood counts; None: the whole image.
            MNIST padded from 28 to 32 counts 28.
        bits: bits of a pixel value, 1 to 16; the discretized likelihood has ``2**bits`` bins.
        likelihood: a name in :data:`LIKELIHOODS`, or ``package.module:Class``.
        num_mixtures: components of the logistic mixture, M.
        num_classes: K, of labels that condition the latents; 0: none.

    Raises:
        ValueError: one line that says which value or combination is impossible.
    """

    image_size: Size = 32
    image_channels: int = 1
    counted_size: Size | None = None
    bits: int = 8
    likelihood: str = "bernoulli"
    num_mixtures: int = 10
    num_classes: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "counted_size"):
            object.__setattr__(self, name, plain_size(getattr(self, name)))
        check_fields(self, "model.", **self.bounds())
        self.pixel_distribution.check(self)
        if self.counted_size is not None:
            whole, part = height_width(self.image_size), height_width(self.counted_size)
            borders = [a - b for a, b in zip(whole, part, strict=True)]
            if any(border < 0 or border % 2 for border in borders):
                raise ValueError(
                    f"model.counted_size={show_size(self.counted_size)} is no central window of "
                    f"image_size={show_size(self.image_size)}; the difference must be even and "
                    "not negative"
                )

    def check_divides(self, factor: int, why: str) -> None:
        """Raise a ValueError unless ``factor`` divides height and width.

        Args:
            factor: that the network divides the resolution by.
            why: what cannot be done otherwise, to follow the size in the message.
        """
        sides = height_width(self.image_size)
        if not any(side % factor for side in sides):
            return
        message = f"model.image_size={show_size(self.image_size)} {why}; "
        message += "it" if isinstance(self.image_size, int) else "each side"
        message += f" must be a multiple of {factor}"
        if factor <= _LARGEST_SIDE:
            nearest = [max(1, (side + factor // 2) // factor) * factor for side in sides]
            message += f", the nearest is {show_size(plain_size(nearest))}"
        raise ValueError(message)

    @classmethod
    def bounds(cls) -> dict[str, Bounds]:
        """Least and greatest value of the numbers.

        Far beyond any network in use: what lies outside is a slip or an attack.
        """
        return {
            "image_size": (1, _LARGEST_SIDE), "image_channels": (1, 1024),
            "counted_size": (1, _LARGEST_SIDE), "bits": (1, MOST_BITS), "num_mixtures": (1, 1000),
            "num_classes": (0, 100_000),
        }  # fmt: skip

    @property
    def pixel_distribution(self) -> "type[PixelDistribution]":
        """The class that :attr:`likelihood` names; a model may have a form of its own of one."""
        return LIKELIHOODS[self.likelihood]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        return self.image_channels, *height_width(self.image_size)

    @property
    def counted_window(self) -> tuple[slice, slice]:
        """Rows and columns that the likelihood counts."""
        return counted_window(height_width(self.image_size), self.counted_size)

    @property
    def counted_pixels(self) -> int:
        """Dimensions that bits/dim divides by: C * H * W of the counted window."""
        counted = self.image_size if self.counted_size is None else self.counted_size
        return self.image_channels * math.prod(height_width(counted))

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for a checkpoint or JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`, for values that a file holds: nothing is imported for them.

        Raises:
            ValueError: an unknown key or an impossible value, named in one line.
        """
        unknown = sorted(map(str, set(values) - {f.name for f in fields(cls)}))
        if unknown:
            raise ValueError(f"unknown model setting(s): {', '.join(unknown)}")
        if "likelihood" in values:
            LIKELIHOODS.check_known(values["likelihood"])
        return cls(**values)


class PixelDistribution(ABC):
    """A distribution over images ``(B, C, H, W)`` in [0, 1].

    Args:
        logits: its parameters, ``(B, K, H, W)``, in float32 at least.
        config: of the model.
    """

    title: ClassVar[str]
    """What people call it."""
    density_of: ClassVar[str] = ""
    """What :meth:`log_prob` is a density of, such as ``2x - 1``; empty: it is a mass."""

    @abstractmethod
    def __init__(self, logits: Tensor, config: ImageConfig) -> None: ...

    @classmethod
    @abstractmethod
    def logit_channels(cls, config: ImageConfig) -> int:
        """Channels of the image head, K."""

    @classmethod
    def check(cls, config: ImageConfig) -> None:
        """Raise a ValueError where the model's channels or bits are not for this likelihood."""
        del config

    @classmethod
    def check_data(cls, config: ImageConfig, bits: int) -> None:
        """Raise a ValueError where images of ``2**bits`` gray levels are not for this model."""
        del config, bits

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """A point estimate of the image, ``(B, C, H, W)``."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x | z) over the counted pixels, ``(B,)``, in nats."""

    def pixel_log_prob(self, x: Tensor) -> Tensor:
        """log p(x | z) of every pixel, counted or not, in nats: what :meth:`log_prob` adds up.

        Of every channel, ``(B, C, H, W)``, or of all channels together, ``(B, 1, H, W)``.

        Raises:
            ValueError: this likelihood does not tell.
        """
        raise ValueError(
            f"{type(self).__name__} has no pixel_log_prob, which maps of the likelihood need"
        )

    @abstractmethod
    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """One image per row; temperature (>= 0) narrows the pixel noise, 0 takes the mode."""


def counted_window(whole: tuple[int, int], counted_size: Size | None) -> tuple[slice, slice]:
    """Rows and columns that the likelihood counts, of images of ``whole`` height and width."""
    part = whole if counted_size is None else height_width(counted_size)
    rows, columns = (
        slice((a - b) // 2, (a - b) // 2 + b) for a, b in zip(whole, part, strict=True)
    )
    return rows, columns


def sum_counted(log_prob: Tensor, counted_size: Size | None) -> Tensor:
    """Sum ``(B, C, H, W)`` over the central window of ``counted_size``, to ``(B,)``."""
    if counted_size is not None:
        height, width = log_prob.shape[-2:]
        rows, columns = counted_window((height, width), counted_size)
        log_prob = log_prob[..., rows, columns]
    return log_prob.flatten(1).sum(1)


def check_temperature(temperature: float) -> None:
    """Raise a ValueError for a pixel temperature below 0."""
    if not temperature >= 0:
        raise ValueError(f"pixel temperature is {temperature}; it must be 0 or more")


def draw_uniform(like: Tensor, generator: Randomness) -> Tensor:
    """Uniform in the open interval (0, 1), of ``like``'s shape, type and device."""
    if generator is None or isinstance(generator, torch.Generator):
        u = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    else:
        u = generator.uniform(like)
    return u.clamp(1e-7, 1 - 1e-7)  # float32 can draw exact zeros


def draw_normal(like: Tensor, generator: Randomness) -> Tensor:
    """Standard normal, of ``like``'s shape, type and device."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return generator.normal(like)


LIKELIHOODS: Registry[type[PixelDistribution]] = Registry("model.likelihood", PixelDistribution)
"""By name; :mod:`nvae.models` enters ours."""


def logit_channels(config: ImageConfig) -> int:
    """Channels of the image head, K."""
    return config.pixel_distribution.logit_channels(config)


def build_likelihood(config: ImageConfig, logits: Tensor) -> PixelDistribution:
    """The distribution that ``config`` names, over ``logits`` ``(B, K, H, W)``."""
    return config.pixel_distribution(at_least_float32(logits), config)
