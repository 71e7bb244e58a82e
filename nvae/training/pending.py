"""A checkpoint between an epoch's last batch and its validation.

Lightning's loops resume in the middle of a validation, beginning it anew, but from just before it
they go on as if it had been. So such a checkpoint says that one batch of the validation has begun.
All that Lightning's loops need to be told about it is here.
"""

from typing import Any

import pytorch_lightning as pl

_PROGRESS = "epoch_loop.val_loop.batch_progress"
_BATCHES = "epoch_loop.batch_progress"


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


def validates_after(trainer: pl.Trainer, loops: dict[str, Any]) -> bool:
    """Whether the epoch at which a checkpoint's loops are is to be validated at its end."""
    epoch = loops["fit_loop"]["epoch_progress"]["current"]["processed"]
    every = trainer.check_val_every_n_epoch
    if every is None or trainer.val_check_interval != 1.0:  # counted in batches, not in epochs
        return False
    return bool(trainer.enable_validation) and (epoch + 1) % every == 0


def end_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a run that resumes from it find the epoch's last batch done, the validation not.

    Nothing where the checkpoint says so already, or that the epoch's end was passed.
    """
    progress = checkpoint["loops"]["fit_loop"][_BATCHES]
    if progress["is_last_batch"]:
        return
    for counters in (progress["total"], progress["current"]):
        counters |= dict.fromkeys(counters, counters["ready"])
    progress["is_last_batch"] = True
    mark_pending(checkpoint)


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
