"""Pixels as binary decisions under a likelihood.

A gray level of b bits is b decisions, the highest bit first, each with its probability given those
before it: that of the upper half of the interval that is left. Together they have the level's mass
under the likelihood, and no table of all levels is made. Colors follow each other: a channel's
distribution knows the channels before it.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nvae.codec.coder import Stack
from nvae.models import ImageConfig
from nvae.models.likelihoods import Bernoulli
from nvae.models.logistic_mixture import LogisticMixture, log_bin_masses
from nvae.models.pixel_distribution import DATA_BITS, PixelDistribution, build_likelihood
from nvae.models.stable_mixture import StableLogisticMixture, gray_level

_LOGIT_GRID_BITS = 14
"""For 8 bits or fewer; finer by as much as levels are nearer each other."""
_PROBABILITY_GRID = 2.0**22
_SMALLEST = 1e-300
_SAME = 1e-6
"""Values in [0, 1] this near are one; levels of 16 bits are 15 times as far apart."""


class Decisions(ABC):
    """The decisions of one channel, for N pixels at once."""

    @abstractmethod
    def probability(self) -> Tensor:
        """Of a one, ``(N,)`` float64."""

    @abstractmethod
    def take(self, bit: Tensor) -> None:
        """What was decided, ``(N,)`` int64 zeros and ones."""


class PixelCoding(ABC):
    """How the pixels of some images are coded, channel after channel."""

    @abstractmethod
    def channel(self, index: int) -> Decisions:
        """The decisions of a channel, the channels before it being known."""

    @abstractmethod
    def know(self, index: int, levels: Tensor) -> None:
        """Tell the gray levels of a channel, ``(N,)`` int64."""


class CodedBernoulli(PixelCoding, Decisions):
    """Black and white pixels."""

    def __init__(self, distribution: Bernoulli) -> None:
        # (B, C, H, W) to one row a channel
        self._probability = torch.sigmoid(distribution.logits.transpose(0, 1).flatten(1))

    def channel(self, index: int) -> Decisions:
        """See the base class."""
        self._index = index
        return self

    def know(self, index: int, levels: Tensor) -> None:
        """Channels are independent."""

    def probability(self) -> Tensor:
        """See the base class."""
        return self._probability[self._index]

    def take(self, bit: Tensor) -> None:
        """There is one decision."""


class CodedMixture(PixelCoding):
    """Mixture of logistics, each level with the mass between its two edges.

    The masses sum to 1, also where the likelihood's published form counts a little twice: 254 as an
    upper edge like 255, or bins that overlap.
    """

    def __init__(self, distribution: LogisticMixture, bits: int) -> None:
        d = distribution
        self.bits = bits
        levels = 2**bits
        if isinstance(d, StableLogisticMixture) and bits <= DATA_BITS:
            step = 2 ** (DATA_BITS - bits)
            self.start, self.step = -1.0, 2 * step / 255
        else:
            self.start, self.step = -1.0, 2 / (levels - 1)
        # (B, ...) to (..., N): N pixels last
        self._log_weights = F.log_softmax(_rows(d.mixture_logits), dim=0)  # (M, N)
        self._means = _rows(d.means)  # (C, M, N)
        self._log_scales = _rows(d.log_scales)
        if len(self._means) > 1:
            self._near, self._far = _rows(d.near), _rows(d.far)
        self._known: list[Tensor] = []

    def edge(self, level: Tensor) -> Tensor:
        """Lower edge of levels in [-1, 1], float64; infinite for black, and above white."""
        edge = self.start + (level.double() - 0.5) * self.step
        edge = edge.masked_fill(level <= 0, -math.inf)
        return edge.masked_fill(level >= 2**self.bits, math.inf)

    def _mean(self, channel: int) -> Tensor:
        mean = self._means[channel]
        if channel > 1:
            mean = mean + self._far[channel - 2] * self._known[channel - 2]
        if channel > 0:
            mean = mean + self._near[channel - 1] * self._known[channel - 1]
        return mean

    def channel(self, index: int) -> Decisions:
        """See the base class."""
        weights = torch.softmax(self._log_weights, dim=0)
        return _Halving(self, self._mean(index), torch.exp(-self._log_scales[index]), weights)

    def know(self, index: int, levels: Tensor) -> None:
        """The component that explains a channel better is likelier in the next."""
        value = self.start + levels.double() * self.step
        mass = log_bin_masses(
            value - self._mean(index), self._log_scales[index], self.step / 2,
            first=levels == 0, last=levels == 2**self.bits - 1,
        )  # fmt: skip
        self._log_weights = F.log_softmax(self._log_weights + mass, dim=0)
        self._known.append(value)


class _Halving(Decisions):
    """Halves the interval of levels that is left, `bits` times.

    Of every edge the cumulative mass below it and above it are kept, both without cancellation.
    """

    def __init__(
        self, coding: CodedMixture, mean: Tensor, inverse_scale: Tensor, weights: Tensor
    ) -> None:
        self._coding, self._mean, self._inverse_scale = coding, mean, inverse_scale
        self._weights = weights
        self._first = torch.zeros(mean.shape[1], dtype=torch.int64)
        self._count = 2**coding.bits
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        self._low, self._high = (zero, one), (one, zero)

    def probability(self) -> Tensor:
        """See the base class."""
        middle = self._coding.edge(self._first + self._count // 2)
        t = (middle - self._mean) * self._inverse_scale
        self._middle = torch.sigmoid(t), torch.sigmoid(-t)
        lower = self._mass(self._low, self._middle)
        upper = self._mass(self._middle, self._high)
        return (upper + _SMALLEST) / (lower + upper + 2 * _SMALLEST)

    def take(self, bit: Tensor) -> None:
        """See the base class."""
        self._count //= 2
        self._first = self._first + bit * self._count
        up = bit.bool()
        low, high, middle = self._low, self._high, self._middle
        self._low = torch.where(up, middle[0], low[0]), torch.where(up, middle[1], low[1])
        self._high = torch.where(up, high[0], middle[0]), torch.where(up, high[1], middle[1])

    def _mass(self, low: tuple[Tensor, Tensor], high: tuple[Tensor, Tensor]) -> Tensor:
        # below the mean the masses below are small and exact, above it those above
        mass = torch.where(low[0] + high[0] < 1, high[0] - low[0], low[1] - high[1])
        return (self._weights * mass).sum(0)


def _rows(x: Tensor) -> Tensor:
    """``(B, ..., H, W)`` to ``(..., B * H * W)``."""
    return x.movedim(0, -3).flatten(-3)


def check_codable(config: ImageConfig) -> None:
    """Raise a ValueError unless the likelihood gives every gray level a mass that is known here."""
    if not issubclass(config.pixel_distribution, Bernoulli | LogisticMixture):
        raise ValueError(
            f"model.likelihood={config.likelihood} cannot be coded: it gives gray levels no "
            "masses; compression takes models with likelihood=logistic_mixture or bernoulli"
        )


def coded_shape(config: ImageConfig) -> tuple[int, int, int]:
    """``(C, h, w)`` of what is coded of an image: the window that the likelihood counts."""
    rows, columns = config.counted_window
    return config.image_channels, rows.stop - rows.start, columns.stop - columns.start


def coding_of(config: ImageConfig, logits: Tensor) -> PixelCoding:
    """How the counted pixels of images with these logits ``(B, K, H, W)`` are coded.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("the model's pixel distributions are not finite numbers")
    inside = config.counted_window
    # on a grid, for the same reason as the latents' parameters
    grid = 2.0 ** (_LOGIT_GRID_BITS + max(0, config.bits - DATA_BITS))
    logits = (logits[..., *inside].double() * grid).round() / grid
    distribution: PixelDistribution = build_likelihood(config, logits)
    if isinstance(distribution, LogisticMixture):
        return CodedMixture(distribution, config.bits)
    assert isinstance(distribution, Bernoulli)
    return CodedBernoulli(distribution)


