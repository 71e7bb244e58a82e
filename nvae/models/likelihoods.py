"""Pixel distributions p(x | z): what the decoder's logits mean.

A likelihood is one class: derive from :class:`PixelDistribution`, and name it in
:data:`LIKELIHOODS`, or as ``package.module:Class`` in the configuration. Images are in [0, 1];
everything is computed in float32 at least.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.models.distributions import Normal, at_least_float32
from nvae.settings import Bounds, Registry, check_fields

LOG_SCALE_FLOOR = -7.0
TINY_MASS = 1e-5


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
        image_size: side of the square input in pixels (after padding).
        image_channels: 1 for gray, 3 for color.
        counted_size: side of the central window that the likelihood counts; None: the whole image.
            MNIST padded from 28 to 32 counts 28.
        bits: bits of a pixel value, 1 to 8; the discretized likelihood has ``2**bits`` bins.
        likelihood: a name in :data:`LIKELIHOODS`, or ``package.module:Class``.
        num_mixtures: components of the logistic mixture, M.
        num_classes: K, of labels that condition the latents; 0: none.

    Raises:
        ValueError: one line that says which value or combination is impossible.
    """

    image_size: int = 32
    image_channels: int = 1
    counted_size: int | None = None
    bits: int = 8
    likelihood: str = "bernoulli"
    num_mixtures: int = 10
    num_classes: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "model.", **self.bounds())
        self.pixel_distribution.check(self)
        if self.counted_size is not None:
            border = self.image_size - self.counted_size
            if border < 0 or border % 2:
                raise ValueError(
                    f"model.counted_size={self.counted_size} is no central window of "
                    f"image_size={self.image_size}; the difference must be even and not negative"
                )

    @classmethod
    def bounds(cls) -> dict[str, Bounds]:
        """Least and greatest value of the numbers.

        Far beyond any network in use: what lies outside is a slip or an attack.
        """
        return {
            "image_size": (1, 4096), "image_channels": (1, 1024), "counted_size": (1, 4096),
            "bits": (1, 8), "num_mixtures": (1, 1000), "num_classes": (0, 100_000),
        }  # fmt: skip

    @property
    def pixel_distribution(self) -> "type[PixelDistribution]":
        """The class that :attr:`likelihood` names; a model may have a form of its own of one."""
        return LIKELIHOODS[self.likelihood]

    @property
    def counted_pixels(self) -> int:
        """Dimensions that bits/dim divides by: C * H * W of the counted window."""
        side = self.image_size if self.counted_size is None else self.counted_size
        return self.image_channels * side * side

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

    @abstractmethod
    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """One image per row; temperature (>= 0) narrows the pixel noise, 0 takes the mode."""


def sum_counted(log_prob: Tensor, counted_size: int | None) -> Tensor:
    """Sum ``(B, C, H, W)`` over the central square of side ``counted_size``, to ``(B,)``."""
    if counted_size is not None:
        border = (log_prob.shape[-1] - counted_size) // 2
        inside = slice(border, border + counted_size)
        log_prob = log_prob[..., inside, inside]
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


