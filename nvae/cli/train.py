"""`train.py`: from a composed configuration to a trained model and a report."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console

from nvae.cli.common import float32_products, keep_freed_memory
from nvae.cli.config import (
    BEST_METRIC,
    TrainConfig,
    averages_on_device,
    build_callbacks,
    build_loggers,
    check_installed,
    register,
    train_config,
    with_objects,
)
from nvae.cli.errors import UserError, config_folders, is_out_of_memory, run
from nvae.cli.report import write_report
from nvae.cli.training_errors import AGREED, ended, explained, how_to_go_on
from nvae.command_line import brief, setting
from nvae.data.config import VALID
from nvae.data.module import ImageDataModule
from nvae.data.samplers import Shard
from nvae.ops.library import check_kernels
from nvae.training.checkpointing import newest_checkpoint
from nvae.training.end_together import EndTogether
from nvae.training.guard import DivergenceError, guard_of
from nvae.training.logging import log_errors_once
from nvae.training.memory import own_gpu
from nvae.training.module import NVAELightning
from nvae.training.module import build_module as build
from nvae.training.processes import decided, is_started_by_launcher
from nvae.training.ranks import OtherRankError, any_rank, has_others, together
from nvae.training.recompute import should_recompute
from nvae.training.run_folder import (
    Claim,
    RunFolder,
    describe_start,
    open_run_once,
)
from nvae.training.signals import InterruptedRun, StopNow, StopsNow
from nvae.training.trainer import TrainerConfig, build_trainer, meet

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
"""Where torchrun, Lightning and SLURM say which of a run's processes this is."""

TIME_TO_SAY_WHY = 2.0
"""Seconds that a rank which has not failed itself leaves the one that has: a launcher ends all
others when the first process ends."""


@contextmanager
def checked() -> Iterator[None]:
    """Before work begins, what is wrong with the input is the user's to know, in one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error


def main() -> None:
    """The command."""
    register()
    run("train", train, TrainConfig)


def train(composed: DictConfig) -> float | None:
    """Run `train.py` on what Hydra composed.

    Returns:
        In a sweep, in the first process: what ``optimized_metric`` names.
    """
    _quieten()
    job = HydraConfig.get()
    in_sweep = job.mode == RunMode.MULTIRUN
    try:
        with checked():
            config = train_config(composed)
            if in_sweep:
                config = replace(config, runs_dir=job.sweep.dir, name=job.sweep.subdir)
    except Exception:
        if in_sweep:
            Path(job.runtime.output_dir).rmdir()  # Hydra has made it; only an empty one goes
        raise
    path = Path(config.runs_dir) / config.name
    try:
        _train(path, config, in_sweep, job.overrides.task)
    except OtherRankError:
        time.sleep(TIME_TO_SAY_WHY)
        raise SystemExit(1) from None
    return final_metric(path, config.optimized_metric) if in_sweep and _is_first_process() else None


def _train(path: Path, config: TrainConfig, in_sweep: bool, overrides: list[str]) -> None:
    if in_sweep and config.trainer.world_size > 1 and not is_started_by_launcher():
        _train_apart(config, overrides)
    else:
        _train_here(path, config)


def _train_apart(config: TrainConfig, overrides: list[str]) -> None:
    """Train one job of a sweep in a process of its own, which starts those of the other ranks.

    They repeat its command line, and no process group is left over for the next job. A signal goes
    on to it, and its exit code is ours.
    """
    words = [
        *config_folders(), *overrides, setting("runs_dir", config.runs_dir),
        setting("name", config.name), "hydra.mode=RUN",
    ]  # fmt: skip
    with subprocess.Popen([sys.executable, os.path.abspath(sys.argv[0]), *words]) as process:

        def hand_on(number: int, _frame: object) -> None:
            if number != signal.SIGINT:  # which the terminal sends to both
                process.send_signal(number)

        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {each: signal.signal(each, hand_on) for each in signals}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def _train_here(path: Path, config: TrainConfig) -> None:
    threads = torch.get_num_threads()
    with checked():
        check_installed(config.logger)
        if config.trainer.resolved_accelerator() == "cpu":
            keep_freed_memory()
        if config.trainer.cpu_threads is not None:
            torch.set_num_threads(config.trainer.cpu_threads)
        meet(config.trainer)
        claim = Claim(path, beside=config.resume == "never", processes=config.trainer.world_size)
    try:
        with claim, float32_products(tf32=config.trainer.tf32):
            _train_in(claim.path, config)
    finally:
        torch.set_num_threads(threads)


def final_metric(path: Path, name: str) -> float:
    """What a run has reached, finished now or before.

    Args:
        path: of the run.
        name: ``valid/negative_elbo``: of the best validation, in nats; any other metric: the last
            value in `metrics.jsonl`.

    Raises:
        UserError: the run has logged no such metric.
    """
    if name == BEST_METRIC:
        newest = newest_checkpoint(path / "checkpoints")
        best = None if newest is None else newest.content["callbacks"]["Checkpoints"]["best"]
        if best is None:
            raise UserError(f"{path}: no validation gave a number")
        return float(best)
    found, names = None, set[str]()
    with checked(), (path / "metrics.jsonl").open() as file:
        for line in file:
            metrics = json.loads(line)
            names |= metrics.keys()
            found = metrics.get(name, found)
    if found is None:
        names -= {"step", "time"}
        raise UserError(
            f"optimized_metric={name} was not logged; allowed: {', '.join(sorted(names))}"
        )
    return float(found)


def _train_in(path: Path, config: TrainConfig) -> None:
    """Train in a folder that no other run works in."""
    with checked():
        with together():
            with own_gpu():
                name = "cuda" if config.trainer.resolved_accelerator() == "gpu" else "cpu"
                check_kernels(config.kernels, torch.device(name))
            _check_processes(config.trainer)
            data = ImageDataModule(config.data)
            data.prepare_data()
            data.setup()
            data.check_classes(config.model.num_classes)
            data.train_sampler(Shard(0, config.trainer.world_size))  # are there images for a step?
            _check_validation(data, config.trainer.world_size)
            marks = fingerprint(config, data)
        folder, changed = open_run_once(
            path, config.resume, config.to_dict(), marks, processes=config.trainer.world_size
        )
        console = Console(highlight=False, soft_wrap=True, markup=False)
        with together():
            if _is_first_process():
                describe_start(folder, config.to_dict(), sys.argv)
                _announce(console, config, folder, changed)
    is_first = _is_first_process()
    if not is_finished(folder, config):
        try:
            is_first = fit(console, config, folder, data, marks)
        except InterruptedRun as stop:
            if _is_first_process():
                console.print(f"stopped by {stop}; run the same command again to go on")
                raise SystemExit(128 + signal.Signals[stop.signal_name]) from None
            raise SystemExit(0) from None  # the launcher takes any other code for a crash
    if is_first or has_others():
        accelerator = config.trainer.resolved_accelerator()
        write_report(
            console, config.report, config.data, accelerator, folder, config.trainer.tf32,
            config.kernels,
        )  # fmt: skip


def fingerprint(config: TrainConfig, data: ImageDataModule) -> dict[str, Any]:
    """Images, architecture and seeds: what must agree for a run to go on."""
    return {
        "data": data.fingerprint(),
        "model": config.model.to_dict(),
        "seed": config.seed,
    }


def is_finished(folder: RunFolder, config: TrainConfig) -> bool:
    """Whether all epochs are done, the last one's validation too."""
    return config.trainer.is_over(folder.epochs, folder.step) and not folder.is_pending


