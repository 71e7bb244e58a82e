"""From configuration to Lightning's Trainer."""

import atexit
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from nvae.gpus import is_gpu_usable
from nvae.settings import check_choice, check_fields
from nvae.training.captured import CapturedSteps
from nvae.training.checkpointing import AtomicCheckpointIO
from nvae.training.processes import AUTO, count_processes, launcher_of_all
from nvae.training.ranks import EqualRanks
from nvae.training.shared_statistics import SHARING

STRATEGIES = ("auto", "ddp")
"""Of Lightning's names, those that mean :func:`ddp_strategy` where there are several processes."""

ACCELERATORS = ("auto", "cpu", "gpu")
PRECISIONS = ("32", "bf16-mixed", "16-mixed")
MOST_EPOCHS = 10_000_000
MOST_CPU_PROCESSES = 128
SECONDS_OF_A_YEAR = 31_536_000
INITIAL_LOSS_SCALE = 1024.0
"""float16's first loss scale; Lightning's 65536 overflows a VAE's summed likelihood at once."""

COMM_HOOKS = {"none": None, "bf16": bf16_compress_hook}
LIGHTNINGS_SYNC = {"True": "world", "False": "none"}
"""What Lightning's own `sync_batchnorm`, true or false, means here."""

CUDA_GRAPH = (True, False, "auto")
OURS = ("cpu_threads", "timeout", "sync_batchnorm", "ddp_comm_hook", "tf32", "cuda_graph")
"""Settings that are no arguments of the Trainer, or not the same ones."""

NOT_SETTINGS = ("self", "callbacks", "logger", "default_root_dir")
"""Arguments of the Trainer that are groups of their own, or follow from the run's folder."""

T = TypeVar("T")


def with_all_of_lightning(cls: type[T]) -> type[T]:
    """Give a class a field for every further argument of ``pl.Trainer``, with its default."""
    for name, parameter in inspect.signature(pl.Trainer.__init__).parameters.items():
        if name not in (*cls.__annotations__, *NOT_SETTINGS):
            cls.__annotations__[name] = Any
            setattr(cls, name, parameter.default)
    return cls


