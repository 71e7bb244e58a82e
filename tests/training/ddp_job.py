"""A two-process training job for test_ddp.py; starts its second rank itself, as train.py does.

Usage: ddp_job.py FOLDER MODE, where MODE is ``spoil`` (rank 1 meets two bad steps; in a folder of
its own, resume=never), ``die0`` or ``die1`` (that rank is killed in the middle),
or ``apart`` (each rank has batch statistics of its own, gradients travel in bfloat16).
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from nvae.cli.fitting import build_module
from nvae.training.trainer import TrainerConfig
from tests.training.runs import run, small_config


class Trouble(pl.Callback):
    def __init__(self, mode: str) -> None:
        self.mode = mode

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        rank, step = trainer.global_rank, trainer.global_step
        if self.mode == "spoil" and rank == 1 and step in (3, 4):
            batch.x[0, 0, 0, 0] = float("nan")
        if self.mode == f"die{rank}" and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(tensors[name].detach().contiguous().numpy().tobytes())
    return h.hexdigest()


def main(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    config = small_config(
        folder,
        trainer=TrainerConfig(
            accelerator="cpu",
            devices=2,
            max_epochs=2,
            log_every_n_steps=1,
            sync_batchnorm="none" if mode == "apart" else "world",
            ddp_comm_hook="bf16" if mode == "apart" else "none",
        ),
        resume="never" if mode == "spoil" else "auto",
    )
    module = build_module(config)
    initial = digest(module.model.state_dict())
    path, trainer = run(config, Trouble(mode), module=module)
    noise = module._noise(module.model, 2, 0)
    result = {
        "folder": path.name,
        "initial": initial,
        "final": digest(module.state_dict()),
        "finite": all(bool(p.isfinite().all()) for p in module.parameters()),
        "steps": trainer.global_step,
        "noise": digest({str(i): t for i, t in enumerate(noise)}),
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
