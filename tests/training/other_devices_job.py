"""A training job for test_other_devices.py: in one process or, started by it, in two.

Usage: other_devices_job.py FOLDER DEVICES STOP GLOBAL_BATCH, where the run stops after optimizer
step STOP (0: at its end). Each rank appends what it read to FOLDER/read-RANK.jsonl.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from nvae.cli.config import TrainConfig
from nvae.training.trainer import TrainerConfig
from tests.training.runs import StopAt, run, small_config


class Recorder(pl.Callback):
    """Notes the images of every micro-batch, its noise's key, and the schedules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "key": trainer.fit_loop.total_batch_idx,
            "images": batch.index.tolist(),
            **pl_module.last.coefficients,
            "position": pl_module.length.position(trainer.global_step),
            "total": pl_module.length.total_steps,
            "loss": float(outputs["loss"]),
            "mean": float(pl_module.last.data),
            "penalty": float(pl_module.last.penalty or 0),
        }
        with (self.folder / f"read-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def config_of(
    folder: Path, devices: int, global_batch: int | None, accumulate: int = 1, batch_size: int = 4
) -> TrainConfig:
    """66 images, three epochs; at most four images on a device at once."""
    config = small_config(folder)
    data = dataclasses.replace(config.data, global_batch=global_batch, batch_size=batch_size)
    trainer = TrainerConfig(
        accelerator="cpu", devices=devices, max_epochs=3, log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    objective = dataclasses.replace(config.objective, spectral_weight_initial=1.0)
    return dataclasses.replace(config, data=data, trainer=trainer, objective=objective)


def train(config: TrainConfig, folder: Path, stop: int) -> None:
    """To the end, or until a step."""
    run(config, Recorder(folder), *([StopAt(stop)] if stop else []))


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, devices, stop, images = Path(sys.argv[1]), *map(int, sys.argv[2:])
    train(config_of(where, devices, images), where, stop)