@dataclass
@with_all_of_lightning
class TrainerConfig:
    """Where and how long to train: the arguments of ``pl.Trainer``, by their names.

    Those that are not listed have Lightning's defaults and go to it as they are.

    Attributes:
        accelerator: ``auto`` | ``cpu`` | ``gpu``.
        devices: processes on each machine, one for each device; ``auto``: those that torchrun or
            srun started, else all devices that torch sees (on the CPU one process). Counted here:
            afterwards it is a number.
        num_nodes: machines.
        cpu_threads: of torch, in each process (not Lightning's); null: one for every core. A small
            network on a machine that does other work too is fastest with 1.
        timeout: seconds after which a rank that waits for another gives up (not Lightning's).
        sync_batchnorm: processes that share batch statistics: ``world`` | ``node`` (those of a
            machine) | ``none``. Lightning's true and false are ``world`` and ``none``.
        ddp_comm_hook: what DDP's gradients travel in: ``none``, their own type, or ``bf16`` (not
            Lightning's).
        precision: ``32`` | ``bf16-mixed`` | ``16-mixed``; heads, KL and likelihood are float32
            always.
        tf32: let products and convolutions of float32 round to TF32's 10 bits on NVIDIA GPUs, in
            training, validation and report (not Lightning's). Off, since what is float32 under
            mixed precision is so for its exactness, and a likelihood moves in its fourth digit.
        cuda_graph: capture whole training steps as a CUDA graph and replay it (not Lightning's):
            ``true`` | ``false`` | ``auto``: on an NVIDIA GPU. Where steps cannot be captured a line
            says why; see :mod:`nvae.training.captured`.
        max_epochs: of the whole run; null: `max_steps` alone ends it.
        max_steps: optimizer steps of the whole run; -1: `max_epochs` alone ends it.
        accumulate_grad_batches: micro-batches a step; with `data.global_batch` it follows.
        check_val_every_n_epoch: epochs between two validations.
        limit_train_batches: batches an epoch, or a share of them up to 1.0; null: all.
        limit_val_batches: batches a validation, or a share of them; null: all.
        overfit_batches: train and validate on this many training batches alone; 0: on all data.
        log_every_n_steps: optimizer steps between two readings of the training metrics.
        gradient_clip_val: largest gradient norm; larger ones are scaled down. null: none.
        deterministic: insist on deterministic kernels.
        detect_anomaly: let autograd name the operation that made a NaN; slow.
        num_sanity_val_steps: validation batches before the first step.
        enable_model_summary: print the modules.
        use_distributed_sampler: let Lightning share the images between processes; our data
            module does.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    cpu_threads: int | None = None
    timeout: float = 600.0
    sync_batchnorm: str = "world"
    ddp_comm_hook: str = "none"
    precision: str = "32"
    tf32: bool = False
    cuda_graph: bool | str = "auto"
    max_epochs: int | None = 400
    max_steps: int = -1
    accumulate_grad_batches: int = 1
    check_val_every_n_epoch: int | None = 1
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    overfit_batches: int = 0
    log_every_n_steps: int = 50
    gradient_clip_val: float | None = None
    deterministic: bool = False
    detect_anomaly: bool = False
    num_sanity_val_steps: int = 0
    enable_model_summary: bool = False
    use_distributed_sampler: bool = False

    def __post_init__(self) -> None:
        said = str(self.sync_batchnorm)
        self.sync_batchnorm = LIGHTNINGS_SYNC.get(said, self.sync_batchnorm)
        check_fields(
            self, "trainer.", devices=(1, 1024), num_nodes=(1, 65536), cpu_threads=(1, 1024),
            timeout=(1, SECONDS_OF_A_YEAR), max_epochs=(1, MOST_EPOCHS), max_steps=(-1, None),
            accumulate_grad_batches=(1, 1_000_000), log_every_n_steps=(1, None),
            check_val_every_n_epoch=(1, MOST_EPOCHS), overfit_batches=(0, None),
            gradient_clip_val=(0, None),
        )  # fmt: skip
        check_choice("trainer.accelerator", self.accelerator, ACCELERATORS)
        check_choice("trainer.precision", self.precision, PRECISIONS)
        if self.cuda_graph not in CUDA_GRAPH:
            raise ValueError(
                f"trainer.cuda_graph={self.cuda_graph} is unknown; allowed: true, false, auto"
            )
        check_choice("trainer.sync_batchnorm", self.sync_batchnorm, SHARING)
        check_choice("trainer.ddp_comm_hook", self.ddp_comm_hook, COMM_HOOKS)
        if self.ddp_comm_hook != "none" and getattr(self, "strategy", "auto") not in STRATEGIES:
            raise ValueError(
                f"trainer.ddp_comm_hook={self.ddp_comm_hook} belongs to trainer.strategy=ddp; give "
                "the hook to your own strategy, or leave out one of the two"
            )
        for name in ("limit_train_batches", "limit_val_batches"):
            limit = getattr(self, name)
            if limit is not None and (limit <= 0 or (isinstance(limit, float) and limit > 1)):
                raise ValueError(
                    f"trainer.{name} is {limit}; it must be at least 1 batch, or a share above 0 "
                    "up to 1.0, or null"
                )
        if self.max_epochs is None and self.max_steps < 1:
            raise ValueError("trainer.max_epochs is null; then give trainer.max_steps=...")
        self._check_slurm()
        if isinstance(self.devices, str):
            check_choice("trainer.devices", self.devices, (AUTO,))
        self.devices, self.num_nodes = count_processes(
            self.devices, self.num_nodes, self.resolved_accelerator(), self._has_environment()
        )
        self._check_device()

    def _plugins(self) -> list[str]:
        """Names of their classes."""
        plugins = getattr(self, "plugins", None) or []
        return [
            str(each.get("_target_")) if isinstance(each, dict) else type(each).__name__
            for each in (plugins if isinstance(plugins, list | tuple) else [plugins])
        ]

    def _has_environment(self) -> bool:
        return any(name.endswith("Environment") for name in self._plugins())

    def _check_slurm(self) -> None:
        for name in self._plugins():
            if name.endswith(SLURMEnvironment.__name__) and "SLURM_NTASKS" not in os.environ:
                raise ValueError(
                    "trainer=slurm, but this is no SLURM job: start it with srun, or use "
                    "trainer=ddp"
                )

    def _check_device(self) -> None:
        if self.resolved_accelerator() == "cpu":
            if self.cuda_graph is True:
                raise ValueError(
                    "trainer.cuda_graph=true needs an NVIDIA GPU; on the CPU: auto or false"
                )
            if self.precision == "16-mixed":
                raise ValueError(
                    "trainer.precision=16-mixed needs a GPU; on the CPU: 32 or bf16-mixed"
                )
            if int(self.devices) > MOST_CPU_PROCESSES:
                raise ValueError(
                    f"trainer.devices is {self.devices}; on the CPU it must be at most "
                    f"{MOST_CPU_PROCESSES} processes"
                )

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return int(self.devices) * self.num_nodes

    def is_over(self, epochs: int, steps: int) -> bool:
        """Whether a run that has done so much is at its end."""
        has_epochs = self.max_epochs is not None and epochs >= self.max_epochs
        return has_epochs or 0 <= self.max_steps <= steps

    def process_group_backend(self) -> str:
        """Of a run of several processes."""
        given = self.strategy if isinstance(self.strategy, dict) else {}  # type: ignore[attr-defined]
        usual = "nccl" if self.resolved_accelerator() == "gpu" else "gloo"
        return given.get("process_group_backend") or usual

    def resolved_accelerator(self) -> str:
        """``cpu`` or ``gpu``."""
        if self.accelerator == "auto":
            return "gpu" if is_gpu_usable("trainer.accelerator=cpu") else "cpu"
        if self.accelerator == "gpu" and not is_gpu_usable("trainer.accelerator=cpu"):
            raise ValueError("trainer.accelerator=gpu, but torch sees no GPU; use cpu or auto")
        return self.accelerator


def build_trainer(
    config: TrainerConfig, callbacks: Sequence[pl.Callback], loggers: Sequence[Logger], folder: Path
) -> pl.Trainer:
    """The Trainer of a run whose files go to ``folder``.

    Args:
        config: its settings; plugins and the like are objects by now.
        callbacks: in the order in which Lightning asks them.
        loggers: may be none.
        folder: of the run.
    """
    arguments = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OURS}
    accelerator = config.resolved_accelerator()
    plugins = arguments["plugins"] or []
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    if config.precision == "32":
        arguments["precision"] = "32-true"
    if config.precision == "16-mixed":
        scaler = torch.amp.GradScaler("cuda", init_scale=INITIAL_LOSS_SCALE)
        plugins.append(MixedPrecision("16-mixed", "cuda", scaler=scaler))
        arguments["precision"] = None
    if arguments["benchmark"] is None:
        arguments["benchmark"] = accelerator == "gpu" and not config.deterministic
    if config.world_size > 1 and arguments["strategy"] in STRATEGIES:
        arguments["strategy"] = ddp_strategy(
            accelerator, config.accumulate_grad_batches, config.timeout, config.ddp_comm_hook
        )
    for name, kind in (("checkpointing", ModelCheckpoint), ("progress_bar", ProgressBar)):
        if arguments[f"enable_{name}"] is None:  # Lightning would add one of its own
            arguments[f"enable_{name}"] = any(isinstance(each, kind) for each in callbacks)
    if config.world_size > 1:
        callbacks = [*callbacks, EqualRanks()]
    if config.cuda_graph and accelerator == "gpu":
        callbacks = [*callbacks, CapturedSteps()]
    arguments |= {"accelerator": accelerator, "plugins": plugins}
    return pl.Trainer(
        **arguments, default_root_dir=folder, callbacks=list(callbacks), logger=list(loggers)
    )


class DataParallel(DDPStrategy):
    """Lightning's, which leaves the communication hook out on the CPU."""

    def configure_ddp(self) -> None:
        """Wrap the model; gloo takes the hook as NCCL does."""
        super().configure_ddp()
        if self._ddp_comm_hook is not None and self.root_device.type == "cpu":
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, self._ddp_comm_hook)


