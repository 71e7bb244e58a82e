"""SIGTERM, SIGUSR1 and Ctrl-C: save, stop, and on SLURM go back to the queue.

Ctrl-C before the first step, or pressed for the second time, stops at once. Then the main thread
answers; where it cannot, because it waits for another rank outside Python, a thread beside it ends
the process.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from nvae.settings import check_fields
from nvae.training.checkpointing import Checkpoints, is_last_batch

AGREE_EVERY = 3.0
"""Seconds between two agreements of several ranks, each of which waits for the device. A launcher
may leave no more than 30 from its signal to the kill."""

MOST_STEPS = 1000
"""Optimizer steps between two agreements, however quick they are."""

ONE_PRESS = 1.0
"""Seconds within which a further Ctrl-C is the same one: a terminal together with a launcher
delivers one press twice."""

_GRACE = 5.0
"""Seconds that the main thread has for its answer."""


class InterruptedRun(Exception):  # noqa: N818
    """The run was told to stop and has saved; running the same command again goes on."""

    def __init__(self, signal_name: str, step: int, saved: bool = True) -> None:
        done = "saved" if saved else "nothing saved, since callbacks.checkpoint is null,"
        super().__init__(f"{signal_name}: {done} at step {step}")
        self.signal_name, self.step = signal_name, step


@dataclass(eq=False)
class StopOnSignal(pl.Callback):
    """Ends the run after the optimizer step at hand, with a checkpoint.

    A signal may reach one rank alone; then all ranks agree before they save, because saving is a
    common act.

    Attributes:
        requeue: hand the job back to SLURM's queue.
    """

    requeue: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "callbacks.signals.")
        self._received = 0
        self._next_step = self._last_step = 0  # of agreements
        self._last_time = 0.0
        self._pressed: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A signal that ended another run is not for this one."""
        self._received, self._pressed = 0, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over from Lightning, which restores the old handlers at the end.

        Its own SIGTERM handler starts a collective inside the handler, and its loop one (with a
        wait for the device) at every batch.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)
        self._launcher = trainer.strategy.launcher
        self._next_step = self._last_step = trainer.global_step
        self._last_time = time.monotonic()
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
        """Save and stop, where a signal came and the optimizer step is whole."""
        if trainer.fit_loop._should_accumulate() or is_last_batch(trainer):
            return
        if trainer.world_size == 1 or trainer.global_step >= self._next_step:
            self._stop_if_told(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same after an epoch's last batch: a resumed run does the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and is_last_batch(trainer):
            self._stop_if_told(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """In the validation too, where it was saved before; not with several ranks, whose numbers
        of batches may differ."""
        if trainer.state.fn == "fit" and trainer.world_size == 1:
            savers = savers_of(trainer)
            if savers and all(each.is_saved(trainer) for each in savers):
                self._stop_if_told(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same after an epoch."""
        self._stop_if_told(trainer)

    def _stop_if_told(self, trainer: pl.Trainer) -> None:
        received = self._received if trainer.world_size == 1 else self._agreed(trainer)
        if not received:
            return
        savers = savers_of(trainer)
        for checkpoints in savers:
            checkpoints.save(trainer)
        if self.requeue and trainer.is_global_zero:
            requeue_slurm_job()
        raise InterruptedRun(signal.Signals(received).name, trainer.global_step, bool(savers))

    def _agreed(self, trainer: pl.Trainer) -> int:
        """The signal that any rank has received, or 0; and the step of the next agreement."""
        step, now = trainer.global_step, time.monotonic()
        steps = steps_until_next(step - self._last_step, now - self._last_time)
        mine = torch.tensor([self._received, -steps], device=trainer.strategy.root_device)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        received, minus_steps = mine.tolist()
        self._last_step, self._last_time = step, now
        self._next_step = step - minus_steps  # the slowest rank's wish
        return int(received)


def steps_until_next(steps: int, seconds: float) -> int:
    """Optimizer steps until the next agreement, where the last ones have taken so long.

    Between 1 and twice as many as they were: the first of a run, or after a pause, say little.
    """
    wished = AGREE_EVERY / max(seconds, 1e-9) * steps
    return int(min(max(wished, 1), max(2 * steps, 1), MOST_STEPS))


def savers_of(trainer: pl.Trainer) -> list[Checkpoints]:
    """The callbacks that can save where the run is."""
    return [c for c in trainer.callbacks if isinstance(c, Checkpoints)]  # type: ignore[attr-defined]


def requeue_slurm_job() -> None:
    """`scontrol requeue` this job, where there is one."""
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{job}_{task}" if job and task else os.environ.get("SLURM_JOB_ID")
    if name and shutil.which("scontrol"):
        subprocess.run(["scontrol", "requeue", name], check=False)


class StopNow(BaseException):
    """Ctrl-C where nothing is to be saved.

    Not KeyboardInterrupt: Lightning makes a crash of that.
    """


class StopsNow:
    """In the block Ctrl-C raises :class:`StopNow`, until a callback has a handler of its own.

    From then on a second press ends the block, which the callback sees to. Ranks that this
    process started end with it: they may be waiting for it. Where SIGINT is ignored, as in a
    shell's background job, it stays so.

    Args:
        trainer: of the run.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._over = threading.Event()
        self._ranks: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.SIG_IGN:
            return
        signal.signal(signal.SIGINT, self._stop)
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is signal.SIG_IGN:
            return
        if isinstance(error, StopNow):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._take_ranks()
            self._kill_ranks()
        self._over.set()
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
        signal.signal(signal.SIGINT, self._before)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise StopNow

    def _watch(self) -> None:
        first: float | None = None
        while number := os.read(self._read, 1)[0]:
            if number != signal.SIGINT:
                continue
            if signal.getsignal(signal.SIGINT) != self._stop:  # in training
                first = first or time.monotonic()
                if time.monotonic() - first <= ONE_PRESS:
                    continue
            self._take_ranks()
            if not self._over.wait(_GRACE):
                self._kill_ranks()
                if self._trainer.is_global_zero:
                    print("interrupted; run the same command again", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGINT)

    def _take_ranks(self) -> None:
        """From Lightning, which watches them and would call their end a crash."""
        started = getattr(self._trainer.strategy.launcher, "procs", [])
        self._ranks += started
        started.clear()

    def _kill_ranks(self) -> None:
        for process in self._ranks:
            process.kill()
