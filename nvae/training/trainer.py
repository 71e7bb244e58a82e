"""From configuration to Lightning's Trainer."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.environments import SLURMEnvironment

from nvae.settings import check_choice, check_fields
from nvae.training.checkpointing import AtomicCheckpointIO, CheckpointConfig, Checkpoints
from nvae.training.distributed import ddp_strategy
from nvae.training.ema import MovingAverage
from nvae.training.guard import BadSteps, GuardConfig
from nvae.training.interruption import StopOnSignal
from nvae.training.metrics import TrainingMetrics
from nvae.training.pictures import Pictures, PicturesConfig
from nvae.training.progress import RunProgress

ACCELERATORS = ("auto", "cpu", "gpu")
LAUNCHERS = ("auto", "slurm")
PRECISIONS = ("32", "bf16-mixed", "16-mixed")
MOST_EPOCHS = 10_000_000
MOST_CPU_PROCESSES = 128
SECONDS_OF_A_YEAR = 31_536_000
INITIAL_LOSS_SCALE = 1024.0
"""float16's first loss scale; Lightning's 65536 overflows a VAE's summed likelihood at once."""


@dataclass
class TrainerConfig:
    """Where and how long to train.

    Attributes:
        accelerator: ``auto`` | ``cpu`` | ``gpu``.
        devices: processes on this machine, one for each device.
        num_nodes: machines.
        launcher: ``auto`` (torchrun's or SLURM's environment where there is one, else processes of
            our own) | ``slurm``.
        requeue: on SLURM, go back to the queue after SIGUSR1 or SIGTERM.
        cpu_threads: of torch, in each process; null: one for every core. A small network on a
            machine that does other work too is fastest with 1.
        timeout: seconds after which a rank that waits for another gives up.
        precision: ``32`` | ``bf16-mixed`` | ``16-mixed``; likelihood and KL are float32 always.
        max_epochs: of the whole run.
        accumulate_grad_batches: micro-batches of `data.batch_size` a step.
        check_val_every_n_epoch: epochs between two validations.
        limit_train_batches: batches an epoch; null: all.
        limit_val_batches: batches a validation; null: all.
        overfit_batches: train and validate on this many training batches alone; 0: on all data.
        deterministic: insist on deterministic kernels.
        detect_anomaly: let autograd name the operation that made a NaN; slow.
        guard: gradient clipping, and what happens to steps that go bad.
    """

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    launcher: str = "auto"
    requeue: bool = False
    cpu_threads: int | None = None
    timeout: float = 1800.0
    precision: str = "32"
    max_epochs: int = 400
    accumulate_grad_batches: int = 1
    check_val_every_n_epoch: int = 1
    limit_train_batches: int | None = None
    limit_val_batches: int | None = None
    overfit_batches: int = 0
    deterministic: bool = False
    detect_anomaly: bool = False
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        check_fields(
            self, "trainer.", devices=(1, 1024), num_nodes=(1, 65536), cpu_threads=(1, 1024),
            timeout=(1, SECONDS_OF_A_YEAR), max_epochs=(1, MOST_EPOCHS),
            accumulate_grad_batches=(1, 1_000_000),
            check_val_every_n_epoch=(1, MOST_EPOCHS), limit_train_batches=(1, None),
            limit_val_batches=(1, None), overfit_batches=(0, None),
        )  # fmt: skip
        check_choice("trainer.accelerator", self.accelerator, ACCELERATORS)
        check_choice("trainer.precision", self.precision, PRECISIONS)
        check_choice("trainer.launcher", self.launcher, LAUNCHERS)
        if self.launcher == "slurm" and "SLURM_NTASKS" not in os.environ:
            raise ValueError(
                "trainer.launcher=slurm, but this is no SLURM job: start it with srun, or use "
                "launcher=auto"
            )
        self._check_device()

    def _check_device(self) -> None:
        if self.resolved_accelerator() == "cpu":
            if self.precision == "16-mixed":
                raise ValueError(
                    "trainer.precision=16-mixed needs a GPU; on the CPU: 32 or bf16-mixed"
                )
            if self.devices > MOST_CPU_PROCESSES:
                raise ValueError(
                    f"trainer.devices is {self.devices}; on the CPU it must be at most "
                    f"{MOST_CPU_PROCESSES} processes"
                )

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes

    def resolved_accelerator(self) -> str:
        """``cpu`` or ``gpu``."""
        if self.accelerator == "auto":
            return "gpu" if torch.cuda.is_available() else "cpu"
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise ValueError("trainer.accelerator=gpu, but torch sees no GPU; use cpu or auto")
        return self.accelerator


