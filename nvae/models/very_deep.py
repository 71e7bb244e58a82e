"""What VDVAE and Efficient-VDVAE have in common: read it beside either paper.

Bottom-up, bottleneck cells without normalization; top-down, many stochastic layers on one state.
A layer's prior reads the state and adds a residual of its own to it; the posterior reads the same
state beside a map of the encoder; the latent is projected and added; residual cells follow. The
families differ in what ``vdvae.py`` and ``evdvae.py`` hold: activation, latent heads, scale map,
where a layer's state and encoder map come from, start and end, initialization.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from nvae.models.conditioning import Condition, guided
from nvae.models.distributions import HALF_LOG_2PI, Normal, at_least_float32
from nvae.models.hierarchical import Choose, HierarchicalVAE, Temperature
from nvae.models.layers import without_autocast
from nvae.models.logistic_mixture import LogisticMixture
from nvae.models.output import GroupSample, Output
from nvae.models.pixel_distribution import DATA_BITS, ImageConfig, PixelDistribution
from nvae.models.stable_mixture import LogisticForm, StableLogisticMixture

MOST_LAYERS = 5000
"""Blocks of one network; the deepest published one has 140."""

States = dict[int, Tensor]
"""The top-down state of every resolution, as the last layer there left it."""


def resolution_of(shape: Sequence[int]) -> int:
    """The one number that a resolution goes by, of a shape ``(..., h, w)``: the shorter side."""
    return min(shape[-2:])


@dataclass(frozen=True)
class VeryDeepConfig(ImageConfig):
    """Settings of both families beside those of :class:`ImageConfig`.

    Attributes:
        normalized: the logistic mixture's masses sum to 1. False: the form in which the family's
            figures were published; see :mod:`nvae.models.stable_mixture`.
    """

    likelihood: str = "logistic_mixture"
    normalized: bool = True

    @property
    @abstractmethod
    def logistics(self) -> LogisticForm:
        """Form of the logistic mixture."""

    @property
    def overcounts(self) -> bool:
        """The likelihood's masses do not sum to 1, so that its figures are no code lengths."""
        is_mixture = self.pixel_distribution is StableLogisticMixture
        return is_mixture and not self.normalized and self.bits < DATA_BITS

    @property
    def pixel_distribution(self) -> type[PixelDistribution]:
        """The likelihood, a logistic mixture in its stable form."""
        found = super().pixel_distribution
        return StableLogisticMixture if found is LogisticMixture else found


