"""The mixture of discretized logistics for color and gray images of any number of bits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.models.pixel_distribution import (
    DATA_BITS,
    ImageConfig,
    PixelDistribution,
    Randomness,
    check_temperature,
    draw_uniform,
    sum_counted,
)

LOG_SCALE_FLOOR = -7.0
TINY_MASS = 1e-5
_NARROW = 1e-3
"""Of a bin against a logistic's scale: below it log(1 - exp(-w)) is log w - w / 2 + w^2 / 24 to
1e-15."""


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
