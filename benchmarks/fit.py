"""Real training steps to be measured: what `train.py` runs, on random images, for a few steps."""

import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from nvae.cli.common import float32_products
from nvae.cli.config import TrainConfig, build_callbacks, compose_train, with_objects
from nvae.cli.fitting import build_module
from nvae.data.module import ImageDataModule
from nvae.training.captured import CapturedStep
from nvae.training.guard import guard_of
from nvae.training.module import NVAELightning
from nvae.training.trainer import build_trainer

RANDOM_IMAGES = (
    "data.format=random", "data.train_size=2048", "data.valid_size=64", "data.test_size=64",
    "data.global_batch=null",
)  # fmt: skip
"""Overrides that put images made in memory in a data set's place; time does not depend on them."""

STEPS_ALONE = (
    "trainer.devices=1", "trainer.check_val_every_n_epoch=10000", "checkpoint_cells=false",
    "callbacks.checkpoint=null", "callbacks.pictures=null", "callbacks.signals=null",
    "callbacks.progress=null", "logger.tensorboard=null", "logger.csv=null", "logger.jsonl=null",
)  # fmt: skip
"""Overrides that leave optimizer, regularizers, guard and average, and nothing that writes."""


@dataclass(frozen=True)
class Fitted:
    """What some training steps left.

    Attributes:
        milliseconds: between the ends of two steps, by the device's clock where it has one.
        cpu_seconds: between them, of this process, however busy the machine is.
        losses: of each step, in nats, ``(steps,)``.
        skipped: steps that the guard has left out.
        replays: micro-batches that were replayed from a CUDA graph.
        peak_bytes: most memory that was allocated on the GPU, model and optimizer included; 0 on
            the CPU.
        module: with its weights.
    """

    milliseconds: list[float]
    cpu_seconds: list[float]
    losses: Tensor
    skipped: int
    replays: int
    peak_bytes: int
    module: NVAELightning


class Recorder(pl.Callback):
    """Marks the end of every step without waiting for the device, and stops the run.

    Args:
        steps: after which it stops.
        bad_step: one, counted from 0, whose images become NaN; None: none.
    """

    def __init__(self, steps: int, bad_step: int | None = None) -> None:
        self.steps, self.bad_step = steps, bad_step
        self.losses: list[Tensor] = []
        self._ends: list[Any] = []
        self._cpu_ends: list[float] = []
        self.replays = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Spoil the images whose turn it is."""
        if len(self.losses) == self.bad_step:
            batch.x.fill_(float("nan"))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Note the step's end and its loss."""
        assert isinstance(pl_module, NVAELightning)
        assert pl_module.last is not None
        self.losses.append(pl_module.last.total.detach().clone())
        self._cpu_ends.append(time.process_time())
        step = pl_module.whole_step
        self.replays = step.replays if isinstance(step, CapturedStep) else 0
        if pl_module.device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._ends.append(end)
        else:
            self._ends.append(time.perf_counter())
        if len(self.losses) == self.steps:
            trainer.should_stop = True

    def cpu_seconds(self) -> list[float]:
        """Of this process, between the ends."""
        return [end - begin for begin, end in pairwise(self._cpu_ends)]

    def milliseconds(self) -> list[float]:
        """Between the ends; waits for the device."""
        pairs = zip(self._ends, self._ends[1:], strict=False)
        if self._ends and isinstance(self._ends[0], float):
            return [1e3 * (end - begin) for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


def compose_steps(overrides: Sequence[str]) -> TrainConfig:
    """The configuration of `train.py` with these overrides, but on random images and for steps."""
    return compose_train([*RANDOM_IMAGES, *STEPS_ALONE, *overrides])


def fit_steps(config: TrainConfig, steps: int, bad_step: int | None = None) -> Fitted:
    """Train, by Lightning, as `train.py` does.

    Args:
        config: of the run; its schedules go by its own length, not by ``steps``.
        steps: optimizer steps, without accumulation.
        bad_step: see :class:`Recorder`.
    """
    is_on_gpu = config.trainer.resolved_accelerator() == "gpu"
    if is_on_gpu:
        gc.collect()  # what an earlier run has left is none of this one's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, float32_products(tf32=config.trainer.tf32):
        module = build_module(config)
        recorder = Recorder(steps, bad_step)
        trainer = build_trainer(
            with_objects(config.trainer),
            [*build_callbacks(config.callbacks), recorder],
            [],
            Path(folder),
        )
        trainer.fit(module, datamodule=ImageDataModule(config.data))
        milliseconds = recorder.milliseconds()
    guard = guard_of(trainer)
    return Fitted(
        milliseconds,
        recorder.cpu_seconds(),
        torch.stack(recorder.losses).double().cpu(),
        0 if guard is None else guard.read().skipped,
        recorder.replays,
        torch.cuda.max_memory_allocated() if is_on_gpu else 0,
        module,
    )
