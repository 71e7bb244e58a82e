"""The training objective: negative ELBO with KL annealing and balancing.

loss = E_batch[ -log p(x|z) + KL term ] + lambda * regularisers (section 3 of the paper and
appendix A). Everything is in nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nvae.models import Output

LN2 = math.log(2.0)


@dataclass(frozen=True)
class Elbo:
    """Negative ELBO of a batch, per image, in nats; B images.

    Attributes:
        reconstruction: -log p(x | z), ``(B,)``.
        kl: sum of all groups' KL, ``(B,)``.
        kl_term: the KL term that is optimised, annealed and balanced, ``(B,)``.
        kl_weights: balancing coefficients of the groups, ``(G,)``, mean 1.
    """

    reconstruction: Tensor
    kl: Tensor
    kl_term: Tensor
    kl_weights: Tensor

    @property
    def negative_elbo(self) -> Tensor:
        """-ELBO, ``(B,)``: what is reported."""
        return self.reconstruction + self.kl

    @property
    def loss(self) -> Tensor:
        """Batch mean of what is optimised, a scalar, before regularisers."""
        return (self.reconstruction + self.kl_term).mean()


def kl_coefficient(
    step: int,
    total_steps: int,
    anneal_portion: float = 0.3,
    constant_portion: float = 1e-4,
    minimum: float = 1e-4,
) -> float:
    """beta(step), from ``minimum`` to 1.

    Args:
        step: optimiser steps done.
        total_steps: of the whole run, T.
        anneal_portion: a; beta reaches 1 after about a * T steps. 0: no annealing.
        constant_portion: c; beta stays at its minimum for c * T steps.
        minimum: beta's floor; a KL weight of exactly 0 would leave the posterior free to drift.
    """
    if anneal_portion == 0:
        return 1.0
    beta = (step - constant_portion * total_steps) / (anneal_portion * total_steps)
    return min(max(beta, minimum), 1.0)


def balancing_alpha(groups_per_scale: tuple[int, ...]) -> Tensor:
    """alpha of every group, coarsest first, ``(G,)``: 4^k / groups of the k-th scale from the top.

    Divided by the smallest. A group's share of the KL should follow its number of latent
    variables (paper, appendix A).

    Args:
        groups_per_scale: finest first, as :func:`nvae.models.config.groups_per_scale` gives.
    """
    # float32 whatever the model's type: the published figures are computed so
    per_scale = [4**k / n for k, n in enumerate(reversed(groups_per_scale))]
    alpha = torch.tensor(
        [a for a, n in zip(per_scale, reversed(groups_per_scale), strict=True) for _ in range(n)],
        dtype=torch.float32,
    )
    return alpha / alpha.min()


def balancing_weights(
    kl_per_group: Tensor, alpha: Tensor, over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Coefficients of the groups' KL, ``(G,)``, mean 1, without gradient (paper, appendix A).

    A group's coefficient grows with the KL it carries, so that groups that carry little are
    pushed down less and do not die.

    Args:
        kl_per_group: ``(B, G)``, in nats, over the whole batch on this device.
        alpha: from :func:`balancing_alpha`.
        over_ranks: averages a tensor over the devices that share the batch.
    """
    mean = kl_per_group.detach().abs().mean(0)
    if over_ranks is not None:
        mean = over_ranks(mean)
    share = (mean + 0.01) / alpha.to(kl_per_group)
    return share / share.mean()


def elbo(
    output: Output,
    log_likelihood: Tensor,
    beta: float = 1.0,
    alpha: Tensor | None = None,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Elbo:
    """Assemble the negative ELBO.

    Args:
        output: of the model.
        log_likelihood: log p(x | z), ``(B,)``, in nats.
        beta: KL coefficient in [0, 1].
        alpha: balancing constants; balancing applies while beta < 1. None: no balancing.
        over_ranks: see :func:`balancing_weights`.
    """
    kl_per_group = output.kl_per_group
    weights = torch.ones_like(kl_per_group[0])
    if alpha is not None and beta < 1:
        weights = balancing_weights(kl_per_group, alpha, over_ranks)
    return Elbo(
        reconstruction=-log_likelihood,
        kl=kl_per_group.sum(1),
        kl_term=beta * (weights * kl_per_group).sum(1),
        kl_weights=weights,
    )


def bits_per_dim(nats: float, dimensions: int) -> float:
    """nats / (ln 2 * dimensions)."""
    return nats / (LN2 * dimensions)