def bits_a_pixel(config: ImageConfig) -> int:
    """Decisions of a gray level."""
    return 1 if issubclass(config.pixel_distribution, Bernoulli) else config.bits


def level_type(bits: int) -> torch.dtype:
    """Of gray levels of so many bits: uint8, or int32, with which torch can compute, for more
    than 8."""
    return torch.uint8 if bits <= 8 else torch.int32


def levels_of(config: ImageConfig, x: Tensor) -> Tensor:
    """Gray levels ``(N, C, h, w)`` of images ``(N, C, H, W)`` in [0, 1], of the coded window.

    Raises:
        ValueError: the images hold more than that, which would be lost.
    """
    bits, inside = bits_a_pixel(config), config.counted_window
    around = x.clone()
    around[..., *inside] = 0
    if around.any():
        raise ValueError(
            "they are not black outside the window that the likelihood counts, and that would be "
            "lost"
        )
    coded = x[..., *inside].double()
    forms = [1 / (2**bits - 1)]
    if issubclass(config.pixel_distribution, StableLogisticMixture) and bits <= DATA_BITS:
        levels = gray_level(coded, bits)
        forms.append(2 ** (DATA_BITS - bits) / 255)  # 8-bit values whose low bits are zero
    else:
        levels = (coded * (2**bits - 1)).round()
    if not any(bool(((levels * form - coded).abs() < _SAME).all()) for form in forms):
        raise ValueError(
            f"they have other values than the model's {2**bits} gray levels, and those would be "
            f"lost; data.bits={bits} keeps the upper bits alone"
        )
    return levels.to(level_type(bits)).contiguous()


