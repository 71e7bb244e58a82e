"""Small runs for the tests: the real code path of `train.py`, without Hydra and the report."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

from nvae.cli.config import TrainConfig, build_callbacks, build_loggers, with_objects
from nvae.cli.fitting import build_module, until_validated
from nvae.cli.train import fingerprint
from nvae.data import DataConfig
from nvae.data.module import ImageDataModule
from nvae.models import ModelConfig
from nvae.objective import ObjectiveConfig
from nvae.training.checkpointing import step_checkpoints
from nvae.training.module import NVAELightning
from nvae.training.optimizers import OptimizerConfig
from nvae.training.run_folder import Claim, RunFolder, open_run
from nvae.training.signals import InterruptedRun
from nvae.training.trainer import TrainerConfig, build_trainer
from tests.models.small import VERY_DEEP

CONFIGS = Path(__file__).parents[2] / "configs"


def small_callbacks() -> dict[str, Any]:
    """The default ones, with an average, without pictures and bar; all checkpoints stay."""
    entries: dict[str, Any] = yaml.safe_load((CONFIGS / "callbacks/default.yaml").read_text())
    entries |= {"pictures": None, "progress": None}
    entries["ema"]["decay"] = 0.9
    entries["checkpoint"]["keep_last"] = 100
    return entries


RECIPES: dict[str, dict[str, Any]] = {
    "nvae": {},
    "vdvae": {
        "architecture": "vdvae",
        "model": VERY_DEEP["vdvae"](),
        "objective": ObjectiveConfig(
            kl_anneal_portion=0, kl_balancing=False, spectral_weight=0.0, per_dimension=True
        ),
        "optimizer": OptimizerConfig(
            name="adamw", learning_rate=1e-3, min_learning_rate=1e-3, warmup_steps=4, beta2=0.9
        ),
    },
    "evdvae": {
        "architecture": "evdvae",
        "model": VERY_DEEP["evdvae"](),
        "objective": ObjectiveConfig(
            name="gamma_balanced", options={"portion": 0.4}, kl_anneal_portion=0.2,
            kl_balancing=False, spectral_weight=0.0, per_dimension=True,
        ),
        "optimizer": OptimizerConfig(
            min_learning_rate=2e-3, warmup_steps=4, decay_start=0.5, decay_end=0.9
        ),
    },
}  # fmt: skip
"""What a family's run has of its own: a small network, and the shape of its paper's recipe."""


def small_config(root: Path, family: str = "nvae", **changes: Any) -> TrainConfig:
    """Sixteen batches of four an epoch, eight steps of two micro-batches, three epochs."""
    settings: dict[str, Any] = {
        "data": DataConfig(
            name="random", format="random", image_size=8, channels=1, bits=4,
            likelihood="logistic_mixture", train_size=66, valid_size=5, test_size=7,
            batch_size=4, flip=True,
        ),
        "name": "run",
        "runs_dir": str(root),
        "model": ModelConfig(
            image_size=8, bits=4, likelihood="logistic_mixture", num_mixtures=2, num_scales=2,
            groups_per_scale=2, preprocess_blocks=1, preprocess_cells=1, postprocess_cells=1,
            encoder_channels=4, decoder_channels=4, latent_channels=2,
            encoder_cells_per_group=1, decoder_cells_per_group=1,
        ),
        "optimizer": OptimizerConfig(warmup_epochs=1),
        "trainer": TrainerConfig(
            accelerator="cpu", max_epochs=3, accumulate_grad_batches=2, log_every_n_steps=1
        ),
        "callbacks": small_callbacks(),
        "logger": {"jsonl": {"_target_": "nvae.training.logging.JsonLinesLogger"}},
    }  # fmt: skip
    return TrainConfig(**{**settings, **RECIPES[family], **changes})


class StopAt(pl.Callback):
    """Raise a signal in this process after an optimizer step, as a scheduler would."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step - 1:
            signal.raise_signal(self.number)


def run(
    config: TrainConfig, *callbacks: pl.Callback, module: NVAELightning | None = None
) -> tuple[Path, pl.Trainer]:
    """Train until the end or until told to stop; resumes as the command does."""
    path = Path(config.runs_dir) / config.name
    data = ImageDataModule(config.data)
    data.setup()
    marks = fingerprint(config, data)
    claim = Claim(path, beside=config.resume == "never", processes=config.trainer.world_size)
    with claim:
        folder, _ = open_run(claim.path, config.resume, config.to_dict(), marks)
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        return folder.path, _train(config, folder, data, callbacks, module, marks)


def _train(
    config: TrainConfig,
    folder: RunFolder,
    data: ImageDataModule,
    callbacks: tuple[pl.Callback, ...],
    module: NVAELightning | None,
    marks: dict[str, Any],
) -> pl.Trainer:
    trainer = build_trainer(
        with_objects(until_validated(config.trainer, folder)),
        build_callbacks(config.callbacks),
        build_loggers(config.logger, folder.path, folder.step),
        folder.path,
    )
    # before ours, so that a signal is there when they look
    trainer.callbacks[:0] = callbacks
    with contextlib.suppress(InterruptedRun):
        trainer.fit(
            module or build_module(config, marks=marks), datamodule=data,
            ckpt_path=folder.checkpoint, weights_only=True,
        )  # fmt: skip
    return trainer


def last_checkpoint(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(
        step_checkpoints(folder / "checkpoints")[-1], weights_only=True
    )
    return checkpoint


def assert_identical(a: Any, b: Any, path: str = "") -> int:
    """Equal bit for bit, all the way down; returns the number of tensors compared."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{path}: {a.keys() ^ b.keys()}"
        return sum(assert_identical(a[k], b[k], f"{path}.{k}") for k in a)
    if isinstance(a, list | tuple):
        assert len(a) == len(b), path
        return sum(
            assert_identical(x, y, f"{path}[{i}]")
            for i, (x, y) in enumerate(zip(a, b, strict=True))
        )
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), f"{path}: differs by {(a.double() - b.double()).abs().max()}"
        return 1
    assert a == b, f"{path}: {a} != {b}"
    return 0
