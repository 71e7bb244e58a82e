"""The logistic mixture of VDVAE and Efficient-VDVAE, in a form that float32 does not spoil.

Both publish the mixture of PixelCNN++ with images of fewer than 8 bits as 8-bit values whose low
bits are zero: 5 bits are 0, 8, ..., 248. As published a bin is then 2 / 31 wide while the levels
are 2 / 31.875 apart, so neighboring bins overlap and the masses sum to up to 1.03, for broad
logistics (0.04 bits/dim for nothing) and to more for narrow ones. Ours has bins as wide as the
levels are apart: the masses sum to 1. With 8 bits the two agree but for the published
approximation of masses below 1e-5. More than 8 bits are levels k / (2^bits - 1), as in
:class:`LogisticMixture`; nothing published goes there.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.models.logistic_mixture import TINY_MASS, LogisticMixture
from nvae.models.pixel_distribution import DATA_BITS, ImageConfig

_LINEAR_BELOW = -30.0
"""Here log softplus(v) is v to 1e-13."""


@dataclass(frozen=True)
class LogisticForm:
    """How raw outputs become logistics, and values become bins.

    Attributes:
        softplus: the scale is softplus(beta * raw) / beta; else exp(beta * raw).
        beta: steepness of that map.
        min_log_scale: floor of the log-scale; of ``raw`` where the map is exp.
        published: bins as published; else bins whose masses sum to 1.
        has_white_edge: in the published form the brightest level takes the whole upper tail with
            fewer than 8 bits too.
    """

    softplus: bool = False
    beta: float = 1.0
    min_log_scale: float = -7.0
    published: bool = False
    has_white_edge: bool = True

    def log_scale(self, raw: Tensor) -> Tensor:
        """Log-scales of raw network outputs, same shape."""
        # below it 1 / scale leaves the number type, or its square does
        representable = 0.5 * math.log(torch.finfo(raw.dtype).tiny)
        if self.softplus:
            log_scale = log_softplus(raw, self.beta).clamp(min=self.min_log_scale)
        else:
            log_scale = self.beta * raw.clamp(min=self.min_log_scale)
        return log_scale.clamp(min=representable)


def log_softplus(raw: Tensor, beta: float) -> Tensor:
    """log(softplus(beta * raw) / beta), finite wherever ``raw`` is."""
    v = beta * raw
    near = F.softplus(v.clamp(min=_LINEAR_BELOW)).log()
    return near + (v - _LINEAR_BELOW).clamp(max=0) - math.log(beta)


def gray_level(x: Tensor, bits: int) -> Tensor:
    """Level k of ``x`` in [0, 1], a whole number from 0 to ``2**bits - 1`` in x's type.

    ``x`` is either an 8-bit value / 255, whose low bits are dropped, or k / (2^bits - 1) already;
    the rule is the same for both. With more than 8 bits it is k / (2^bits - 1).
    """
    if bits > DATA_BITS:
        return ((2**bits - 1) * x).round()
    return torch.floor((255 * x).round() / 2 ** (DATA_BITS - bits))


class StableLogisticMixture(LogisticMixture):
    """See the module; logits and colors are those of :class:`LogisticMixture`.

    Images are 8-bit values / 255 or have the model's bits already; :func:`gray_level` makes them
    levels; with more than 8 bits they must have the model's. A draw of the normalized form shows
    the brightest level as 1, one of the published form as ``(2^bits - 1) 2^(8 - bits) / 255``.
    """

    def __init__(self, logits: Tensor, config: ImageConfig) -> None:
        super().__init__(logits, config)
        form: LogisticForm = config.logistics  # type: ignore[attr-defined]
        self.form, self.bits = form, config.bits
        self.log_scales = form.log_scale(self.raw_log_scales)
        if config.bits > DATA_BITS:
            return
        self.step = 2 ** (DATA_BITS - config.bits)  # between two levels, of 255
        self.half_bin = 1 / self.levels if form.published else self.step / 255
        top = (self.levels * self.step - 127.5) / 127.5
        # where the published form has none, its right edge is at 255
        self.has_white_edge = form.has_white_edge or not form.published or config.bits == DATA_BITS
        self.brightest = top if self.has_white_edge else 1.0
        self.white = 1.0 if form.published else top

    @classmethod
    def check(cls, config: ImageConfig) -> None:
        """The published form is for 8 bits at most."""
        if config.logistics.published and config.bits > DATA_BITS:  # type: ignore[attr-defined]
            raise ValueError(
                f"model.normalized=false is the published form, for {DATA_BITS} bits at most, not "
                f"for model.bits={config.bits}; set model.normalized=true"
            )

    @classmethod
    def check_data(cls, config: ImageConfig, bits: int) -> None:
        """Images of 8 bits, or of as many as the model's."""
        if config.bits > DATA_BITS:
            super().check_data(config, bits)
            return
        published = config.logistics.published  # type: ignore[attr-defined]
        if bits == DATA_BITS or (bits == config.bits and not published):
            return
        form = "model.normalized=false with " if published else ""
        raise ValueError(
            f"{form}model.bits={config.bits} does not fit data.bits={bits}; set "
            f"data.bits={DATA_BITS} model.bits={config.bits}: the model drops the low bits itself"
        )

    def _log_masses(self, x: Tensor) -> Tensor:
        """See the base class; see this one for what ``x`` ``(B, C, H, W)`` may be."""
        if self.bits > DATA_BITS:
            return self._exact_log_masses(x)
        level = gray_level(x, self.bits).unsqueeze(2)  # (B, C, 1, H, W)
        value = (level * self.step - 127.5) / 127.5
        centered = value - self._conditional_means(value)
        inverse_scale = torch.exp(-self.log_scales)
        upper = inverse_scale * (centered + self.half_bin)
        lower = inverse_scale * (centered - self.half_bin)
        # sigmoid(upper) - sigmoid(lower) as a product: nothing cancels
        width = (2 * self.half_bin) * inverse_scale
        below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
        inner = below + above + torch.log(-torch.expm1(-width))
        if self.form.published:
            middle = inverse_scale * centered
            density = middle - self.log_scales - 2 * F.softplus(middle) - math.log(self.levels / 2)
            inner = torch.where(inner > math.log(TINY_MASS), inner, density)
        if self.has_white_edge:
            inner = torch.where(level == self.levels, above, inner)
        return torch.where(level == 0, below, inner)
