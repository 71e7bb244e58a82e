"""Steps that go bad: left out on every rank alike, counted, and named when they do not end.

Whether a step is bad is decided on the device, and the optimizer is switched off there; the host
reads the counters every `trainer.log_every_n_steps` steps. Gradients are equal on all ranks after
their reduction, and the flag is reduced too, so ranks cannot disagree.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from nvae.data.dataset import ImageBatch
from nvae.objective import Loss
from nvae.regularizers import batchnorms
from nvae.settings import check_choice, check_fields
from nvae.training.bad_step import FirstBadStep, write_bad_step
from nvae.training.module import NVAELightning
from nvae.training.ranks import has_others

ON_DIVERGENCE = ("stop", "rollback")
MOST_BAD_AT_END = 100
"""A run that ends in so many bad steps has failed, whatever `max_consecutive_skips` says."""


ALIGNED = 16
"""A layer's statistics begin at a multiple of so many elements: a library may read several at once,
as it may from memory of their own."""


class DivergenceError(RuntimeError):
    """Too many bad steps in a row; the message names the first tensor that went bad."""


@dataclass(frozen=True)
class GuardReading:
    """Counters on the host.

    Attributes:
        skipped: steps left out so far, in this process.
        streak: of them, the last ones in a row.
        norm: gradient norm of the last step, before clipping.
        parameter: index of the parameter that was worst at the start of the streak.
        group: first latent group whose KL was not finite then; -1: none.
        reconstruction: the reconstruction was finite then.
    """

    skipped: int
    streak: int
    norm: float
    parameter: int
    group: int
    reconstruction: bool


class RunningStatistics:
    """All running means and variances of a model, in one block of memory, to be put back at once.

    A forward pass updates them before anyone knows that the step is bad; one batch with a NaN
    would stay in them for ever. The layers keep their buffers, which become views of the block;
    names and checkpoints do not change.

    Args:
        model: on its device already; moving it afterwards ends the sharing.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = [b for norm in batchnorms(model) for b in (norm.running_mean, norm.running_var)]
        padded = [F.pad(b, (0, -len(b) % ALIGNED)) for b in buffers]
        self._block = torch.cat(padded) if padded else torch.zeros(0)
        for buffer, view in zip(
            buffers, self._block.split([len(each) for each in padded]), strict=True
        ):
            buffer.data = view[: len(buffer)]
        self._kept = self._block.clone()

    def keep(self) -> None:
        """Remember the present values."""
        self._kept.copy_(self._block)

    def restore_where(self, condition: Tensor) -> None:
        """Put the kept values back where the 0-d ``condition`` is true; the host does not ask."""
        if self._block.numel():
            self._block.copy_(
                torch.where(condition.to(self._block.device), self._kept, self._block)
            )


