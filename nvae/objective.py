"""What a training step minimizes, and what is logged of it.

loss = E_batch[ -log p(x|z) + KL term ] + lambda * regularizers (section 3 of the paper and
appendix A). Everything is in nats. A term of one's own is a subclass of :class:`Objective` that the
configuration names: what its :meth:`Objective.extra_terms` returns goes into the loss and, under
its name, into every log.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nvae.elbo import balancing_alpha, elbo, kl_coefficient, mean_over_ranks
from nvae.models import HierarchicalVAE, Output
from nvae.regularizers import SpectralNorm, batchnorm_penalty, batchnorms, spectral_convs
from nvae.settings import Registry, check_fields, check_value


@dataclass
class ObjectiveConfig:
    r"""Annealing, balancing and regularization.

    Attributes:
        name: ``elbo``, ``gamma_balanced`` (Efficient-VDVAE's), or ``package.module:Class`` for a
            subclass of :class:`Objective`.
        options: of such a class; see :attr:`Objective.defaults`.
        kl_anneal_portion: share of all steps over which beta rises to 1; 0 turns annealing off.
        kl_constant_portion: share of all steps that beta stays at its minimum.
        kl_minimum: beta's floor, in (0, 1].
        kl_balancing: balance the groups' KL while beta < 1.
        spectral_weight: lambda, the weight of spectral and BN regularization; 0 turns both off.
        spectral_weight_initial: lambda at beta = 0; it moves to `spectral_weight` geometrically
            as beta rises to 1. null: constant.
        spectral_iterations: power iterations a step.
        free_bits: nats that every latent group may carry for nothing; see :func:`elbo`.
        flooding: b: the loss is kept around it, \|loss - b\| + b, so that training does not drive
            it further down (Ishida et al. 2020, equation 1), in nats. null: none.
        label_dropout: share of the labels that a model with classes is not told in training, so
            that it learns to do without; what classifier-free guidance needs (Ho & Salimans 2022).
        encoder_noise: standard deviation of Gaussian noise on the encoder's input, in units of
            [0, 1]; the likelihood still counts the clean image. 0: none.
        per_dimension: the loss and its gradients are in nats per counted dimension (channels times
            pixels), as VDVAE's and Efficient-VDVAE's bounds on the gradient norm mean them; the
            terms that are logged stay nats per image, ``loss`` apart.
    """

    name: str = "elbo"
    options: dict[str, Any] = field(default_factory=dict)
    kl_anneal_portion: float = 0.3
    kl_constant_portion: float = 1e-4
    kl_minimum: float = 1e-4
    kl_balancing: bool = True
    spectral_weight: float = 1e-2
    spectral_weight_initial: float | None = None
    spectral_iterations: int = 4
    free_bits: float = 0.0
    flooding: float | None = None
    label_dropout: float = 0.1
    encoder_noise: float = 0.0
    per_dimension: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self, "objective.", kl_anneal_portion=(0, 1), kl_constant_portion=(0, 1),
            kl_minimum=(None, 1), spectral_weight=(0, 1e6), spectral_weight_initial=(None, 1e6),
            spectral_iterations=(1, 1000), free_bits=(0, None), label_dropout=(0, 1),
            encoder_noise=(0, 1),
        )  # fmt: skip
        if self.kl_minimum <= 0:
            raise ValueError(f"objective.kl_minimum is {self.kl_minimum}; it must be above 0")
        initial = self.spectral_weight_initial
        if initial is not None and (initial <= 0 or self.spectral_weight == 0):
            raise ValueError(
                f"objective.spectral_weight_initial={initial} anneals geometrically to "
                f"spectral_weight={self.spectral_weight}; both must be above 0"
            )
        known = OBJECTIVES[self.name].defaults
        for name, value in self.options.items():
            if name not in known:
                raise ValueError(
                    f"objective.options.{name} is unknown; objective.name={self.name} has: "
                    f"{', '.join(known) or 'none'}"
                )
            check_value(f"objective.options.{name}", value, type(known[name]))
        OBJECTIVES[self.name].check(self)


@dataclass(frozen=True)
class Loss:
    """One micro-batch's loss with its parts; tensors on the device, nothing is read here.

    Attributes:
        data: batch mean of what is minimized but for the regularizers, a differentiable scalar.
        penalty: lambda times the regularizers, a differentiable scalar; None where they are off or
            left to a later micro-batch of the step.
        terms: what is logged beside the KL per group: scalars by name, without gradient.
        kl_per_group: ``(G,)``, batch mean in nats, coarsest first, without gradient.
        coefficients: what is logged of the schedule, by name.
        sigma_range: ``(4, G)``, smallest and largest sigma of the posterior and of the prior.
    """

    data: Tensor
    penalty: Tensor | None
    terms: dict[str, Tensor]
    kl_per_group: Tensor
    coefficients: dict[str, float]
    sigma_range: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimized, a scalar without gradient."""
        return self.terms["loss"]


class Objective(nn.Module):
    """The loss of one model, with the spectral vectors as saved state.

    Args:
        model: its parameters are read, not owned.
        config: see :class:`ObjectiveConfig`.

    Attributes:
        defaults: the options that a subclass takes, with their values where none are given.
        options: their values.
        capturable: what changes in it from step to step comes from :meth:`coefficients` alone, so
            that a step captured as a CUDA graph computes right. A subclass says so itself.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    capturable: ClassVar[bool] = True
    alpha: Tensor

    @classmethod
    def check(cls, config: ObjectiveConfig) -> None:
        """Raise a ValueError for settings that a subclass cannot work with."""
        del config

    def __init__(self, model: HierarchicalVAE, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.options = {**self.defaults, **config.options}
        convs = spectral_convs(model)
        self.spectral_norm = (
            SpectralNorm(convs, iterations=config.spectral_iterations) if convs else None
        )
        # a plain list: the layers belong to the model
        self._batchnorms = batchnorms(model)
        self.register_buffer(
            "alpha", balancing_alpha(model.groups_per_scale[::-1]), persistent=False
        )

    def forward(
        self,
        model: HierarchicalVAE,
        x: Tensor,
        noise: Sequence[Tensor],
        *,
        step: float,
        total_steps: int,
        input_noise: Tensor | None = None,
        labels: Tensor | None = None,
        regularize: bool = True,
        on_device: Sequence[Tensor] | None = None,
    ) -> Loss:
        """The loss of a micro-batch.

        Args:
            model: the one of the constructor, in training mode.
            x: images in [0, 1], ``(B, C, H, W)``.
            noise: of the posterior, one ``(B, L, h, w)`` a group, coarsest first.
            step: position in the schedules: optimizer steps done, see nvae.training.run_length.
            total_steps: of the whole run.
            input_noise: standard normal, like ``x``; needed where the configuration asks for it.
            labels: classes ``(B,)`` int64 that the model is told, ``NO_LABEL`` for none.
            regularize: add the regularizers, once an optimizer step.
            on_device: :meth:`coefficients` as 0-d float64 tensors on the model's device, which take
                the place of ``step``'s in all that is computed. What is captured reads them there.
        """
        now = self.coefficients(step, total_steps)
        used = now if on_device is None else dict(zip(now, on_device, strict=True))
        weight = used["lambda"]
        with model.training_pass() as for_regularizers:
            if self.config.encoder_noise:
                assert input_noise is not None
                model.check_images(x)
                maps = model.encode(x + self.config.encoder_noise * input_noise)
                given = model.conditioned_by(labels, len(x))
                state, groups = model.top_down(noise, encoder_maps=maps, **given)
                output = Output(model.decode_state(state), groups)
            else:
                output = model(x, noise) if labels is None else model(x, noise, labels)
        parts = elbo(
            output,
            model.likelihood(output.logits).log_prob(x),
            used["beta"],
            self.alpha if self.config.kl_balancing else None,
            self.config.free_bits,
            self.kl_weights(output, used),
        )
        extra = self.extra_terms(output, x)
        data = parts.loss
        for term in extra.values():
            data = data + term
        if self.config.flooding is not None:
            data = (data - self.config.flooding).abs() + self.config.flooding
        if self.config.per_dimension:
            data = data / model.config.counted_pixels
        terms = {
            **extra,
            "reconstruction": parts.reconstruction.mean(),
            "kl": parts.kl.mean(),
            "kl_balanced": parts.kl_term.mean(),
            "negative_elbo": parts.negative_elbo.mean(),
            "loss": data,
        }
        penalty = None
        if now["lambda"] > 0 and regularize:
            with for_regularizers:
                values = self.regularizers()
            total = torch.stack(list(values.values())).sum()
            penalty = (weight.to(total.dtype) if isinstance(weight, Tensor) else weight) * total
            terms |= values
            terms["loss"] = data + penalty
        return Loss(
            data,
            penalty,
            {name: term.detach() for name, term in terms.items()},
            output.kl_per_group.detach().mean(0),
            now,
            sigma_range(output),
        )

    def extra_terms(self, output: Output, x: Tensor) -> dict[str, Tensor]:
        """What a subclass adds to the loss: differentiable scalars, batch means in nats, by name.

        Args:
            output: of the model.
            x: the images, ``(B, C, H, W)``.
        """
        del output, x
        return {}

    def coefficients(self, step: float, total_steps: int) -> dict[str, float]:
        """What changes over the run, by name: ``beta``, ``lambda``, then a subclass's own.

        All are logged. Where steps are replayed from a CUDA graph, the host computes them anew and
        the graph reads them from the device, so a subclass must take them from there too: from the
        argument of :meth:`kl_weights`.

        Args:
            step: position in the schedules, optimizer steps done.
            total_steps: of the whole run.
        """
        beta = self.beta(step, total_steps)
        return {"beta": beta, "lambda": self.spectral_weight(beta)}

    def kl_weights(
        self, output: Output, coefficients: Mapping[str, float | Tensor]
    ) -> Tensor | None:
        """A subclass's coefficients of the groups' KL, ``(G,)``; None: those of ``kl_balancing``.

        Args:
            output: of the model.
            coefficients: see :meth:`coefficients`; 0-d tensors where a step is captured.
        """
        del output, coefficients
        return None

    def beta(self, step: float, total_steps: int) -> float:
        """KL coefficient after ``step`` optimizer steps of ``total_steps``."""
        c = self.config
        portions = c.kl_anneal_portion, c.kl_constant_portion
        return kl_coefficient(step, total_steps, *portions, c.kl_minimum)

    def spectral_weight(self, beta: float) -> float:
        """lambda at a KL coefficient: exp((1 - beta) log lambda_0 + beta log lambda)."""
        weight, initial = self.config.spectral_weight, self.config.spectral_weight_initial
        if initial is None:
            return weight
        return math.exp((1 - beta) * math.log(initial) + beta * math.log(weight))

    def regularizers(self) -> dict[str, Tensor]:
        """The regularizers before lambda, in the weights' own precision, by name.

        Advances the spectral vectors.
        """
        with torch.autocast(self.alpha.device.type, enabled=False):
            zero = self.alpha.new_zeros(())
            return {
                "spectral": zero if self.spectral_norm is None else self.spectral_norm(),
                "batchnorm": batchnorm_penalty(self._batchnorms) if self._batchnorms else zero,
            }


class GammaBalanced(Objective):
    """Efficient-VDVAE's balancing of the groups' KL (Hazami et al. 2022), for the first steps.

    A group's coefficient is its KL per latent variable, over the mean of all groups', without
    gradient: groups that carry much are pushed down most. It goes on after beta has reached 1, up
    to a step of its own; `kl_balancing`, which is NVAE's, is off beside it. The published training
    took each GPU's own batch for the mean; here it is that of all ranks.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "portion": 0.0125,  # share of all steps that it lasts
        "per_variable": True,  # false: by a group's whole KL
    }
    capturable = True
    variables: Tensor

    @classmethod
    def check(cls, config: ObjectiveConfig) -> None:
        """No second balancing; a portion is from 0 to 1."""
        if config.kl_balancing:
            raise ValueError(
                f"objective.name={config.name} takes objective.kl_balancing=false, it balances "
                "the KL in its own way"
            )
        portion = config.options.get("portion", cls.defaults["portion"])
        if not 0 <= portion <= 1:
            raise ValueError(f"objective.options.portion is {portion}; allowed: 0 to 1")

    def __init__(self, model: HierarchicalVAE, config: ObjectiveConfig) -> None:
        super().__init__(model, config)
        # on the device from the beginning: a copy from the host cannot be part of a captured step
        variables = [
            math.prod(s) if self.options["per_variable"] else 1 for s in model.latent_shapes
        ]
        self.register_buffer("variables", torch.tensor(variables), persistent=False)

    def coefficients(self, step: float, total_steps: int) -> dict[str, float]:
        """With ``gamma``: 1 while the balancing lasts, then 0.

        As published it lasts from step 0 to step ``portion * total_steps``, both included.
        """
        portion = self.options["portion"]
        lasts = portion > 0 and step <= round(portion * total_steps)
        return super().coefficients(step, total_steps) | {"gamma": float(lasts)}

    def kl_weights(self, output: Output, coefficients: Mapping[str, float | Tensor]) -> Tensor:
        """Coefficients of the groups' KL, ``(G,)``, mean 1."""
        kl, gamma = output.kl_per_group.detach(), coefficients["gamma"]
        if not isinstance(gamma, Tensor) and not gamma:  # ranks need not meet any more
            return kl.new_ones(kl.shape[1])
        weights = gamma_weights(kl, self.variables.to(kl))
        if isinstance(gamma, Tensor):
            return torch.where(gamma > 0, weights, torch.ones_like(weights))
        return weights


