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

LOG_SCALE_FLOOR = -7.0
TINY_MASS = 1e-5
_NARROW = 1e-3
"""Of a bin against a logistic's scale: below it log(1 - exp(-w)) is log w - w / 2 + w^2 / 24 to
1e-15."""

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
        return -sum_counted(self._cross_entropy(x), self.counted_size)

    def pixel_log_prob(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` nats."""
        return -self._cross_entropy(x)

    def _cross_entropy(self, x: Tensor) -> Tensor:
        x = x.to(self.logits.dtype)
        return F.binary_cross_entropy_with_logits(self.logits, x, reduction="none")

    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """Draw 0/1 pixels; temperature divides the log-odds."""
        check_temperature(temperature)
        u = draw_uniform(self.logits, generator)
        # x = 1 where logit > t * logistic noise, which is P = sigmoid(logit / t)
        return (self.logits > temperature * torch.logit(u)).to(self.logits.dtype)


class NormalPixels(PixelDistribution):
    """Independent Normals over 2x - 1, not discretized; logits are means and log-sigmas.

    For pixels that are measured numbers. The density is that of 2x - 1, as published: per dimension
    log 2 nats below that of x. It may exceed 1, so that bits/dim may be negative. Pixels of b bits
    lie 2 / (2^b - 1) apart in 2x - 1, and where the density is smooth at that distance they take
    log2((2^b - 1) / 2) bits/dim more than it says: 6.99 for 8 bits. Sigma is 0.0167 at least.
    """

    title = "Normal"
    density_of = "2x - 1"

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
        return sum_counted(self.pixel_log_prob(x), self.counted_size)

    def pixel_log_prob(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` nats of density."""
        return self.normal.log_prob(2 * x - 1)

    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """Draw; temperature multiplies sigma."""
        check_temperature(temperature)
        mean = self.normal.mean
        noise = draw_normal(mean, generator)
        return self._to_image(mean + temperature * self.normal.sigma * noise)

    @staticmethod
    def _to_image(pixels: Tensor) -> Tensor:
        return ((pixels + 1) / 2).clamp(0, 1)


def log_scale_floor(bits: int) -> float:
    """Least log-scale of a logistic: that of PixelCNN++, lower as bins get narrower than 8 bits'.

    Otherwise no component could be narrower than many bins: of 16 bits, even a pixel that is known
    exactly would cost 6.9.
    """
    return LOG_SCALE_FLOOR - math.log(2) * max(0, bits - DATA_BITS)


def log_bin_masses(
    centered: Tensor, log_scale: Tensor, half_bin: float, first: Tensor, last: Tensor
) -> Tensor:
    """Log of a logistic's mass on bins, in nats, without loss where it is tiny.

    The difference of two sigmoids is a product, sigmoid(u) sigmoid(-l) (1 - exp(l - u)): nothing
    cancels, however narrow the bins and however far the tails.

    Args:
        centered: middles of the bins less the logistic's mean.
        log_scale: of the logistic, same shape.
        half_bin: half a bin's width.
        first: where the bin takes the whole lower tail; broadcasts.
        last: where it takes the whole upper tail.
    """
    inverse_scale = torch.exp(-log_scale)
    below = F.logsigmoid(inverse_scale * (centered + half_bin))
    above = F.logsigmoid(inverse_scale * (half_bin - centered))
    log_width = math.log(2 * half_bin) - log_scale
    width = torch.exp(log_width)
    small = width.clamp(max=_NARROW)
    narrow = log_width - small / 2 + small * small / 24
    wide = torch.log(-torch.expm1(-width.clamp(min=_NARROW)))
    inner = below + above + torch.where(width < _NARROW, narrow, wide)
    return torch.where(first, below, torch.where(last, above, inner))


class LogisticMixture(PixelDistribution):
    """Mixture of discretized logistics (PixelCNN++, Salimans et al. 2017, section 2).

    Per pixel, M components share one mixture weight across the channels. A channel's mean moves
    with the two channels before it, by coefficients in (-1, 1): green's with red, blue's with red
    and green, and so on for any number of channels. The pixel's value is the logistic's mass on its
    bin of width 2 / (2^bits - 1) in [-1, 1].

    Logits are M mixture logits, then for each channel M means and M log-scales, then M coefficients
    for each channel but the first on the one before it, and for each but the first two on the one
    before that. Color keeps the published order, in which M coefficients follow each channel's
    log-scales: green on red, blue on red, blue on green. That makes ``3 M`` channels for gray,
    ``10 M`` for color, ``(4 C - 2) M`` for C > 1.

    The masses of all values sum to 1, but for one rule of the published form, which gray and color
    images of at most 8 bits keep: a value above 0.99 takes the whole upper tail. With 8 bits that
    includes 254 as well as 255. There masses below 1e-5 are approximated too.
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
        self.is_published = channels in (1, 3) and config.bits <= DATA_BITS
        self.mixture_logits, others = logits[:, :mixtures], logits[:, mixtures:]  # (B, M, H, W)
        if channels == 3:
            parameters = others.unflatten(1, (3, 3, mixtures))
            coefficients = torch.tanh(parameters[:, :, 2])
            self.near, self.far = coefficients[:, 0::2], coefficients[:, 1:2]
        else:
            own = 2 * channels * mixtures
            parameters = others[:, :own].unflatten(1, (channels, 2, mixtures))
            if channels > 1:
                coefficients = torch.tanh(others[:, own:].unflatten(1, (-1, mixtures)))
                # (B, C - 1, M, H, W) and (B, C - 2, M, H, W)
                self.near, self.far = coefficients.tensor_split((channels - 1,), dim=1)
        self.means = parameters[:, :, 0]  # (B, C, M, H, W)
        self.raw_log_scales = parameters[:, :, 1]
        self.log_scales = self.raw_log_scales.clamp(min=log_scale_floor(config.bits))

    @classmethod
    def logit_channels(cls, config: ImageConfig) -> int:
        """Of every component: its weight, and the parameters of every channel."""
        channels = config.image_channels
        return config.num_mixtures * (1 + 2 * channels + max(0, 2 * channels - 3))

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
        if self.means.shape[1] == 1:
            return self._to_image(means)
        return self._chain(means, (self.near * weights).sum(2), (self.far * weights).sum(2))

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B,)`` nats; ``x`` on the grid k / (2^bits - 1)."""
        return sum_counted(self.pixel_log_prob(x), self.counted_size)

    def pixel_log_prob(self, x: Tensor) -> Tensor:
        """``(B, 1, H, W)`` nats: a component's weight is shared by the channels."""
        masses = self._log_masses(x.to(self.means.dtype)).sum(1)
        log_prob = masses + F.log_softmax(self.mixture_logits, dim=1)
        return torch.logsumexp(log_prob, dim=1, keepdim=True)

    def _log_masses(self, x: Tensor) -> Tensor:
        """Of every component at ``x`` ``(B, C, H, W)``, ``(B, C, M, H, W)`` in nats."""
        return self._published_log_masses(x) if self.is_published else self._exact_log_masses(x)

    def _exact_log_masses(self, x: Tensor) -> Tensor:
        level = (self.levels * x).round().unsqueeze(2)  # (B, C, 1, H, W)
        value = (2 * level - self.levels) / self.levels
        return log_bin_masses(
            value - self._conditional_means(value), self.log_scales, 1 / self.levels,
            first=level == 0, last=level == self.levels,
        )  # fmt: skip

    def _published_log_masses(self, x: Tensor) -> Tensor:
        x = (2 * x - 1).unsqueeze(2)  # (B, C, 1, H, W)
        centered = x - self._conditional_means(x)
        inverse_scale = torch.exp(-self.log_scales)
        half_bin = inverse_scale / self.levels
        middle = inverse_scale * centered
        upper, lower = middle + half_bin, middle - half_bin

        mass = torch.sigmoid(upper) - torch.sigmoid(lower)
        # where the mass underflows: density at the center times the bin's width
        density = middle - self.log_scales - 2 * F.softplus(middle) - math.log(self.levels / 2)
        inner = torch.where(mass > TINY_MASS, mass.clamp(min=1e-10).log(), density)
        return torch.where(
            x < -0.999,
            upper - F.softplus(upper),
            torch.where(x > 0.99, -F.softplus(lower), inner),
        )

    def sample(self, temperature: float = 1.0, generator: Randomness = None) -> Tensor:
        """Draw a component, then each channel in turn.

        Temperature divides the mixture logits and multiplies the scales; at 0 the likeliest
        component's means remain. Values are continuous in [0, 1].
        """
        check_temperature(temperature)
        gumbel = -torch.log(-torch.log(draw_uniform(self.mixture_logits, generator)))
        chosen = (self.mixture_logits + temperature * gumbel).argmax(1)[:, None, None]

        def of_chosen(values: Tensor) -> Tensor:
            index = chosen.expand(-1, values.shape[1], -1, -1, -1)
            return values.gather(2, index).squeeze(2)

        means, scales = of_chosen(self.means), of_chosen(self.log_scales).exp()
        values = means + temperature * scales * torch.logit(draw_uniform(means, generator))
        if self.means.shape[1] == 1:
            return self._to_image(values)
        return self._chain(values, of_chosen(self.near), of_chosen(self.far))

    def _conditional_means(self, x: Tensor) -> Tensor:
        """Means given the channels before; ``x`` ``(B, C, 1, H, W)`` in [-1, 1]."""
        if self.means.shape[1] == 1:
            return self.means
        second = self.means[:, 1:2] + self.near[:, :1] * x[:, :1]
        later = self.means[:, 2:] + self.far * x[:, :-2] + self.near[:, 1:] * x[:, 1:-1]
        return torch.cat([self.means[:, :1], second, later], dim=1)

    def _chain(self, values: Tensor, near: Tensor, far: Tensor) -> Tensor:
        """Clip each channel of ``(B, C, H, W)``, then move the next ones by it."""
        done = [values[:, 0].clamp(-1, self.brightest)]
        for channel in range(1, values.shape[1]):
            value = values[:, channel]
            if channel > 1:
                value = value + far[:, channel - 2] * done[-2]
            done.append((value + near[:, channel - 1] * done[-1]).clamp(-1, self.brightest))
        return self._to_image(torch.stack(done, dim=1))

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
