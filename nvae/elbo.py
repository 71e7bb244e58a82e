"""The ELBO of a batch: annealing, balancing and free bits of its KL (paper, section 3, appendix A).

Everything is in nats.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nvae.models import Output

LN2 = math.log(2.0)


@dataclass(frozen=True)
class Elbo:
    """Negative ELBO of a batch, per image, in nats; B images.

    Attributes:
        reconstruction: -log p(x | z), ``(B,)``.
        kl: sum of all groups' KL, ``(B,)``.
        kl_term: the KL term that is optimized, annealed and balanced, ``(B,)``.
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
        """Batch mean of what is optimized, a scalar, before regularizers."""
        return (self.reconstruction + self.kl_term).mean()


def kl_coefficient(
    step: float,
    total_steps: int,
    anneal_portion: float = 0.3,
    constant_portion: float = 1e-4,
    minimum: float = 1e-4,
) -> float:
    """beta(step), from ``minimum`` to 1.

    Args:
        step: optimizer steps done.
        total_steps: of the whole run, T.
        anneal_portion: a; beta reaches 1 after about a * T steps. 0: no annealing.
        constant_portion: c; beta stays at its minimum for c * T steps.
        minimum: beta's floor; a KL weight of exactly 0 would leave the posterior free to drift.
    """
    if anneal_portion == 0 or total_steps == 0:
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


def balancing_weights(kl_per_group: Tensor, alpha: Tensor) -> Tensor:
    """Coefficients of the groups' KL, ``(G,)``, mean 1, without gradient (paper, appendix A).

    A group's coefficient grows with the KL it carries, over all ranks, so that groups that carry
    little are pushed down less and do not die.

    Args:
        kl_per_group: ``(B, G)``, in nats, over the whole batch on this device.
        alpha: from :func:`balancing_alpha`.
    """
    mean = mean_over_ranks(kl_per_group.detach().abs().mean(0), len(kl_per_group))
    share = (mean + 0.01) / alpha.to(kl_per_group)
    return share / share.mean()


def elbo(
    output: Output,
    log_likelihood: Tensor,
    beta: float | Tensor = 1.0,
    alpha: Tensor | None = None,
    free_bits: float = 0.0,
    kl_weights: Tensor | None = None,
) -> Elbo:
    """Assemble the negative ELBO.

    Args:
        output: of the model.
        log_likelihood: log p(x | z), ``(B,)``, in nats.
        beta: KL coefficient in [0, 1]; a 0-d tensor where the host does not decide by it.
        alpha: balancing constants; balancing applies while beta < 1. None: no balancing.
        free_bits: nats that every group may carry for nothing: a group whose batch mean is below
            them adds this constant instead of its KL (Kingma et al. 2016, section 5). 0: none.
        kl_weights: other coefficients of the groups' KL, ``(G,)``, whatever beta is; then alpha is
            None.
    """
    kl_per_group = output.kl_per_group
    weights = torch.ones_like(kl_per_group[0])
    if kl_weights is not None:
        weights = kl_weights
    elif alpha is not None and isinstance(beta, Tensor):
        weights = torch.where(beta < 1, balancing_weights(kl_per_group, alpha), weights)
    elif alpha is not None and beta < 1:
        weights = balancing_weights(kl_per_group, alpha)
    optimized = kl_per_group
    if free_bits > 0:
        mean = mean_over_ranks(kl_per_group.detach().mean(0), len(kl_per_group))
        is_free = mean < free_bits
        optimized = torch.where(is_free, free_bits, kl_per_group)
    return Elbo(
        reconstruction=-log_likelihood,
        kl=kl_per_group.sum(1),
        kl_term=beta * (weights * optimized).sum(1),
        kl_weights=weights,
    )


def mean_over_ranks(mean: Tensor, images: int) -> Tensor:
    """Mean over the images of all ranks, no gradient. Of one process: ``mean``.

    Args:
        mean: ``(G,)``, over this rank's images.
        images: of this rank; ranks may have different numbers of them.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sums = torch.cat([mean * images, mean.new_full((1,), images)])
        dist.all_reduce(sums)
        mean = sums[:-1] / sums[-1]
    return mean


def bits_per_dim(nats: float, dimensions: int) -> float:
    """nats / (ln 2 * dimensions)."""
    return nats / (LN2 * dimensions)
