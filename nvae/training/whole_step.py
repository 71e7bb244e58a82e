"""Forward, backward, guard and optimizer as one function of tensors: what a CUDA graph can hold.

Lightning's loop goes through the same parts one by one; :class:`WholeStep` does them in the same
order with the same arithmetic, and takes what changes from step to step (images, noise, KL
coefficient, lambda, learning rate, numbers) from tensors on the device. A graph of its operations
can be replayed at every later step; see :mod:`nvae.training.captured`. Nothing of it needs a
Trainer::

    step = WholeStep(model, objective, optimizer)
    schedule = torch.tensor(step.schedule(at), dtype=torch.float64, device=device)
    loss = step(StepInput(x, noise, index), schedule, at)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nvae.models import HierarchicalVAE
from nvae.objective import Loss, Objective
from nvae.training.optimizers import Adamax


@dataclass(frozen=True)
class StepInput:
    """What a micro-batch is made of.

    Attributes:
        x: images in [0, 1], ``(B, C, H, W)``.
        noise: of the posterior, one ``(B, L, h, w)`` a group, coarsest first.
        index: of the images in their split, ``(B,)`` int64; empty where they have none.
        input_noise: like ``x``; None where the objective asks for none.
        labels: classes ``(B,)`` int64; None: of a model that knows none.
    """

    x: Tensor
    noise: Sequence[Tensor]
    index: Tensor
    input_noise: Tensor | None = None
    labels: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        more = [t for t in (self.input_noise, self.labels) if t is not None]
        return [self.x, *self.noise, *more, self.index]

    def like(self) -> "StepInput":
        """Other memory of the same shapes and layouts."""
        made = iter([torch.empty_like(t) for t in self.tensors()])
        x, noise = next(made), [next(made) for _ in self.noise]
        input_noise = None if self.input_noise is None else next(made)
        labels = None if self.labels is None else next(made)
        return StepInput(x, noise, next(made), input_noise, labels)


@dataclass(frozen=True)
class StepPosition:
    """Where in the run a micro-batch is; numbers of the host.

    Attributes:
        position: in the schedules, optimizer steps done; see :mod:`nvae.training.run_length`.
        total_steps: of the whole run.
        step: number of the optimizer step at hand, counted from 1.
        batch: number of the micro-batch in the run.
        weight: of its mean in the step, times the nominal number of micro-batches.
        is_first: it begins an optimizer step.
        is_last: the optimizer step follows it.
        regularize: the regularizers come with it.
    """

    position: float
    total_steps: int
    step: int
    batch: int = 0
    weight: float = 1.0
    is_first: bool = True
    is_last: bool = True
    regularize: bool = True


class Judge(Protocol):
    """What leaves bad steps out, on the device; :class:`~nvae.training.guard.BadSteps` is one."""

    def add(self, loss: Loss, batch: Tensor, index: Tensor) -> None:
        """Take in a micro-batch's loss before its backward pass."""

    def judge(self, model: nn.Module, loss: Loss, optimizer: Optimizer, step: Tensor) -> None:
        """Set the optimizer's ``found_inf`` by the gradients and the last micro-batch's loss."""


def weighted(loss: Loss, weight: float | Tensor, micro_batches: int) -> Tensor:
    """A micro-batch's part of the step's loss, times the nominal number of micro-batches.

    Args:
        loss: of it.
        weight: of its mean; see :meth:`nvae.training.run_length.RunLength.weight_of`.
        micro_batches: the nominal number.
    """
    total = loss.data * (weight.to(loss.data.dtype) if isinstance(weight, Tensor) else weight)
    if loss.penalty is not None:
        # once per optimizer step, whatever the number of micro-batches
        total = total + loss.penalty * micro_batches
    return total