def ddp_strategy(
    accelerator: str, accumulate: int, timeout_seconds: float, comm_hook: str = "none"
) -> DDPStrategy:
    """Data parallel over all devices of all machines.

    Every parameter gets a gradient at every step, so nothing is searched for. Buffers need no
    broadcast: statistics are synchronized in the forward pass, spectral vectors advance alike from
    equal weights.

    Args:
        accelerator: ``cpu`` | ``gpu``.
        accumulate: micro-batches a step. The graph is static only with one: the regularizers
            belong to the last.
        timeout_seconds: after which a collective that some rank did not join is an error.
        comm_hook: ``none`` | ``bf16``: gradients are reduced in bfloat16.
    """
    return DataParallel(
        process_group_backend="nccl" if accelerator == "gpu" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        ddp_comm_hook=COMM_HOOKS[comm_hook],
        find_unused_parameters=False,
        static_graph=accumulate == 1,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


def meet(config: TrainerConfig) -> None:
    """Make the process group of a run that torchrun or SLURM has started, before anything else.

    It is the one that Lightning would make later, and finds. One process needs no group, and
    where Lightning starts the others it makes the group. It ends with the process.

    Raises:
        ValueError: the launcher has started another number of processes than the settings say.
    """
    if config.world_size == 1:
        return
    atexit.register(_part)
    launcher = launcher_of_all()
    if launcher is None or dist.is_initialized():
        return
    environment = launcher()
    environment.validate_settings(int(config.devices), config.num_nodes)
    device = None
    if config.resolved_accelerator() == "gpu":
        device = torch.device("cuda", environment.local_rank())
        torch.cuda.set_device(device)
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    dist.init_process_group(
        config.process_group_backend(), rank=environment.global_rank(),
        world_size=environment.world_size(), timeout=timedelta(seconds=config.timeout),
        device_id=device,
    )  # fmt: skip


def _part() -> None:
    # left to the interpreter's end, gloo's threads may want Python when it is gone: an abort
    if dist.is_initialized():
        dist.destroy_process_group()
