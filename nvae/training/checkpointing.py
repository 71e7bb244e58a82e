"""Checkpoints of a run: written atomically, read back, rotated, and found again."""

import math
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor
from torch.optim import Optimizer

from nvae.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from nvae.command_line import brief
from nvae.files import link_or_copy
from nvae.settings import check_fields
from nvae.training.guard import steps_go_bad
from nvae.training.pending import (
    begin_pending,
    is_before_validation,
    mark_pending,
    validates_next,
)
from nvae.training.ranks import from_first_rank, together
from nvae.training.snapshot import BackgroundWriter, averages, constant_until_next_step

_STEP_FILE = re.compile(r"step_(\d+)\.ckpt")
BEST = "best.ckpt"

AGREE_EVERY = 10
"""Optimizer steps between two agreements of several ranks, each of which waits for the device."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; older ones are intact."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes through a temporary file and reads the result back; loads plain types only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write, then read every byte back and compare checksums.

        What is read may still lie in the kernel's cache: this finds a file that was composed or
        written wrongly, not a disk that loses it later.

        Args:
            checkpoint: what it holds.
            path: of the file.
            storage_options: the :class:`BackgroundWriter` that is to do it while training goes on,
                and the tensors that are constant meanwhile; None: it is done on return.

        Raises:
            CheckpointWriteError: nothing could be written; what was there before still is.
            CheckpointError: what was written cannot be read back.
        """
        path = Path(path)
        if storage_options is None:
            path.parent.mkdir(parents=True, exist_ok=True)  # callbacks of Lightning's rely on it
            write_checked(checkpoint, path)
        else:
            writer, constant = storage_options
            writer.save(checkpoint, lambda copied: write_checked(copied, path), constant)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors and plain types, on the CPU; all ranks have to call this, and the first reads."""
        return from_first_rank(lambda: load_checkpoint(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file, if it is there."""
        Path(path).unlink(missing_ok=True)


def write_checked(checkpoint: dict[str, Any], path: Path) -> None:
    """See :meth:`AtomicCheckpointIO.save_checkpoint`."""
    if not path.parent.is_dir():  # made anew it would hold this file and nothing else
        raise CheckpointWriteError(f"cannot write {path}: its folder is gone")
    try:
        save_checkpoint(checkpoint, path)
    except (OSError, RuntimeError) as error:  # torch turns some write errors into the latter
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise CheckpointWriteError(
            f"cannot write {path}: {reason}; older checkpoints are intact"
        ) from error
    load_checkpoint(path)


def step_checkpoints(folder: Path) -> list[Path]:
    """The rotating checkpoints of a folder, oldest first."""
    return [path for _, path in _by_step(folder)]


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """Steps and files of the rotating checkpoints, the lowest step first."""
    paths = folder.glob("step_*.ckpt")
    return sorted((int(m[1]), path) for path in paths if (m := _STEP_FILE.match(path.name)))


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest checkpoint of a folder that can be read.

    Attributes:
        path: of the file.
        content: of the file, on the CPU.
        passed_over: newer ones, and why they cannot be read; a line each.
    """

    path: Path
    content: dict[str, Any]
    passed_over: tuple[str, ...]


def newest_checkpoint(folder: Path) -> FoundCheckpoint | None:
    """The newest readable checkpoint; None where the folder has none at all.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    paths = step_checkpoints(folder)
    failures: list[str] = []
    for path in reversed(paths):
        try:
            return FoundCheckpoint(path, load_checkpoint(path), tuple(failures))
        except CheckpointError as error:
            failures.append(str(error))
    if failures:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} can be read: {failures[0]}"
        )
    return None


