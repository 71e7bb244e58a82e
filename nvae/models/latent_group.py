"""One latent group of the top-down network: prior, posterior, sample, merge.

Posterior and prior are two heads on the same state, so training, sampling, encoding and decoding
all run this one piece of code.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nvae.models.cells import CELL_FAMILIES, Cell
from nvae.models.conditioning import guided
from nvae.models.config import ModelConfig, Scale
from nvae.models.distributions import Normal, at_least_float32
from nvae.models.flows import Flow
from nvae.models.layers import WeightNormConv2d, as_callers_expect, without_autocast
from nvae.models.output import GroupSample


class NormalHead(nn.Module):
    """Convolution from features to the raw parameters of a Normal, in float32 at least.

    In bfloat16 a mean near 4 is off by up to 0.0156, which is about the smallest sigma, and the
    KL pays for it. So the head computes in its weights' type under mixed precision too.
    """

    def __init__(self, in_channels: int, latent_channels: int, kernel_size: int, elu: bool) -> None:
        super().__init__()
        self.activation = nn.ELU() if elu else nn.Identity()
        self.conv = WeightNormConv2d(
            in_channels, 2 * latent_channels, kernel_size, full_precision=True
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, C, h, w)`` to mean and log-sigma, ``(B, L, h, w)`` each, unclamped."""
        with without_autocast(x):
            raw = as_callers_expect(self.conv(self.activation(x.to(self.conv.weight.dtype))))
        mean, log_sigma = at_least_float32(raw).chunk(2, dim=1)
        return mean, log_sigma


class LatentGroup(nn.Module):
    """Cells, prior, posterior, flow and merge of one group.

    Args:
        config: the model's configuration.
        scale: the scale this group lives on.
        first: the coarsest group: standard normal prior, no cells, posterior from the encoder's
            top alone.
        vanilla: the only group of the network; the state is made from z alone.
    """

    def __init__(
        self, config: ModelConfig, scale: Scale, *, first: bool = False, vanilla: bool = False
    ) -> None:
        super().__init__()
        latent, width = config.latent_channels, scale.decoder_width
        self.latent_channels = latent
        self.residual = config.residual_distributions
        self.cells = nn.Sequential()
        self.prior: NormalHead | None = None
        self.merge_encoder: WeightNormConv2d | None = None
        if not first:
            self.cells = nn.Sequential(
                *(
                    Cell(
                        CELL_FAMILIES[config.cell_family].decoder, width, width,
                        squeeze_excitation=config.squeeze_excitation,
                    )
                    for _ in range(config.decoder_cells_per_group)
                )
            )  # fmt: skip
            self.prior = NormalHead(width, latent, 1, elu=True)
            self.merge_encoder = WeightNormConv2d(width, scale.encoder_width, 1)
        self.posterior = NormalHead(scale.encoder_width, latent, 3, elu=False)
        self.flow = Flow(latent, config.num_flows) if config.num_flows else None
        self.vanilla = vanilla
        self.merge_latent = WeightNormConv2d(latent if vanilla else width + latent, width, 1)

    def forward(
        self,
        state: Tensor,
        *,
        encoder_map: Tensor | None = None,
        noise: Tensor | None = None,
        z: Tensor | None = None,
        temperature: float = 1.0,
        guidance: float = 1.0,
        choose: Callable[[Normal, Normal | None], Tensor] | None = None,
    ) -> tuple[Tensor, GroupSample]:
        """Advance the top-down state by one group.

        Args:
            state: ``(B, C, h, w)``; the learned constant at the first group.
            encoder_map: the bottom-up features remembered for this group; without them z comes
                from the prior.
            noise: standard normal draw, ``(B, L, h, w)``; needed unless ``z`` is given.
            z: use this latent instead of drawing one.
            temperature: factor on the prior's sigma when z comes from the prior.
            guidance: see :func:`~nvae.models.conditioning.guided`.
            choose: asked for z, with prior and posterior (None without ``encoder_map``).

        Returns:
            The new state ``(B, C, h, w)`` and what was drawn.
        """
        state = self.cells(state)
        prior_parameters = guided(self._prior_parameters(state), guidance)
        prior = Normal.from_parameters(*prior_parameters, temperature=temperature)
        if choose is not None:
            posterior = None
            if encoder_map is not None:
                posterior = self._posterior(state, encoder_map, prior_parameters)
            z = choose(prior, posterior)
            sample = GroupSample(z, prior, posterior, z)
        elif z is not None:
            sample = GroupSample(z, prior)
        elif encoder_map is not None:
            assert noise is not None
            posterior = self._posterior(state, encoder_map, prior_parameters)
            sample = self._sample_posterior(posterior, noise, prior)
        else:
            assert noise is not None
            sample = GroupSample(prior.sample(noise), prior)
        z = sample.z.to(state.dtype)  # the one rounding: the convolution takes this type
        merged = self.merge_latent(z if self.vanilla else torch.cat([state, z], dim=1))
        return merged, sample

    def _prior_parameters(self, state: Tensor) -> tuple[Tensor, Tensor]:
        if self.prior is not None:
            return self.prior(state)
        batch, _, height, width = state.shape
        zero = state.new_zeros(()).expand(batch, self.latent_channels, height, width)
        return zero, zero

    def _posterior(
        self, state: Tensor, encoder_map: Tensor, prior_parameters: tuple[Tensor, Tensor]
    ) -> Normal:
        """Before the flow."""
        if self.merge_encoder is not None:
            encoder_map = encoder_map + self.merge_encoder(state)
        mean, log_sigma = self.posterior(encoder_map)
        if self.residual and self.prior is not None:
            # q = Normal(mu_p + d_mu, log sigma_p + d_log_sigma), section 3.2; both float32
            mean, log_sigma = mean + prior_parameters[0], log_sigma + prior_parameters[1]
        return Normal.from_parameters(mean, log_sigma)

    def _sample_posterior(self, posterior: Normal, noise: Tensor, prior: Normal) -> GroupSample:
        drawn = posterior.sample(noise)
        if self.flow is None:
            return GroupSample(drawn, prior, posterior, drawn)
        z = self.flow(drawn).to(drawn.dtype)
        return GroupSample(z, prior, posterior, drawn, has_flow=True)