@dataclass
class EMAConfig:
    """Moving average of the weights.

    Attributes:
        decay: a step, in [0, 1); null: no average.
        device: null: beside the model; ``cpu`` saves GPU memory.
    """

    decay: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "callbacks.ema.")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(
                f"callbacks.ema.decay is {self.decay}; allowed: 0 up to, not with, 1, or null"
            )
        if self.device not in (None, "cpu"):
            raise ValueError(f"callbacks.ema.device={self.device} is unknown; allowed: cpu, null")


@dataclass
class CallbacksConfig:
    """What happens beside the training step.

    Attributes:
        checkpoint: rotating checkpoints.
        ema: moving average of the weights.
        pictures: grids at intervals.
        progress: show a progress bar.
    """

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "callbacks.")


def build_trainer(
    config: TrainerConfig,
    callbacks: CallbacksConfig,
    folder: Path,
    loggers: list[Logger],
    log_every_steps: int,
) -> pl.Trainer:
    """The Trainer of a run whose files go to ``folder``."""
    accelerator = config.resolved_accelerator()
    metrics = TrainingMetrics(log_every_steps)
    built: list[pl.Callback] = [metrics, Pictures(folder / "pictures", callbacks.pictures)]
    average = None
    if callbacks.ema.decay is not None:
        # after the pictures: at the end of validation it puts the raw weights back
        average = MovingAverage(callbacks.ema.decay, callbacks.ema.device)
        built.append(average)
    guard = BadSteps(config.guard, log_every_steps)
    checkpoints = Checkpoints(folder / "checkpoints", callbacks.checkpoint, guard, average)
    built += [guard, checkpoints, StopOnSignal(checkpoints, config.requeue)]
    if callbacks.progress:
        built.append(RunProgress(metrics))
    plugins: list[Any] = [AtomicCheckpointIO()]
    precision: Any = "32-true" if config.precision == "32" else config.precision
    if config.precision == "16-mixed":
        scaler = torch.amp.GradScaler("cuda", init_scale=INITIAL_LOSS_SCALE)
        plugins.append(MixedPrecision("16-mixed", "cuda", scaler=scaler))
        precision = None
    if config.launcher == "slurm":
        # our own callback requeues, at the end of a step and not in the middle of one
        plugins.append(SLURMEnvironment(auto_requeue=False))
    strategy: Any = "auto"  # one device: no process group
    if config.world_size > 1:
        strategy = ddp_strategy(accelerator, config.accumulate_grad_batches, config.timeout)
    return pl.Trainer(
        accelerator=accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        precision=precision,
        plugins=plugins,
        max_epochs=config.max_epochs,
        accumulate_grad_batches=config.accumulate_grad_batches,
        check_val_every_n_epoch=config.check_val_every_n_epoch,
        limit_train_batches=config.limit_train_batches,
        limit_val_batches=config.limit_val_batches,
        overfit_batches=config.overfit_batches,
        deterministic=config.deterministic,
        benchmark=accelerator == "gpu" and not config.deterministic,
        detect_anomaly=config.detect_anomaly,
        default_root_dir=folder,
        logger=loggers,
        callbacks=built,
        enable_checkpointing=False,
        enable_progress_bar=callbacks.progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # our own callback decides; see TrainingMetrics
        use_distributed_sampler=False,
    )