class Bernoulli(PixelDistribution):
    """Independent binary pixels with the given log-odds ``(B, C, H, W)``."""

    title = "Bernoulli"

    def __init__(self, logits: Tensor, config: ImageConfig) -> None:
        self.logits = logits
        self.counted_size = config.counted_size

    @classmethod
    def logit_channels(cls, config: ImageConfig) -> int:
        """One for every channel of the image."""
        return config.image_channels

    @classmethod
    def check_data(cls, config: ImageConfig, bits: int) -> None:
        """Black and white images only."""
        if bits != 1:
            raise ValueError(
                f"model.likelihood=bernoulli needs black and white pixels, data.bits={bits}; "
                "set data.bits=1 or use likelihood=logistic_mixture or normal"
            )

    @property
    def mean(self) -> Tensor:
        """P(x = 1)."""
        return torch.sigmoid(self.logits)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B,)`` nats; ``x`` is 0 or 1."""
        x = x.to(self.logits.dtype)
        loss = F.binary_cross_entropy_with_logits(self.logits, x, reduction="none")
        return -sum_counted(loss, self.counted_size)

    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """Draw 0/1 pixels; temperature divides the log-odds."""
        check_temperature(temperature)
        u = draw_uniform(self.logits, generator)
        # x = 1 where logit > t * logistic noise, which is P = sigmoid(logit / t)
        return (self.logits > temperature * torch.logit(u)).to(self.logits.dtype)


class NormalPixels(PixelDistribution):
    """Independent Normals over 2x - 1, not discretized; logits are means and log-sigmas.

    The density is that of 2x - 1, as published: per dimension log 2 nats below that of x.
    """

    title = "Normal"

    def __init__(self, logits: Tensor, config: ImageConfig) -> None:
        mean, log_sigma = logits.chunk(2, dim=1)
        self.normal = Normal.from_parameters(mean, log_sigma)
        self.counted_size = config.counted_size

    @classmethod
    def logit_channels(cls, config: ImageConfig) -> int:
        """Mean and log-sigma of every channel."""
        return 2 * config.image_channels

    @property
    def mean(self) -> Tensor:
        """Mean, clipped to [0, 1]."""
        return self._to_image(self.normal.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B,)`` nats of density."""
        return sum_counted(self.normal.log_prob(2 * x - 1), self.counted_size)

    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """Draw; temperature multiplies sigma."""
        check_temperature(temperature)
        mean = self.normal.mean
        noise = draw_normal(mean, generator)
        return self._to_image(mean + temperature * self.normal.sigma * noise)

    @staticmethod
    def _to_image(pixels: Tensor) -> Tensor:
        return ((pixels + 1) / 2).clamp(0, 1)


