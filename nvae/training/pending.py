"""A checkpoint between an epoch's last batch and its validation.

Lightning's loops resume in the middle of a validation, beginning it anew, but from just before it
they go on as if it had been. So such a checkpoint says that one batch of the validation has begun.
All that Lightning's loops need to be told about it is here.
"""

from typing import Any

import pytorch_lightning as pl

_PROGRESS = "epoch_loop.val_loop.batch_progress"


def validates_next(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the batch at hand, in mid-epoch or at its end."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def is_before_validation(trainer: pl.Trainer) -> bool:
    """Whether a validation has begun, but no batch of it."""
    is_validating = trainer.validating and not trainer.sanity_checking
    return is_validating and not trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready


def mark_pending(checkpoint: dict[str, Any]) -> None:
    """Let a run that resumes from it begin with the validation."""
    loops = checkpoint["loops"]["fit_loop"]
    total = loops[_PROGRESS]["total"]
    begun = total | {"ready": total["completed"] + 1, "started": total["completed"] + 1}
    current = dict.fromkeys(loops[_PROGRESS]["current"], 0)
    loops[_PROGRESS] |= {"total": begun, "current": current, "is_last_batch": False}


def is_pending(checkpoint: dict[str, Any]) -> bool:
    """Whether a validation is still to be done."""
    total = checkpoint["loops"]["fit_loop"][_PROGRESS]["total"]
    return bool(total["started"] > total["completed"])


def begin_pending(trainer: pl.Trainer) -> None:
    """As the validation begins: count as a run does that was not resumed."""
    fit_loop = trainer.fit_loop
    total: Any = fit_loop.epoch_loop.val_loop.batch_progress.total
    if total.started > total.completed:
        total.ready = total.started = total.processed = total.completed
        # Lightning would leave out the schedulers that follow the validation's result
        fit_loop._restarting = False