@dataclass(eq=False)
class Checkpoints(pl.Callback):
    """Writes `checkpoints/step_N.ckpt` at intervals and `best.ckpt` at the best validation ELBO.

    In the Trainer's `default_root_dir`. What is due at the end of an epoch is written before its
    validation, which a resumed run then does. Tensors are copied to the host, which a step waits
    for, and written by a thread, which the next checkpoint waits for; so does whoever must know
    that it is on disk. What fails there is raised after one of the next steps, or at the end.

    Older files go once a newer one has been read back, and so do those of later steps: they are
    damaged, or of a run that this one does not go on with, and nobody shall resume from them. While
    steps are being left out nothing is dropped: they may be the last good ones.

    Attributes:
        every_epochs: epochs between two checkpoints; one is written at the end, too.
        every_steps: optimizer steps between two further ones, inside an epoch; null: none.
        every_minutes: minutes after the last one, by the first rank's clock; null: none.
        keep_last: how many of them stay, beside `best.ckpt`; at least 2, so that a damaged one is
            not the only one.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    every_minutes: float | None = None
    keep_last: int = 2

    def __post_init__(self) -> None:
        check_fields(
            self, "callbacks.checkpoint.", every_epochs=(1, None), every_steps=(1, None),
            keep_last=(2, None),
        )  # fmt: skip
        if self.every_minutes is not None and self.every_minutes <= 0:
            raise ValueError(
                f"callbacks.checkpoint.every_minutes is {self.every_minutes}; it must be above 0, "
                "or null"
            )
        self._forget_best()
        self._saved_step = 0
        self._saved_path: Path | None = None
        self._writer = BackgroundWriter()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder; another Trainer's run has a best of its own."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if stage == "fit":
            self.folder.mkdir(parents=True, exist_ok=True)
            if not trainer.global_step:  # else the Trainer goes on where its last fit has ended
                self._forget_best()

    def _forget_best(self) -> None:
        self.best: float | None = None
        self.best_step = 0

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, so that a resumed run beats it or leaves it."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say that a validation is to come."""
        if trainer.state.fn == "fit" and is_before_validation(trainer):
            mark_pending(checkpoint)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step at hand is saved already, if it is not the first."""
        self._saved_step, self._since = trainer.global_step, time.monotonic()
        path = self._path(trainer)
        self._saved_path = path if path.exists() else None
        if trainer.is_global_zero:
            for leftover in self.folder.glob(".*.ckpt"):  # of a process that was killed
                leftover.unlink()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """The weights are about to change."""
        self._writer.settle()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Inside an epoch. After a whole optimizer step only: gradients are not saved."""
        if trainer.fit_loop._should_accumulate():
            return
        is_due, has_failed = self._agree(trainer)
        if has_failed:
            self.finish()
        if is_due and not validates_next(trainer) and not is_last_batch(trainer):
            self._save_unless_bad(trainer, constant=constant_until_next_step(trainer))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the validation of an epoch, which may take long and fail."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        begin_pending(trainer)
        if self._agree(trainer)[0] or (is_last_batch(trainer) and self._is_due_now(trainer)):
            self._save_unless_bad(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the best; what was validated is the average, where there is one."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = float(trainer.callback_metrics["valid/negative_elbo"])
        value = trainer.strategy.broadcast(value)
        if not math.isfinite(value):
            return
        # a NaN is below nothing: a checkpoint that has one as its best would keep it for ever
        if self.best is None or not math.isfinite(self.best) or value < self.best:
            self.best, self.best_step = value, trainer.global_step
            self._keep_best(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where no validation came before, and at the end, with what the validation has found."""
        if self._is_end(trainer) or self._agree(trainer)[0] or self._is_due_now(trainer):
            self._save_unless_bad(trainer, again=self._is_end(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait until all is on disk."""
        self.finish()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """The same; what fails now is not what the run ends with."""
        try:
            self._writer.wait()
        except Exception as error:
            if error is not exception:
                print(brief(error), file=sys.stderr)

    def _is_end(self, trainer: pl.Trainer) -> bool:
        is_last = trainer.current_epoch + 1 == trainer.max_epochs
        return is_last or trainer.global_step == trainer.max_steps or trainer.should_stop

    def _is_due_now(self, trainer: pl.Trainer) -> bool:
        """At the end of an epoch."""
        return (trainer.current_epoch + 1) % self.every_epochs == 0 or self._is_end(trainer)

    def _agree(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Whether one is due by steps or minutes, and whether the last one has failed.

        Only the first rank knows its clock and its disk; the others hear of them now and then.
        """
        step, every = trainer.global_step, self.every_steps
        is_due, has_failed = False, self._writer.has_failed
        if self.every_minutes is not None:
            is_due = time.monotonic() - self._since >= 60 * self.every_minutes
        if trainer.world_size > 1:
            if step % AGREE_EVERY == 0 or is_last_batch(trainer):
                flags = torch.tensor([is_due, has_failed], device=trainer.strategy.root_device)
                dist.broadcast(flags, 0)
                is_due, has_failed = flags.tolist()
            else:
                is_due = has_failed = False
        return is_due or (every is not None and step % every == 0), has_failed

    def _keep_best(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A link to the step's file where there is one; else the weights alone are written.

        Not by ``trainer.save_checkpoint(weights_only=True)``: it does not ask callbacks, and by now
        Lightning has put the raw weights back into the module.
        """
        best, path = self.folder / BEST, self._saved_path
        if self.is_saved(trainer) and path is not None:
            if trainer.is_global_zero:
                self._writer.submit(lambda: link_or_copy(path, best))
            return
        raw = pl_module.state_dict()
        checkpoint: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "pytorch-lightning_version": pl.__version__,  # without it Lightning reads nothing
            "state_dict": raw,
        }
        for average in averages(trainer):
            checkpoint["current_model_state"] = raw
            checkpoint["state_dict"] = average.averaged_state()
        pl_module.on_save_checkpoint(checkpoint)
        self.finish()
        with together():  # the first rank alone writes
            options = self._options(trainer)
            trainer.strategy.save_checkpoint(checkpoint, best, storage_options=options)
            self._writer.settle()

    def _save_unless_bad(
        self, trainer: pl.Trainer, *, again: bool = False, constant: Iterable[Tensor] = ()
    ) -> None:
        if self.is_saved(trainer) and not again:
            return
        # in the middle of a streak the weights may be what makes the steps bad
        if not steps_go_bad(trainer):
            self._write(trainer, constant)

    def is_saved(self, trainer: pl.Trainer) -> bool:
        """Whether the step at hand was saved, as far as is known."""
        return self._saved_step == trainer.global_step

    def save(self, trainer: pl.Trainer) -> None:
        """Have `step_N.ckpt` on disk, also where steps are going bad.

        Raises:
            CheckpointWriteError: it cannot be written, on every rank.
            CheckpointError: it cannot be read back, on every rank.
        """
        if not self.is_saved(trainer):
            self._write(trainer)
        self.finish()

    def _write(self, trainer: pl.Trainer, constant: Iterable[Tensor] = ()) -> None:
        """Begin `step_N.ckpt`; then drop the others beyond `keep_last`, unless steps go bad."""
        self.finish()
        step = trainer.global_step
        self._saved_step, self._since = step, time.monotonic()
        self._saved_path = path = self._path(trainer)
        constant = list(constant)
        options = self._options(trainer, constant)
        # not `trainer.save_checkpoint`: the other ranks would wait in it for one that fails
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()
        with together():
            trainer.strategy.save_checkpoint(checkpoint, path, storage_options=options)
            if not constant:
                self._writer.settle()
            if trainer.is_global_zero and not steps_go_bad(trainer):
                self._writer.submit(lambda: self._drop_others(step))

    def _options(self, trainer: pl.Trainer, constant: Iterable[Tensor] = ()) -> Any:
        """Another writer of checkpoints than ours knows of no thread, and takes none."""
        ours = isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
        return (self._writer, constant) if ours else None

    def _drop_others(self, written: int) -> None:
        """Keep the newest up to the step that was written, and none of later steps."""
        found = _by_step(self.folder)
        kept = [path for step, path in found if step <= written][-self.keep_last :]
        for _, path in found:
            if path not in kept:
                path.unlink()

    def finish(self) -> None:
        """Wait until what was begun is on disk; every rank calls this.

        Raises:
            Exception: of what failed, on every rank.
        """
        with together():
            self._writer.wait()

    def _path(self, trainer: pl.Trainer) -> Path:
        return self.folder / f"step_{trainer.global_step:08d}.ckpt"


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Whether the batch at hand ends its epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def checkpoint_step(checkpoint: dict[str, Any]) -> int:
    """Optimizer steps done."""
    return int(checkpoint["global_step"])