class Bottleneck(nn.Module):
    """Convolutions 1x1, k x k, ..., k x k, 1x1 with biases, an activation before each.

    Args:
        in_channels: of the input.
        middle: channels between the first and the last convolution.
        out_channels: of the result.
        kernel: side of the convolutions in the middle, odd.
        activation: a function.
        depth: convolutions in the middle.
        outer_kernel: side of the first and the last.
        residual: add the input.
    """

    def __init__(
        self,
        in_channels: int,
        middle: int,
        out_channels: int,
        kernel: int,
        activation: Callable[[Tensor], Tensor],
        *,
        depth: int = 2,
        outer_kernel: int = 1,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.activation, self.residual = activation, residual
        widths = [in_channels, *[middle] * (depth + 1), out_channels]
        kernels = [outer_kernel, *[kernel] * depth, outer_kernel]
        self.convs = nn.ModuleList(
            same_conv(a, b, k) for a, b, k in zip(widths, widths[1:], kernels, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, h, w)`` to ``(B, C', h, w)``."""
        result = x
        for conv in self.convs:
            result = conv(self.activation(result))
        return x + result if self.residual else result


def same_conv(in_channels: int, out_channels: int, kernel: int = 1) -> nn.Conv2d:
    """Convolution with a bias that keeps the size; ``kernel`` is odd."""
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


def conv_weight(module: Any) -> Tensor:
    """The weight of a convolution that stands in a container, for its initialization."""
    assert isinstance(module, nn.Conv2d)
    return module.weight.data


@dataclass(frozen=True)
class LogSigmaNormal(Normal):
    """A :class:`Normal` that is known by its log-sigma, which has no floor and no clamp.

    KL and density are computed from log-sigmas, also where sigma itself is rounded to 0.

    Attributes:
        log_sigma: ``(B, L, h, w)``.
    """

    log_sigma: Tensor

    @classmethod
    def of(cls, mean: Tensor, log_sigma: Tensor) -> "LogSigmaNormal":
        """From mean and log-sigma ``(B, L, h, w)``."""
        return cls(mean, log_sigma.exp(), log_sigma)

    def at(self, temperature: float) -> Normal:
        """With sigma multiplied by ``temperature`` (>= 0)."""
        return self if temperature == 1 else Normal(self.mean, temperature * self.sigma)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of every element of ``z``, in nats; same shape as ``z``."""
        normalized = (z - self.mean) * _inverse(self.log_sigma)
        return -0.5 * normalized * normalized - HALF_LOG_2PI - self.log_sigma

    def kl(self, prior: Normal) -> Tensor:
        """KL(self || prior) of every element in closed form, in nats."""
        of_prior = prior.log_sigma if isinstance(prior, LogSigmaNormal) else prior.sigma.log()
        difference = (self.mean - prior.mean) * _inverse(of_prior)
        log_ratio = self.log_sigma - of_prior
        return 0.5 * (difference * difference + torch.exp(2 * log_ratio)) - 0.5 - log_ratio


def _inverse(log_sigma: Tensor) -> Tensor:
    """1 / sigma, as far as its square can be represented."""
    largest = -0.5 * math.log(torch.finfo(log_sigma.dtype).tiny)
    return torch.exp((-log_sigma).clamp(max=largest))


class TopDownLayer(nn.Module):
    """One stochastic layer.

    Attributes:
        merge_latent: 1x1 convolution from latent to state.
        cells: residual cells after the latent.
    """

    merge_latent: nn.Conv2d
    cells: nn.Module

    @abstractmethod
    def read_prior(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-sigma ``(B, L, h, w)``, and what the prior adds to the state."""

    @abstractmethod
    def read_posterior(
        self, state: Tensor, encoder_map: Tensor, prior: LogSigmaNormal
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-sigma ``(B, L, h, w)``."""

    @abstractmethod
    def without_posterior(self) -> None:
        """Drop what only encoding needs."""

    def forward(
        self,
        state: Tensor,
        *,
        encoder_map: Tensor | None = None,
        noise: Tensor,
        z: Tensor | None = None,
        temperature: float = 1.0,
        guidance: float = 1.0,
        keep: Tensor | None = None,
        prior_noise: Tensor | None = None,
        choose: Callable[[Normal, Normal | None], Tensor] | None = None,
    ) -> tuple[Tensor, GroupSample]:
        """Advance the top-down state by one layer.

        Args:
            state: ``(B, C, h, w)``.
            encoder_map: of this layer; without it z comes from the prior.
            noise: standard normal, ``(B, L, h, w)``.
            z: use this latent instead of drawing one.
            temperature: factor on the prior's sigma when z comes from the prior.
            guidance: see :func:`~nvae.models.conditioning.guided`.
            keep: ``(L,)`` booleans: the channels that take the posterior's draw, the others the
                prior's; None: all.
            prior_noise: like ``noise``, of those others.
            choose: asked for z, with prior and posterior (None without ``encoder_map``).

        Returns:
            The new state ``(B, C, h, w)`` and what was drawn.
        """
        mean, log_sigma, residual = self.read_prior(state)
        prior = LogSigmaNormal.of(*guided((mean, log_sigma), guidance))
        posterior = None
        if encoder_map is not None and z is None:
            posterior = LogSigmaNormal.of(*self.read_posterior(state, encoder_map, prior))
        if choose is not None:
            z = choose(prior, posterior)
            sample = GroupSample(z, prior, posterior, z)
        elif z is not None:
            sample = GroupSample(z, prior.at(temperature))
        elif posterior is None:
            cooled = prior.at(temperature)
            sample = GroupSample(cooled.sample(noise), cooled)
        else:
            z = drawn = posterior.sample(noise)
            if keep is not None:
                assert prior_noise is not None
                z = torch.where(keep.view(1, -1, 1, 1), drawn, prior.sample(prior_noise))
            sample = GroupSample(z, prior, posterior, drawn)
        state = state + residual + self.merge_latent(sample.z.to(state.dtype))
        return self.cells(state), sample


class VeryDeepVAE(HierarchicalVAE):
    """The walk of both families.

    Attributes:
        encoder: image in network units to the maps of :meth:`encode`.
        groups: the :class:`TopDownLayer` of every latent group, in order of execution.
        image_head: last state to likelihood parameters.
    """

    config: VeryDeepConfig
    encoder: nn.Module
    groups: nn.ModuleList
    image_head: nn.Conv2d

    @abstractmethod
    def arrive(self, index: int, states: States, like: Tensor) -> Tensor:
        """The state that layer ``index`` starts from.

        Args:
            index: of the layer.
            states: of the layers before it.
            like: its noise, for batch size, type and device.
        """

    def top_down(
        self,
        noise: Sequence[Tensor],
        *,
        encoder_maps: Sequence[Tensor] | None = None,
        latents: Sequence[Tensor | None] | None = None,
        temperature: Temperature = 1.0,
        condition: Condition | None = None,
        keep: Sequence[Tensor] | None = None,
        prior_noise: Sequence[Tensor] | None = None,
        choose: Choose | None = None,
    ) -> tuple[Tensor, tuple[GroupSample, ...]]:
        """Walk through the layers; see the base class.

        Args:
            noise: see there.
            encoder_maps: see there.
            latents: see there.
            temperature: see there.
            condition: see there.
            keep: of a posterior pass, the channels of each layer that are encoded, ``(L,)``
                booleans each; the others are drawn from the prior. None: all.
            prior_noise: standard normal, like ``noise``, of the others.
            choose: see there.

        Raises:
            ValueError: more latents than layers, or temperatures that are not one or one a layer.
        """
        temperatures = self.group_temperatures(temperature)
        given = self.group_latents(latents)
        states: States = {}
        samples: list[GroupSample] = []
        for index, layer in enumerate(self.groups):
            state = self.arrive(index, states, noise[index])
            state, guidance = self.conditioned(state, index, condition)
            state, sample = layer(
                state,
                encoder_map=None if encoder_maps is None else encoder_maps[index],
                noise=noise[index],
                z=given[index],
                temperature=temperatures[index],
                guidance=guidance,
                keep=None if keep is None else keep[index],
                prior_noise=None if prior_noise is None else prior_noise[index],
                choose=None if choose is None else partial(choose, index),
            )
            states[resolution_of(state.shape)] = state
            samples.append(sample)
        return states[resolution_of(self.config.image_shape)], tuple(samples)

    def masked(
        self,
        x: Tensor,
        keep: Sequence[Tensor],
        noise: Sequence[Tensor] | None = None,
        prior_noise: Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """Encode some latent channels of ``x`` and draw the others from the prior.

        The KL of the result counts all channels, also those that were drawn.

        Args:
            x: images in [0, 1], ``(B, C, H, W)``.
            keep: ``(L,)`` booleans, or 0 and 1, a layer; see :func:`keep_by_kl`.
            noise: of the posterior, as in :meth:`forward`.
            prior_noise: of the prior, likewise.
            labels: as in :meth:`forward`.

        Raises:
            ValueError: as :meth:`forward`, or ``keep`` does not fit the layers.
        """
        self.check_images(x)
        self.check_type(x)
        if len(keep) != self.num_groups:
            raise ValueError(f"keep has {len(keep)} entries, the model {self.num_groups} layers")
        keep = [torch.as_tensor(kept, dtype=torch.bool, device=x.device) for kept in keep]
        for layer, (kept, shape) in enumerate(zip(keep, self.latent_shapes, strict=True)):
            if tuple(kept.shape) != shape[:1]:
                raise ValueError(
                    f"keep of layer {layer} has shape {tuple(kept.shape)}, the layer {shape[0]} "
                    "channels"
                )
        state, groups = self.top_down(
            self._noise(len(x), noise),
            encoder_maps=self.encode(x),
            keep=keep,
            prior_noise=self._noise(len(x), prior_noise),
            **self.conditioned_by(labels, len(x)),
        )
        return Output(self.decode_state(state), groups)

    def decode_state(self, state: Tensor) -> Tensor:
        """Final top-down state to likelihood parameters ``(B, K, H, W)``, float32 at least."""
        with without_autocast(state):
            logits: Tensor = self.image_head(state.to(self.image_head.weight.dtype))
        return logits

    def blocks(self) -> list[nn.Module]:
        """The bottlenecks."""
        return [module for module in self.modules() if isinstance(module, Bottleneck)]

    def segments(self) -> list[nn.Module]:
        """The stochastic layers, and the encoder's cells."""
        encoder = [module for module in self.encoder.modules() if isinstance(module, Bottleneck)]
        return [*self.groups, *encoder]

    def without_encoder(self) -> Self:
        """A copy in evaluation mode that can only sample: encoder and posteriors are gone."""
        half = super().without_encoder()
        del half.encoder
        for layer in half.groups:
            assert isinstance(layer, TopDownLayer)
            layer.without_posterior()
        return half


def keep_by_kl(kl_per_channel: Sequence[Tensor], quantile: float) -> tuple[list[Tensor], float]:
    """Which latent channels carry the most (Efficient-VDVAE, section on pruning).

    Args:
        kl_per_channel: statistic of every channel, ``(L,)`` a layer: means over images and
            positions of the KL, in any unit.
        quantile: share of all channels that stays, in [0, 1].

    Returns:
        ``(L,)`` booleans a layer, for :meth:`VeryDeepVAE.masked`, and the threshold, which is
        exceeded by what stays.

    Raises:
        ValueError: ``quantile`` is no share.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}; it must be from 0 to 1")
    if quantile == 1:
        return [torch.ones_like(kl, dtype=torch.bool) for kl in kl_per_channel], -math.inf
    threshold = torch.quantile(torch.cat(list(kl_per_channel)), 1 - quantile)
    return [kl > threshold for kl in kl_per_channel], float(threshold)


def raw_parameters(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Halves of a head's output ``(B, 2 L, h, w)``, in float32 at least."""
    mean, scale = at_least_float32(raw).chunk(2, dim=1)
    return mean, scale