@dataclass(eq=False)
class BadSteps(pl.Callback):
    """Leaves bad steps out: those whose loss or gradient is not finite, or too large.

    The first of a streak is described in `bad_steps/step_N.json` in the Trainer's
    `default_root_dir`: images, noise, and what their loss was made of.

    Attributes:
        skip_threshold: gradient norm beyond which a step is left out, before any clipping. null:
            only where the loss or a gradient is not finite.
        max_consecutive_skips: so many in a row are a divergence.
        on_divergence: ``stop``, or ``rollback`` to the last checkpoint with a lower learning rate.
        rollback_factor: of the learning rate at each rollback.
        max_rollbacks: after so many the run stops.
    """

    skip_threshold: float | None = None
    max_consecutive_skips: int = 50
    on_divergence: str = "stop"
    rollback_factor: float = 0.5
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        prefix = "callbacks.guard."
        check_fields(self, prefix, max_consecutive_skips=(1, None), max_rollbacks=(0, 1000))
        check_choice(f"{prefix}on_divergence", self.on_divergence, ON_DIVERGENCE)
        if self.skip_threshold is not None and self.skip_threshold <= 0:
            raise ValueError(
                f"{prefix}skip_threshold is {self.skip_threshold}; it must be above 0, or null"
            )
        if not 0 < self.rollback_factor < 1:
            raise ValueError(
                f"{prefix}rollback_factor is {self.rollback_factor}; allowed: between 0 and 1"
            )
        self._every_steps = self.max_consecutive_skips  # between two readings
        self._counters: Tensor | None = None  # see GuardReading, in its order
        self._steps = 0  # of this start, bad ones too
        self._trained: list[str] = []  # parameters with a gradient, in the order of their norms
        self._last_step = 0
        self._described = 0  # steps left out at the last look
        self._accepted: int | None = None  # before this start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """It may have watched another run."""
        self._steps, self._counters, self._accepted = 0, None, None

    def state_dict(self) -> dict[str, Any]:
        """Steps of the run that were not left out."""
        return {"accepted": self._accepted_now()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._accepted = state_dict["accepted"]

    def _accepted_now(self) -> int:
        return (self._accepted or 0) + self._steps - self.read().skipped

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is on its device and has its weights."""
        assert isinstance(pl_module, NVAELightning)
        self.begin(
            pl_module.model, pl_module.seed, trainer.global_rank, trainer.accumulate_grad_batches
        )
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._every_steps = min(every or self.max_consecutive_skips, self.max_consecutive_skips)
        self._step_begins = True
        self._last_step = trainer.global_step
        self._index = torch.zeros(0, dtype=torch.long)
        if self._accepted is None:  # a checkpoint of an earlier version does not say
            self._accepted = trainer.global_step

    def begin(self, model: nn.Module, seed: int = 0, rank: int = 0, micro_batches: int = 1) -> None:
        """Watch a model, which is on its device and has its weights.

        Args:
            model: in training.
            seed: of the noise of training.
            rank: of this process.
            micro_batches: of a step, at most.
        """
        self._statistics = RunningStatistics(model)
        self._first = FirstBadStep(seed, rank, micro_batches)

    def keep(self) -> None:
        """A step begins: remember the running statistics."""
        self._statistics.keep()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first micro-batch of a step: remember the running statistics."""
        if self._step_begins:
            self.keep()
            self._step_begins = False
        if isinstance(batch, ImageBatch):  # others have no indices
            self._index = batch.index

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Remember whose loss it is."""
        assert isinstance(pl_module, NVAELightning)
        if pl_module.whole_step is None:  # which has done it
            assert pl_module.last is not None
            self.add(pl_module.last, trainer.fit_loop.total_batch_idx, self._index)

    def add(self, loss: Loss, batch: int | Tensor, index: Tensor) -> None:
        """Take in a micro-batch's loss; see :meth:`FirstBadStep.add`."""
        self._first.add(loss, batch, index)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the gradients, which Lightning clips afterwards, and switch the optimizer."""
        assert isinstance(pl_module, NVAELightning)
        self._steps += 1
        self._step_begins = True
        if pl_module.whole_step is None:  # which does it, after its backward pass
            assert pl_module.last is not None
            self.judge(pl_module.model, pl_module.last, optimizer, trainer.global_step + 1)

    def judge(self, model: nn.Module, loss: Loss, optimizer: Optimizer, step: int | Tensor) -> None:
        """Whether the step is bad: then the optimizer is off, running statistics are put back.

        All of it on the device, in tensors that stay where they are in memory.

        Args:
            model: with the step's gradients.
            loss: of the step's last micro-batch.
            optimizer: gets ``found_inf``.
            step: its number, counted from 1; a 0-d tensor where the device alone knows.
        """
        trained = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
        if not self._trained:  # gradients are gone when the run has ended
            self._trained = [f"{name} {tuple(p.shape)}" for name, p in trained]
        gradients = [p.grad for _, p in trained if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        norm = torch.linalg.vector_norm(norms)
        bad = ~(norm.isfinite() & loss.total.isfinite())
        if self.skip_threshold is not None:
            bad |= norm > self.skip_threshold
        switch = bad.float()
        if has_others():
            # the loss is this rank's own
            dist.all_reduce(switch, dist.ReduceOp.MAX)
        self._count(switch, norm, norms, loss, step)
        self._statistics.restore_where(switch > 0)
        optimizer.found_inf = switch  # type: ignore[attr-defined]

    def _count(
        self, switch: Tensor, norm: Tensor, norms: Tensor, loss: Loss, step: int | Tensor
    ) -> None:
        if self._counters is None:
            self._counters = torch.zeros(6, dtype=torch.float64, device=norm.device)
        skipped, streak, _, *culprit = self._counters.unbind()
        group_is_bad = ~loss.kl_per_group.isfinite()
        group = torch.where(group_is_bad.any(), group_is_bad.int().argmax(), -1)
        # argmax takes a NaN for the largest
        now = (norms.argmax(), group, loss.terms["reconstruction"].isfinite())
        begins = (switch > 0) & (streak == 0)
        self._first.judge(begins, step, norm, now[0])
        self._counters.copy_(
            torch.stack(
                [
                    skipped + switch,
                    (streak + 1) * switch,
                    norm,
                    *(torch.where(begins, n, old) for n, old in zip(now, culprit, strict=True)),
                ]
            )
        )

    @property
    def left_out(self) -> Tensor | None:
        """Whether the last step was, 0-d on the device; None before the first."""
        return None if self._counters is None else self._counters[1] > 0

    def read(self) -> GuardReading:
        """The counters; waits for the device."""
        if self._counters is None:
            return GuardReading(0, 0, 0.0, 0, -1, True)
        skipped, streak, norm, parameter, group, finite = self._counters.tolist()
        return GuardReading(
            int(skipped), int(streak), norm, int(parameter), int(group), bool(finite)
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Read the counters where it is time; give up after too long a streak.

        Raises:
            DivergenceError: on every rank, at the same step.
        """
        step = trainer.global_step
        if step == self._last_step or step % self._every_steps:
            return
        self._last_step = step
        reading = self._read_all(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(
                {"train/gradient_norm": reading.norm, "train/skipped_steps": reading.skipped}, step
            )
        if reading.streak >= self.max_consecutive_skips:
            raise self._divergence(reading, step, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that trained nothing, or whose last steps were all left out, has failed.

        Raises:
            DivergenceError: on every rank.
        """
        reading = self._read_all(trainer)
        if not self._steps or not reading.streak:
            return
        assert isinstance(pl_module, NVAELightning)
        half = -(-pl_module.length.total_steps // 2)  # of a run that is shorter than all of these
        most = min(self.max_consecutive_skips, MOST_BAD_AT_END, half)
        if reading.streak >= most or not self._accepted_now():
            raise self._divergence(reading, trainer.global_step, pl_module)

    def _read_all(self, trainer: pl.Trainer) -> GuardReading:
        """The counters; the first bad step goes to a file. Every rank calls this."""
        reading = self.read()
        if reading.skipped > self._described:
            self._described = reading.skipped
            folder = Path(trainer.default_root_dir)
            write_bad_step(folder, self._first.take(), self._trained)
        return reading

    def _divergence(
        self, reading: GuardReading, step: int, module: pl.LightningModule
    ) -> DivergenceError:
        assert isinstance(module, NVAELightning)
        message = (
            f"training diverged at step {step}: {reading.streak} steps in a row were left out "
            f"({reading.skipped} since the start); {self._culprit(reading, module.model)}"
        )
        bound = self.skip_threshold
        if bound is not None and bound < reading.norm < math.inf:
            unit = "dimension" if module.loss.config.per_dimension else "image"
            message += (
                f", above callbacks.guard.skip_threshold={bound:g} (nats per {unit}), which is to "
                "be raised if training goes well up to there"
            )
        return DivergenceError(message)

    def _culprit(self, reading: GuardReading, model: nn.Module) -> str:
        for weight_name, weight in model.named_parameters():
            if not weight.isfinite().all():
                return f"the weight {weight_name} is not finite"
        if reading.group >= 0:
            first = f"the KL of latent group {reading.group} was not finite (0 is the coarsest)"
        elif not reading.reconstruction:
            first = "the reconstruction was not finite"
        else:
            first = "the loss's parts were finite"
        return (
            f"at the first of them {first}, and the worst gradient was that of "
            f"{self._trained[reading.parameter]}; the last gradient norm is {reading.norm:.3g}"
        )


def guard_of(trainer: pl.Trainer) -> BadSteps | None:
    """The run's guard, where it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, BadSteps)), None)  # type: ignore[attr-defined]


def steps_go_bad(trainer: pl.Trainer) -> bool:
    """Whether the last step was left out; waits for the device."""
    guard = guard_of(trainer)
    return guard is not None and guard.read().streak > 0