class LogisticMixture(PixelDistribution):
    """Mixture of discretized logistics (PixelCNN++, Salimans et al. 2017, section 2).

    Per pixel, M components share one mixture weight across the color channels; green's mean
    moves with red, blue's with red and green. The pixel's value is the logistic's mass on its
    bin of width 2 / (2^bits - 1) in [-1, 1].

    Logits are M mixture logits, then for each channel M means, M log-scales and, for color, M
    coefficients: ``10 M`` channels for color, ``3 M`` for gray.

    As published, a value above 0.99 takes the whole upper tail. With 8 bits that includes 254 as
    well as 255; with fewer bits only the last bin, and the masses sum to 1.
    """

    title = "mixture of discretized logistics"
    brightest = 1.0
    """Largest value of a draw, in [-1, 1]."""
    white = 1.0
    """Value in [-1, 1] that an image shows as 1."""

    def __init__(self, logits: Tensor, config: ImageConfig) -> None:
        self.levels = 2**config.bits - 1
        self.counted_size = config.counted_size
        channels, mixtures = config.image_channels, config.num_mixtures
        self.mixture_logits = logits[:, :mixtures]  # (B, M, H, W)
        parameters = logits[:, mixtures:].unflatten(1, (channels, -1, mixtures))
        self.means = parameters[:, :, 0]  # (B, C, M, H, W)
        self.log_scales = parameters[:, :, 1].clamp(min=LOG_SCALE_FLOOR)
        self.coefficients = torch.tanh(parameters[:, :, 2]) if channels == 3 else None

    @classmethod
    def logit_channels(cls, config: ImageConfig) -> int:
        """Of every component: its weight, and the parameters of every channel."""
        return config.num_mixtures * (10 if config.image_channels == 3 else 3)

    @classmethod
    def check(cls, config: ImageConfig) -> None:
        """Gray and color only."""
        if config.image_channels not in (1, 3):
            raise ValueError(
                f"model.likelihood=logistic_mixture models 1 or 3 image channels, not "
                f"{config.image_channels}; likelihood=normal takes any number"
            )

    @classmethod
    def check_data(cls, config: ImageConfig, bits: int) -> None:
        """As many bits as the model's bins."""
        if bits != config.bits:
            raise ValueError(
                f"model.bits={config.bits} does not fit data.bits={bits}; "
                "set data.bits, the model follows it"
            )

    @property
    def mean(self) -> Tensor:
        """Mixture-averaged component means, each channel given the means before it."""
        weights = torch.softmax(self.mixture_logits, dim=1).unsqueeze(1)
        means = (self.means * weights).sum(2)
        if self.coefficients is None:
            return self._to_image(means)
        return self._chain_colors(means, (self.coefficients * weights).sum(2))

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B,)`` nats; ``x`` on the grid k / (2^bits - 1)."""
        x = (2 * x.to(self.means.dtype) - 1).unsqueeze(2)  # (B, C, 1, H, W)
        centered = x - self._conditional_means(x)
        inverse_scale = torch.exp(-self.log_scales)
        half_bin = inverse_scale / self.levels
        middle = inverse_scale * centered
        upper, lower = middle + half_bin, middle - half_bin

        mass = torch.sigmoid(upper) - torch.sigmoid(lower)
        # where the mass underflows: density at the center times the bin's width
        density = middle - self.log_scales - 2 * F.softplus(middle) - math.log(self.levels / 2)
        inner = torch.where(mass > TINY_MASS, mass.clamp(min=1e-10).log(), density)
        log_prob = torch.where(
            x < -0.999,
            upper - F.softplus(upper),
            torch.where(x > 0.99, -F.softplus(lower), inner),
        )
        log_prob = log_prob.sum(1) + F.log_softmax(self.mixture_logits, dim=1)
        return sum_counted(torch.logsumexp(log_prob, dim=1, keepdim=True), self.counted_size)

    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """Draw a component, then each channel in turn.

        Temperature divides the mixture logits and multiplies the scales; at 0 the likeliest
        component's means remain. Values are continuous in [0, 1].
        """
        check_temperature(temperature)
        gumbel = -torch.log(-torch.log(draw_uniform(self.mixture_logits, generator)))
        chosen = (self.mixture_logits + temperature * gumbel).argmax(1)[:, None, None]
        index = chosen.expand(-1, self.means.shape[1], -1, -1, -1)
        means = self.means.gather(2, index).squeeze(2)
        scales = self.log_scales.gather(2, index).squeeze(2).exp()
        values = means + temperature * scales * torch.logit(draw_uniform(means, generator))
        if self.coefficients is None:
            return self._to_image(values)
        return self._chain_colors(values, self.coefficients.gather(2, index).squeeze(2))

    def _conditional_means(self, x: Tensor) -> Tensor:
        if self.coefficients is None:
            return self.means
        red, green, _ = x.unbind(1)
        c0, c1, c2 = self.coefficients.unbind(1)
        mean_red, mean_green, mean_blue = self.means.unbind(1)
        return torch.stack(
            [mean_red, mean_green + c0 * red, mean_blue + c1 * red + c2 * green], dim=1
        )

    def _chain_colors(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Clip red, then move green by red, then blue by both; all ``(B, 3, H, W)``."""
        c0, c1, c2 = coefficients.unbind(1)
        red = values[:, 0].clamp(-1, self.brightest)
        green = (values[:, 1] + c0 * red).clamp(-1, self.brightest)
        blue = (values[:, 2] + c1 * red + c2 * green).clamp(-1, self.brightest)
        return self._to_image(torch.stack([red, green, blue], dim=1))

    def _to_image(self, values: Tensor) -> Tensor:
        return (values.clamp(-1, self.brightest) + 1) / (self.white + 1)


LIKELIHOODS: Registry[type[PixelDistribution]] = Registry(
    "model.likelihood",
    PixelDistribution,
    {"bernoulli": Bernoulli, "logistic_mixture": LogisticMixture, "normal": NormalPixels},
)


def logit_channels(config: ImageConfig) -> int:
    """Channels of the image head, K."""
    return config.pixel_distribution.logit_channels(config)


def build_likelihood(config: ImageConfig, logits: Tensor) -> PixelDistribution:
    """The distribution that ``config`` names, over ``logits`` ``(B, K, H, W)``."""
    return config.pixel_distribution(at_least_float32(logits), config)
