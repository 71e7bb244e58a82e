"""SIGTERM, SIGUSR1 and Ctrl-C: save, stop, and on SLURM go back to the queue."""

import os
import shutil
import signal
import subprocess
import time
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from nvae.training.checkpointing import Checkpoints, is_last_batch
from nvae.training.stop_now import ONE_PRESS, StopNow

AGREE_EVERY = 10
"""Optimiser steps between two agreements of several ranks, each of which waits for the device."""


class InterruptedRun(Exception):  # noqa: N818
    """The run was told to stop and has saved; running the same command again goes on."""

    def __init__(self, signal_name: str, step: int) -> None:
        super().__init__(f"{signal_name}: saved at step {step}")
        self.signal_name, self.step = signal_name, step


class StopOnSignal(pl.Callback):
    """Ends the run after the optimiser step at hand, with a checkpoint.

    A signal may reach one rank alone; then all ranks agree before they save, because saving is a
    common act.

    Args:
        checkpoints: saves.
        requeue: hand the job back to SLURM's queue.
    """

    def __init__(self, checkpoints: Checkpoints, requeue: bool = False) -> None:
        self._checkpoints, self._requeue = checkpoints, requeue
        self._received = 0
        self._pressed: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over from Lightning, which restores the old handlers at the end.

        Its own SIGTERM handler starts a collective inside the handler, and its loop one (with a
        wait for the device) at every batch.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)
        self._launcher = trainer.strategy.launcher
        loop = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._is_second_press():
            raise StopNow
        self._received = max(self._received, number)  # as all ranks do when they agree
        if number == signal.SIGINT:
            return  # a terminal has told all ranks; else this one tells them when they agree
        for process in getattr(self._launcher, "procs", []):  # ranks that this process started
            process.send_signal(number)

    def _is_second_press(self) -> bool:
        """A terminal together with a launcher delivers one press twice, at once."""
        now = time.monotonic()
        if self._pressed is None:
            self._pressed = now
        return now - self._pressed > ONE_PRESS

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Save and stop, where a signal came and the optimiser step is whole."""
        # Lightning's loops cannot be resumed from between an epoch's last batch and its validation
        if trainer.fit_loop._should_accumulate() or is_last_batch(trainer):
            return
        if trainer.world_size == 1 or trainer.global_step % AGREE_EVERY == 0:
            self._stop_if_told(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same after an epoch's last batch and its validation."""
        self._stop_if_told(trainer)

    def _stop_if_told(self, trainer: pl.Trainer) -> None:
        received = self._received
        if trainer.world_size > 1:
            flag = torch.full((), received, device=trainer.strategy.root_device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            received = int(flag)
        if not received:
            return
        self._checkpoints.save(trainer)
        if self._requeue and trainer.is_global_zero:
            requeue_slurm_job()
        raise InterruptedRun(signal.Signals(received).name, trainer.global_step)


def requeue_slurm_job() -> None:
    """`scontrol requeue` this job, where there is one."""
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{job}_{task}" if job and task else os.environ.get("SLURM_JOB_ID")
    if name and shutil.which("scontrol"):
        subprocess.run(["scontrol", "requeue", name], check=False)
