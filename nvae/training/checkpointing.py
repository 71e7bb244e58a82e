"""Checkpoints of a run: written atomically, read back, rotated, and found again."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.io import CheckpointIO

from nvae.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from nvae.settings import check_fields
from nvae.training.ema import MovingAverage
from nvae.training.guard import steps_go_bad
from nvae.training.ranks import together
from nvae.training.sending import from_first_rank

_STEP_FILE = re.compile(r"step_(\d+)\.ckpt")
BEST = "best.ckpt"


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

        Raises:
            CheckpointWriteError: nothing could be written; what was there before still is.
            CheckpointError: what was written cannot be read back.
        """
        path = Path(path)
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

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors and plain types, on the CPU; all ranks have to call this, and the first reads."""
        return from_first_rank(lambda: load_checkpoint(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file, if it is there."""
        Path(path).unlink(missing_ok=True)


def step_checkpoints(folder: Path) -> list[Path]:
    """The rotating checkpoints of a folder, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step_*.ckpt") if (m := _STEP_FILE.match(p.name))]
    return [path for _, path in sorted(found)]


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

    In the Trainer's `default_root_dir`. While steps are being left out nothing is dropped: the
    older files may be the last good ones.

    Attributes:
        every_epochs: epochs between two checkpoints; one is written at the end, too.
        every_steps: optimizer steps between two further ones, inside an epoch; null: none.
        keep_last: how many of them stay, beside `best.ckpt`; at least 2, so that a damaged one is
            not the only one.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep_last: int = 2

    def __post_init__(self) -> None:
        check_fields(
            self, "callbacks.checkpoint.", every_epochs=(1, None), every_steps=(1, None),
            keep_last=(2, None),
        )  # fmt: skip
        self.best: float | None = None
        self.best_step = 0
        self._saved_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if stage == "fit":
            self.folder.mkdir(parents=True, exist_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, so that a resumed run beats it or leaves it."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step at hand is saved already, if it is not the first."""
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            for leftover in self.folder.glob(".*.ckpt"):  # of a process that was killed
                leftover.unlink()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Inside an epoch. After a whole optimizer step only: gradients are not saved."""
        every, step = self.every_steps, trainer.global_step
        if is_last_batch(trainer):  # left to the end of the epoch
            return
        if every is not None and step % every == 0 and step != self._saved_step:
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
            self._save_best(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Between epochs, and at the end."""
        epoch, step, every = trainer.current_epoch + 1, trainer.global_step, self.every_steps
        if (
            epoch % self.every_epochs == 0
            or epoch == trainer.max_epochs
            or step == trainer.max_steps
            or trainer.should_stop
            or (every is not None and step % every == 0)
        ):
            self._save_unless_bad(trainer)

    def _save_best(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The weights that were validated, without what only a resumed run needs.

        Not ``trainer.save_checkpoint(weights_only=True)``: it does not ask callbacks, and by now
        Lightning has put the raw weights back into the module.
        """
        raw = pl_module.state_dict()
        checkpoint: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "state_dict": raw,
        }
        for average in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(average, MovingAverage):
                checkpoint["current_model_state"] = raw
                checkpoint["state_dict"] = average.averaged_state()
        pl_module.on_save_checkpoint(checkpoint)
        with together():  # the first rank alone writes
            trainer.strategy.save_checkpoint(checkpoint, self.folder / BEST)

    def _save_unless_bad(self, trainer: pl.Trainer) -> None:
        # in the middle of a streak the weights may be what makes the steps bad
        if not steps_go_bad(trainer):
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write `step_N.ckpt`; drop the oldest beyond `keep_last`, unless steps are going bad."""
        self._saved_step = trainer.global_step
        # not `trainer.save_checkpoint`: the other ranks would wait in it for one that fails
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()
        with together():
            path = self.folder / f"step_{trainer.global_step:08d}.ckpt"
            trainer.strategy.save_checkpoint(checkpoint, path)
            if trainer.is_global_zero and not steps_go_bad(trainer):
                for path in step_checkpoints(self.folder)[: -self.keep_last]:
                    path.unlink()


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Whether the batch at hand ends its epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def checkpoint_step(checkpoint: dict[str, Any]) -> int:
    """Optimizer steps done."""
    return int(checkpoint["global_step"])
