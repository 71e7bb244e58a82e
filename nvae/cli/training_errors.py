"""What an error in training is to the user."""

import sys
import traceback

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from nvae.checkpoint import CheckpointError
from nvae.cli.config import TrainConfig
from nvae.cli.errors import UserError, is_out_of_memory
from nvae.command_line import FAILURE, brief
from nvae.training.checkpointing import step_checkpoints
from nvae.training.guard import DivergenceError
from nvae.training.module import NVAELightning
from nvae.training.run_folder import RunFolder
from nvae.training.signals import InterruptedRun, StopNow

AGREED = (DivergenceError, InterruptedRun, StopNow, KeyboardInterrupt)
"""What all ranks raise at once, or what ends those that the first process started."""


def ended(
    error: Exception, trainer: pl.Trainer, module: NVAELightning, folder: RunFolder
) -> Exception | SystemExit:
    """What an error in training is to the user: one line, or a crash with all there is to know."""
    line = _users_line(error, module, folder)
    if line is not None:
        return UserError(line)
    print(_crash(error, trainer, folder), file=sys.stderr)
    return SystemExit(1)


def explained(
    error: BaseException, trainer: pl.Trainer, module: NVAELightning, folder: RunFolder
) -> tuple[str, int]:
    """The same as a text, for the first process to print, and an exit code."""
    line = _users_line(error, module, folder)
    if line is None:
        return _crash(error, trainer, folder), 1
    return f"error: {brief(_rank(trainer) + line)}", FAILURE


def _rank(trainer: pl.Trainer) -> str:
    return f"rank {trainer.global_rank}: " if trainer.global_rank else ""


def _users_line(error: BaseException, module: NVAELightning, folder: RunFolder) -> str | None:
    """What the user can put right; None: a crash."""
    if isinstance(error, OSError) or (isinstance(error, CheckpointError) and module.has_started):
        # a full disk, a folder that is gone, a file that reads other than it was written
        return (
            f"{error}; {_last_good(folder)}; make room or put it right, then run the same command "
            "again"
        )
    if isinstance(error, MisconfigurationException):
        return brief(error)
    if is_out_of_memory(error):
        return (
            f"there is not enough memory ({brief(error, 200)}); lower data.batch_size (with "
            "data.global_batch the step stays what it is; else raise "
            f"trainer.accumulate_grad_batches), or set checkpoint_cells=true; {_last_good(folder)}"
        )
    if folder.checkpoint is not None and not module.has_started:
        return (
            f"{folder.checkpoint} cannot be resumed from "
            f"({brief(f'{type(error).__name__}: {error}', 200)}); remove it to go on from an "
            "earlier one, or use resume=never"
        )
    return None


def _crash(error: BaseException, trainer: pl.Trainer, folder: RunFolder) -> str:
    return (
        f"{''.join(traceback.format_exception(error))}"
        f"{_rank(trainer)}crashed at step {trainer.global_step}, epoch "
        f"{trainer.current_epoch + 1}: {brief(f'{type(error).__name__}: {error}')}\n"
        f"run folder: {folder.path}; {_last_good(folder)}\n"
        "once the cause is gone, the same command goes on from there"
    )


def _last_good(folder: RunFolder) -> str:
    last = step_checkpoints(folder.checkpoints)
    return f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"


def how_to_go_on(config: TrainConfig, folder: RunFolder) -> str:
    """What to do after a divergence."""
    rate = config.optimizer.learning_rate / 2
    return (
        f"{_last_good(folder)}; go on with the same command and optimizer.learning_rate={rate:g}, "
        "or callbacks.guard.on_divergence=rollback"
    )
