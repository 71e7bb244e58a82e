"""The learning rate over time: warm-up and cosine, or one of torch's schedules."""

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nvae.training.optimizers import OptimizerConfig
from nvae.training.run_length import RunLength

_LOG = logging.getLogger(__name__)


def learning_rate_factor(
    config: OptimizerConfig, steps_per_epoch: float, total_steps: int
) -> Callable[[float], float]:
    """Learning rate of a step, divided by ``config.learning_rate``, as a function of the step.

    Step s (from 0) of W warm-up steps takes (s + 1) / W; after that the cosine runs from 1 to
    the minimum over the steps that are left. A warm-up that is longer than the run takes half of
    it.

    With `decay_start`, S of the T steps up to `decay_end`: with t = s + 1, the part above the
    minimum is 1 before S, then (1 + cos(pi t / T)) / (1 + cos(pi (S - 1) / T)), then 0
    (Efficient-VDVAE, where s stands in t's place and the rate rises again after T).

    Args:
        config: of the optimizer.
        steps_per_epoch: optimizer steps in an epoch; infinite where it has no end.
        total_steps: optimizer steps of the run.
    """
    warmup = warmup_steps(config, steps_per_epoch, total_steps)
    least = config.min_learning_rate / config.learning_rate
    end = config.decay_end * max(total_steps, 1)
    start = None if config.decay_start is None else config.decay_start * total_steps

    def factor(step: float) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.decay_every == "epoch" and math.isfinite(steps_per_epoch):
            step = max(step - step % int(steps_per_epoch), warmup)
        if start is not None:
            t = step + 1
            share = 1.0 if t < start else _cosine(t / end) / _cosine((start - 1) / end)
            return least + (1 - least) * min(share, 1.0)
        progress = (step - warmup) / max(end - warmup, 1)
        return least + (1 - least) * _cosine(progress)

    return factor


def _cosine(progress: float) -> float:
    """From 1 to 0 as the progress goes from 0 to 1, where it stays."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def planned_warmup(config: OptimizerConfig, steps_per_epoch: float) -> float:
    """Optimizer steps of the warm-up that the settings ask for, however long the run is.

    Args:
        config: of the optimizer.
        steps_per_epoch: see :func:`learning_rate_factor`.
    """
    if config.warmup_steps is not None:
        return config.warmup_steps
    return config.warmup_epochs * steps_per_epoch if config.warmup_epochs else 0


def warmup_steps(config: OptimizerConfig, steps_per_epoch: float, total_steps: int) -> int:
    """Optimizer steps of the warm-up, half of the run where it would be longer than the run.

    The arguments are those of :func:`learning_rate_factor`.
    """
    steps = planned_warmup(config, steps_per_epoch)
    return round(steps) if steps <= total_steps else total_steps // 2


def build_schedule(
    config: OptimizerConfig,
    optimizer: Optimizer,
    length: RunLength,
    scale: Callable[[], float],
    is_first_rank: bool = True,
) -> dict[str, Any]:
    """The schedule that the configuration names, as Lightning wants it.

    Args:
        config: of the optimizer.
        optimizer: whose learning rate it moves.
        length: of the run.
        scale: gives the factor on the learning rate, see :class:`NVAELightning`; the schedules of
            torch get it by :func:`take_over`.
        is_first_rank: it says where the warm-up is cut.
    """
    if config.schedule is not None:
        kind, arguments, lightning = config.schedule_class()
        if "total_steps" in inspect.signature(kind).parameters:
            arguments = {"total_steps": length.total_steps, **arguments}
        schedule = kind(optimizer, **arguments)
        for group in optimizer.param_groups:  # not every schedule says where it began
            group.setdefault("initial_lr", group["lr"])
        return {"scheduler": schedule, **lightning}
    if planned_warmup(config, length.steps_per_epoch) > length.total_steps and is_first_rank:
        asked = f"{config.warmup_epochs:g} epochs"
        if config.warmup_steps is not None:
            asked = f"{config.warmup_steps:g} steps"
        steps = warmup_steps(config, length.steps_per_epoch, length.total_steps)
        _LOG.warning(
            "the warm-up of %s is longer than the run: it takes half, %d steps", asked, steps
        )
    factor = learning_rate_factor(config, length.steps_per_epoch, length.total_steps)
    rate = LambdaLR(optimizer, lambda step: scale() * factor(length.position(step)))
    return {"scheduler": rate, "interval": "step"}


def take_over(
    config: OptimizerConfig,
    schedule: Any,
    group: dict[str, Any],
    hyperparameters: dict[str, Any],
    scale: float,
    step: int,
) -> None:
    """Let a schedule, as a checkpoint left it, go on with the configuration's hyper-parameters.

    Args:
        config: of the optimizer.
        schedule: of :func:`build_schedule`.
        group: the optimizer's parameter group, as the checkpoint left it; changed in place.
        hyperparameters: of a group that begins with this configuration, with what the schedule
            added to it.
        scale: factor on the learning rate.
        step: optimizer steps done.
    """
    rate = hyperparameters["initial_lr"]  # which a schedule may have chosen itself
    if isinstance(schedule, LambdaLR) and config.schedule is None:
        schedule.base_lrs = [rate]
        now = rate * schedule.lr_lambdas[0](step)
        group.update(hyperparameters | {"lr": now, "initial_lr": rate})
        return
    before = group["initial_lr"]
    ratio = rate * scale / before if before else scale
    keep = {
        key: value * ratio
        for key, value in group.items()
        if key in ("lr", "initial_lr", "max_lr", "min_lr")
    }
    schedule.base_lrs = [r * ratio for r in getattr(schedule, "base_lrs", [])]
    # a schedule may move the momentum too
    fixed = {"weight_decay", "eps"} & hyperparameters.keys()
    group.update({name: hyperparameters[name] for name in fixed} | keep)