def fit(
    console: Console,
    config: TrainConfig,
    folder: RunFolder,
    data: ImageDataModule,
    marks: dict[str, Any] | None = None,
) -> bool:
    """Train to the end, going back to a checkpoint after a divergence where that is wanted.

    Args:
        console: says what happens.
        config: of the run.
        folder: where it starts.
        data: the images.
        marks: :func:`fingerprint`, for the checkpoints.

    Returns:
        Whether this is the first process.

    Raises:
        UserError: what the user can put right: divergence, memory, a full disk.
        InterruptedRun: told to stop, and saved.
        KeyboardInterrupt: Ctrl-C before the first step, or for the second time.
        SystemExit: a crash, which was printed.
    """
    rollbacks, scale = 0, None
    while True:
        with together():
            module, trainer = _build(config, folder, scale, marks)
        try:
            with StopsNow(trainer), log_errors_once():
                trainer.fit(module, datamodule=data, ckpt_path=folder.checkpoint, weights_only=True)
        except DivergenceError as error:
            guard = guard_of(trainer)
            assert guard is not None  # it has raised the error
            if guard.on_divergence == "stop" or rollbacks == guard.max_rollbacks:
                if not trainer.is_global_zero:
                    raise OtherRankError(0, str(error)) from error
                raise UserError(f"{error}; {how_to_go_on(config, folder)}") from error
            rollbacks += 1
            scale = module.learning_rate_scale * guard.rollback_factor
            folder, _ = open_run_once(
                folder.path, "auto", config.to_dict(), processes=config.trainer.world_size
            )
            if _is_first_process():
                console.print(
                    f"{error}; going back to step {folder.step} with "
                    f"{scale:g} times the learning rate"
                )
            continue
        except InterruptedRun:
            raise
        except StopNow:
            if _is_first_process():
                raise KeyboardInterrupt from None
            raise SystemExit(128 + signal.SIGINT) from None
        except Exception as error:
            raise ended(error, trainer, module, folder) from error
        return trainer.is_global_zero