def push_pixels(stack: Stack, config: ImageConfig, logits: Tensor, levels: Tensor) -> None:
    """Code the gray levels ``(B, C, h, w)`` of the coded window."""
    coding = coding_of(config, logits)
    depth = bits_a_pixel(config)
    bits: list[NDArray[np.int32]] = []
    probabilities: list[NDArray[np.float64]] = []
    for channel in range(levels.shape[1]):
        own = levels[:, channel].flatten().to(torch.int64)
        decisions = coding.channel(channel)
        for place in reversed(range(depth)):
            probabilities.append(_on_grid(decisions.probability()))
            bit = (own >> place) & 1
            bits.append(bit.to(torch.int32).numpy())
            decisions.take(bit)
        if channel + 1 < levels.shape[1]:
            coding.know(channel, own)
    stack.push_bits(np.concatenate(bits), np.concatenate(probabilities))


def pop_pixels(stack: Stack, config: ImageConfig, logits: Tensor) -> Tensor:
    """Inverse of :func:`push_pixels`."""
    coding, bits = coding_of(config, logits), bits_a_pixel(config)
    count, height, width = coded_shape(config)
    channels = []
    for channel in range(count):
        decisions = coding.channel(channel)
        own = torch.zeros(len(logits) * height * width, dtype=torch.int64)
        for _ in range(bits):
            popped = stack.pop_bits(_on_grid(decisions.probability()))
            bit = torch.from_numpy(popped).to(torch.int64)
            own = 2 * own + bit
            decisions.take(bit)
        if channel + 1 < count:
            coding.know(channel, own)
        channels.append(own.view(-1, height, width).to(level_type(bits)))
    return torch.stack(channels, dim=1)


def _on_grid(probability: Tensor) -> NDArray[np.float64]:
    """Nothing is impossible: every level can be coded."""
    steps = (probability * _PROBABILITY_GRID).round().clamp(1, _PROBABILITY_GRID - 1)
    return (steps / _PROBABILITY_GRID).numpy()
