"""Optimisers and the learning rate: linear warm-up, then half a cosine (spec section 3)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer

from nvae.settings import check_choice, check_fields
from nvae.training.adamax import Adamax
from nvae.training.apex import APEX_OPTIMIZERS, apex_optimizer, check_apex
from nvae.training.host_switch import HostSwitch

OPTIMIZERS = ("adamax", "adamw", *APEX_OPTIMIZERS)


@dataclass
class OptimizerConfig:
    """Which optimiser, and its learning rate over time.

    Attributes:
        name: ``adamax`` (the paper's) | ``adamw`` | ``apex_fused_adam`` | ``apex_fused_lamb``.
        learning_rate: after warm-up.
        min_learning_rate: at the end.
        warmup_epochs: epochs of linear warm-up, step by step.
        decay_every: ``step`` or ``epoch``: how often the cosine is advanced.
        beta1: decay of the first moment.
        beta2: decay of the second moment (Adamax: of the infinity norm).
        epsilon: keeps the denominator from 0.
        weight_decay: Adamax adds it to the gradient (L2), AdamW shrinks the weights.
    """

    name: str = "adamax"
    learning_rate: float = 1e-2
    min_learning_rate: float = 1e-4
    warmup_epochs: float = 5.0
    decay_every: str = "step"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-3
    weight_decay: float = 3e-4

    def __post_init__(self) -> None:
        check_fields(
            self, "optimizer.", learning_rate=(None, 1000), min_learning_rate=(0, None),
            warmup_epochs=(0, None), epsilon=(None, 1), weight_decay=(0, 1000),
        )  # fmt: skip
        check_choice("optimizer.name", self.name, OPTIMIZERS)
        if self.name in APEX_OPTIMIZERS:
            check_apex(self.name)
        check_choice("optimizer.decay_every", self.decay_every, ("step", "epoch"))
        for name in ("learning_rate", "epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"optimizer.min_learning_rate is {self.min_learning_rate}; allowed: 0 to "
                f"learning_rate={self.learning_rate}"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}; allowed: 0 up to, not with, 1"
                )


class HostSwitchedAdamW(HostSwitch, AdamW):
    """AdamW for float16, whose loss scaler has to see the gradients before a fused step could."""


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], *, fused: bool = True
) -> Optimizer:
    """The optimiser that ``config`` names.

    All of them honour an attribute ``found_inf``: a 0-d tensor that is 1 where the step is to be
    left out.

    Args:
        config: see :class:`OptimizerConfig`.
        parameters: to be trained.
        fused: one kernel for the whole step, where the optimiser has one.
    """
    parameters, betas = list(parameters), (config.beta1, config.beta2)
    if config.name == "adamw":
        kind = AdamW if fused else HostSwitchedAdamW
        return kind(
            parameters, config.learning_rate, betas, config.epsilon, config.weight_decay,
            fused=fused,
        )  # fmt: skip
    if config.name in APEX_OPTIMIZERS:
        return apex_optimizer(config.name)(
            parameters,
            lr=config.learning_rate,  # type: ignore[call-arg]
            betas=betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
    return Adamax(parameters, config.learning_rate, betas, config.epsilon, config.weight_decay)


def learning_rate_factor(
    config: OptimizerConfig, steps_per_epoch: int, total_steps: int
) -> Callable[[int], float]:
    """Learning rate of a step, divided by ``config.learning_rate``, as a function of the step.

    Step s (from 0) of W warm-up steps takes (s + 1) / W; after that the cosine runs from 1 to
    the minimum over the steps that are left.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    least = config.min_learning_rate / config.learning_rate

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.decay_every == "epoch":
            step = max(step - step % steps_per_epoch, warmup)
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