class WholeStep:
    """One micro-batch of training, and the optimizer step where it is the last of its step.

    Called inside the autocast context that the forward pass is to have, if any.

    Args:
        model: in training mode, on its device.
        objective: of the model.
        optimizer: with one parameter group and one that :func:`reads_device` accepts.
        guard: begun (:meth:`nvae.training.guard.BadSteps.begin`), or None.
        clip: clips the gradients in place, or None.
        micro_batches: of a step, the nominal number K.
    """

    def __init__(
        self,
        model: HierarchicalVAE,
        objective: Objective,
        optimizer: Optimizer,
        *,
        guard: Judge | None = None,
        clip: Callable[[], None] | None = None,
        micro_batches: int = 1,
    ) -> None:
        assert reads_device(optimizer)
        assert len(optimizer.param_groups) == 1
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.guard, self.clip, self.micro_batches = guard, clip, micro_batches
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def coefficients(self, at: StepPosition) -> dict[str, float]:
        """The objective's, such as beta, by name."""
        return self.objective.coefficients(at.position, at.total_steps)

    def schedule(self, at: StepPosition) -> list[float]:
        """What the device has to know of a micro-batch: the vector that a call takes, float64."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        return [*self.coefficients(at).values(), at.weight, rate, float(at.step), float(at.batch)]

    def __call__(self, batch: StepInput, schedule: Tensor, at: StepPosition) -> Loss:
        """Do it; the host waits for nothing, and no number of ``at`` goes into the arithmetic.

        Args:
            batch: on the device.
            schedule: :meth:`schedule` on the device, 1-d float64.
            at: says which parts there are; its numbers are those of ``schedule``.

        Returns:
            The loss, without gradient.
        """
        *coefficients, weight, rate, step, number = schedule.unbind()
        loss = self.objective(
            self.model,
            batch.x,
            batch.noise,
            step=at.position,
            total_steps=at.total_steps,
            input_noise=batch.input_noise,
            labels=batch.labels,
            regularize=at.regularize,
            on_device=coefficients,
        )
        total = weighted(loss, weight, self.micro_batches) / self.micro_batches
        with torch.autocast(batch.x.device.type, enabled=False):
            self._prepare_gradients(at.is_first)
            if self.guard is not None:
                self.guard.add(loss, number, batch.index)
            total.backward()
            if at.is_last:
                self._step(loss, step, rate)
        penalty = None if loss.penalty is None else loss.penalty.detach()
        return replace(loss, data=loss.data.detach(), penalty=penalty)

    def _prepare_gradients(self, is_first: bool) -> None:
        """Where one backward pass makes a step there are none before it, and it writes them without
        reading. Where several passes do, each perhaps a graph of its own, all add to the memory of
        the first step's, which is kept: Lightning lets go of gradients before a validation."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        if is_first and self._gradients:
            torch._foreach_zero_([gradient for _, gradient in self._gradients])
        elif is_first:
            self.optimizer.zero_grad(set_to_none=True)

    def forget_gradients(self) -> None:
        """Other parameters are trained from the next step on."""
        self._gradients = []

    def _step(self, loss: Loss, step: Tensor, rate: Tensor) -> None:
        if self.micro_batches > 1 and not self._gradients:
            parameters = (p for group in self.optimizer.param_groups for p in group["params"])
            self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        if self.guard is not None:
            self.guard.judge(self.model, loss, self.optimizer, step)
        if self.clip is not None:
            self.clip()
        with rate_on_device(self.optimizer, rate):
            self.optimizer.step()

    def fixed(self) -> dict[str, Any]:
        """The optimizer's settings that the arithmetic takes as they are, by name."""
        group = self.optimizer.param_groups[0]
        changing = ("lr", "capturable")
        return {name: group.get(name) for name in self.optimizer.defaults if name not in changing}


def reads_device(optimizer: Optimizer) -> bool:
    """Whether an optimizer takes learning rate and ``found_inf`` from the device.

    Our Adamax and torch's fused AdamW do. The others ask the host, or get numbers from it.
    """
    is_fused = isinstance(optimizer, AdamW) and bool(optimizer.defaults.get("fused"))
    return type(optimizer) is Adamax or is_fused


@contextmanager
def rate_on_device(optimizer: Optimizer, rate: Tensor) -> Iterator[None]:
    """Inside, the optimizer's learning rate is a tensor; outside a number, as schedulers, logs and
    checkpoints have it.

    Args:
        optimizer: see :func:`reads_device`.
        rate: 0-d float64; torch's CUDA kernel of AdamW takes it as float32.
    """
    group = optimizer.param_groups[0]
    kept: dict[str, Any] = {name: group[name] for name in ("lr", "capturable") if name in group}
    takes_single = type(optimizer) is not Adamax and rate.is_cuda
    group["lr"] = rate.float() if takes_single else rate
    if "capturable" in group:
        group["capturable"] = rate.is_cuda and torch.cuda.is_current_stream_capturing()
    try:
        yield
    finally:
        group.update(kept)