def _build(
    config: TrainConfig, folder: RunFolder, scale: float | None, marks: dict[str, Any] | None
) -> tuple[NVAELightning, pl.Trainer]:
    try:
        module = build_module(config, scale, marks)
        callbacks = build_callbacks(config.callbacks)
        if config.trainer.world_size > 1:
            callbacks = [EndTogether(partial(explained, folder=folder), AGREED), *callbacks]
        trainer = build_trainer(
            with_objects(until_validated(config.trainer, folder)),
            callbacks,
            build_loggers(config.logger, folder.path, folder.step),
            folder.path,
        )
    except (OSError, ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(brief(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"there is not enough memory to build this model ({brief(error, 200)}); lower "
            "model.* settings of width or depth"
        ) from error
    return module, trainer


def until_validated(config: TrainerConfig, folder: RunFolder) -> TrainerConfig:
    """As it is; where all steps are done but the last validation, bounded by epochs: Lightning
    begins nothing once ``max_steps`` are done."""
    if folder.is_pending and 0 <= config.max_steps <= folder.step:
        return replace(config, max_steps=-1, max_epochs=folder.epochs + 1)
    return config


def build_module(
    config: TrainConfig,
    learning_rate_scale: float | None = None,
    marks: dict[str, Any] | None = None,
) -> NVAELightning:
    """Model with its initial weights, objective and optimizer.

    Args:
        config: of the run.
        learning_rate_scale: see :class:`NVAELightning`.
        marks: :func:`fingerprint`, for the checkpoints.
    """
    recompute = config.checkpoint_cells
    if not isinstance(recompute, bool):  # auto
        recompute = _recomputes(config)
    return build(
        config.build_model,
        config.objective,
        config.optimizer,
        seed=config.seed,
        compile=config.compile,
        recompute=recompute,
        kernels=config.kernels,
        run_config=config.to_dict(),
        fingerprint=marks,
        learning_rate_scale=learning_rate_scale,
        sync_batchnorm=config.trainer.sync_batchnorm,
    )


def _check_processes(trainer: TrainerConfig) -> None:
    """Raise a ValueError where processes on a CPU would only wait for each other."""
    most = max(8, 4 * (cores := os.cpu_count() or 1))
    if trainer.resolved_accelerator() == "cpu" and int(trainer.devices) > most:
        raise ValueError(
            f"trainer.devices={trainer.devices} starts more processes than {cores} cores can "
            f"serve; give at most {most}"
        )


def _check_validation(data: ImageDataModule, processes: int) -> None:
    """Raise a ValueError where a process would have no validation image; Lightning cannot do so."""
    valid = data.resolved(VALID)
    images = len(data.split(VALID)) if valid in data.names else processes
    if images < processes:
        raise ValueError(
            f"{images} images of {valid} are fewer than the {processes} processes that validate; "
            f"give more (data.{valid}_size) or fewer processes (trainer.devices)"
        )


def _recomputes(config: TrainConfig) -> bool:
    """Whether blocks are recomputed, on all ranks alike: if any that can talk by now has to."""
    if config.trainer.resolved_accelerator() != "gpu":
        return False

    world_size, largest = config.trainer.world_size, config.data.batch_size
    if config.data.global_batch is not None:
        shares = world_size * config.trainer.accumulate_grad_batches
        largest = -(-config.data.global_batch // shares)

    def here() -> bool:
        return should_recompute(
            config.build_model,
            largest,
            config.trainer.precision,
            averages_on_device(config.callbacks),
            objective=config.objective,
            synchronized=world_size > 1 and config.trainer.sync_batchnorm != "none",
            kernels=config.kernels,
        )

    if world_size == 1:
        return here()
    return any_rank(here()) if has_others() else bool(decided("recompute", here))


def _announce(console: Console, config: TrainConfig, folder: RunFolder, changed: list[str]) -> None:
    for line in folder.passed_over:
        console.print(f"passed over a newer checkpoint: {brief(line)}")
    if folder.checkpoint is None:
        console.print(f"run {folder.path}, from the beginning")
    elif is_finished(folder, config):
        console.print(
            f"run {folder.path} is finished: {folder.epochs} epochs, step {folder.step}; nothing "
            "was trained; trainer.max_epochs=... trains longer, resume=never starts anew"
        )
    else:
        console.print(f"run {folder.path}, resumed from {folder.checkpoint.name}")
    for line in changed:
        console.print(f"  changed since: {brief(line)}")
    if config.compile and config.trainer.resolved_accelerator() == "cpu":
        console.print(
            "compile=true is meant for GPUs: on the CPU a small model's step may take longer with "
            "it; compare train/images_per_second with compile=false"
        )


def _is_first_process() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def _quieten() -> None:
    """Leave out what Lightning says about itself; warnings about the run stay."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # our loaders read with threads
        r".*Experiment logs directory.*",
        r".*is smaller than the logging interval.*",  # ours goes on over epochs
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*`broadcast_buffers` is deprecated.*",  # Lightning's own argument
        # of weights with dimensions of size 1, whose strides mean nothing
        r".*Grad strides do not match bucket view strides.*",
    ):
        warnings.filterwarnings("ignore", message)