def gamma_weights(kl_per_group: Tensor, variables: Tensor) -> Tensor:
    """Groups' KL per latent variable over the mean of all groups', ``(G,)``, without gradient.

    Args:
        kl_per_group: ``(B, G)``, in nats, over the whole batch on this device.
        variables: latent variables of each group, ``(G,)``.
    """
    mean = mean_over_ranks(kl_per_group.detach().mean(0), len(kl_per_group)) / variables
    return mean / mean.mean().clamp_min(torch.finfo(mean.dtype).tiny)


@torch.no_grad()
def sigma_range(output: Output) -> Tensor:
    """Smallest and largest sigma of every group's posterior, then prior, ``(4, G)``."""
    posteriors = [g.posterior.sigma.detach() for g in output.groups if g.posterior is not None]
    rows = []
    for sigmas in (posteriors, [g.prior.sigma.detach() for g in output.groups]):
        smallest = torch._foreach_max(torch._foreach_neg(sigmas))
        rows += [-torch.stack(smallest), torch.stack(torch._foreach_max(sigmas))]
    return torch.stack(rows)


OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective.name", Objective, {"elbo": Objective, "gamma_balanced": GammaBalanced}
)


def build_objective(model: HierarchicalVAE, config: ObjectiveConfig) -> Objective:
    """The objective that the configuration names."""
    return OBJECTIVES[config.name](model, config)
