"""What a training step minimises: annealed negative ELBO plus regularisers (spec section 3)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvae.models import NVAE, NVAEOutput
from nvae.models.topology import groups_per_scale
from nvae.objective import Elbo, balancing_alpha, elbo, kl_coefficient
from nvae.regularizers import SpectralNorm, batchnorm_penalty, batchnorms, spectral_convs
from nvae.settings import check_fields
from nvae.training.distributed import mean_over_ranks


@dataclass
class ObjectiveConfig:
    """Annealing, balancing and regularisation.

    Attributes:
        kl_anneal_portion: share of all steps over which beta rises to 1; 0 turns annealing off.
        kl_constant_portion: share of all steps that beta stays at its minimum.
        kl_minimum: beta's floor, in (0, 1].
        kl_balancing: balance the groups' KL while beta < 1.
        spectral_weight: lambda, the weight of spectral and BN regularisation; 0 turns both off.
        spectral_weight_initial: lambda at beta = 0; it moves to `spectral_weight` geometrically
            as beta rises to 1. null: constant.
        spectral_iterations: power iterations a step.
    """

    kl_anneal_portion: float = 0.3
    kl_constant_portion: float = 1e-4
    kl_minimum: float = 1e-4
    kl_balancing: bool = True
    spectral_weight: float = 1e-2
    spectral_weight_initial: float | None = None
    spectral_iterations: int = 4

    def __post_init__(self) -> None:
        check_fields(
            self, "objective.", kl_anneal_portion=(0, 1), kl_constant_portion=(0, 1),
            kl_minimum=(None, 1), spectral_weight=(0, 1e6), spectral_weight_initial=(None, 1e6),
            spectral_iterations=(1, 1000),
        )  # fmt: skip
        if self.kl_minimum <= 0:
            raise ValueError(f"objective.kl_minimum is {self.kl_minimum}; it must be above 0")
        initial = self.spectral_weight_initial
        if initial is not None and (initial <= 0 or self.spectral_weight == 0):
            raise ValueError(
                f"objective.spectral_weight_initial={initial} anneals geometrically to "
                f"spectral_weight={self.spectral_weight}; both must be above 0"
            )


def spectral_weight(config: ObjectiveConfig, beta: float) -> float:
    """lambda at a KL coefficient: exp((1 - beta) log lambda_0 + beta log lambda)."""
    if config.spectral_weight_initial is None:
        return config.spectral_weight
    return math.exp(
        (1 - beta) * math.log(config.spectral_weight_initial)
        + beta * math.log(config.spectral_weight)
    )


@dataclass(frozen=True)
class Regularizers:
    """Values of the two regularisers, before lambda; differentiable scalars."""

    spectral: Tensor
    batchnorm: Tensor


class TrainingLoss(nn.Module):
    """Negative ELBO and regularisers of one model, with the spectral vectors as saved state.

    Args:
        model: the network; its parameters are read, not owned.
        config: see :class:`ObjectiveConfig`.
    """

    alpha: Tensor

    def __init__(self, model: NVAE, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.spectral_norm = SpectralNorm(
            spectral_convs(model), iterations=config.spectral_iterations
        )
        # a plain list: the layers belong to the model
        self._batchnorms = batchnorms(model)
        self.register_buffer(
            "alpha", balancing_alpha(groups_per_scale(model.config)), persistent=False
        )

    def beta(self, step: int, total_steps: int) -> float:
        """KL coefficient after ``step`` optimiser steps of ``total_steps``."""
        config = self.config
        return kl_coefficient(
            step,
            total_steps,
            config.kl_anneal_portion,
            config.kl_constant_portion,
            config.kl_minimum,
        )

    def elbo(self, output: NVAEOutput, log_likelihood: Tensor, beta: float) -> Elbo:
        """Annealed and balanced ELBO; ``log_likelihood`` ``(B,)`` in nats."""
        alpha = self.alpha if self.config.kl_balancing else None
        return elbo(output, log_likelihood, beta, alpha, mean_over_ranks)

    def regularizers(self) -> Regularizers:
        """Both regularisers, in the weights' own precision; advances the spectral vectors."""
        with torch.autocast(self.alpha.device.type, enabled=False):
            zero = self.alpha.new_zeros(())
            return Regularizers(
                spectral=self.spectral_norm(),
                batchnorm=batchnorm_penalty(self._batchnorms) if self._batchnorms else zero,
            )
