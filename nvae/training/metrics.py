"""Training metrics, read from the device every k steps and nowhere else."""

import time
from typing import Any

import pytorch_lightning as pl
import torch

from nvae.objective import Loss
from nvae.training.module import NVAELightning
from nvae.training.validation import group_metrics


class TrainingMetrics(pl.Callback):
    """Collects a step's loss parts every ``every_steps`` optimiser steps and gives them to the
    loggers; ``latest`` holds them for the progress bar.

    One stacked copy to the host a reading: the steps between run without waiting for the device.

    Args:
        every_steps: optimiser steps between two readings.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self.latest: dict[str, float] = {}
        self._images = 0
        self._since = time.perf_counter()
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step at hand has been read, by the run that is resumed."""
        self._last_step = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation and checkpoints between epochs are no part of the speed."""
        self._start_clock()

    def _start_clock(self) -> None:
        self._images, self._since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Read and log where it is time."""
        self._images += len(batch.x) * trainer.world_size
        step = trainer.global_step
        if step == self._last_step or step % self.every_steps:
            return
        self._last_step = step
        assert isinstance(pl_module, NVAELightning)
        assert pl_module.last is not None
        metrics = read_loss(pl_module.last)
        metrics["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        # reading waited for the device, so the clock covers the work
        metrics["train/images_per_second"] = self._images / (time.perf_counter() - self._since)
        self._start_clock()
        self.latest = metrics
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)


def read_loss(loss: Loss) -> dict[str, float]:
    """A step's metrics as Python numbers, by one copy from the device; nats per image."""
    terms = torch.stack([term.double() for term in loss.terms.values()])
    values = torch.cat([terms, loss.kl_per_group.double()]).tolist()
    metrics = {f"train/{name}": value for name, value in zip(loss.terms, values, strict=False)}
    metrics |= {f"train/{name}": value for name, value in loss.coefficients.items()}
    return metrics | group_metrics("train_kl_group", values[len(loss.terms) :])
