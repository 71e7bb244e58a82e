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
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from nvae.cli.common import float32_products, keep_freed_memory
from nvae.cli.config import (
    BEST_METRIC,
    TrainConfig,
    check_installed,
    register,
    train_config,
)
from nvae.cli.errors import UserError, config_folders, run
from nvae.cli.fitting import fit
from nvae.cli.report import write_report
from nvae.command_line import brief, setting
from nvae.data.config import VALID
from nvae.data.module import ImageDataModule
from nvae.data.samplers import Shard
from nvae.ops.library import check_kernels
from nvae.training.checkpointing import newest_checkpoint
from nvae.training.memory import own_gpu
from nvae.training.processes import is_first_process, is_started_by_launcher
from nvae.training.ranks import OtherRankError, has_others, together
from nvae.training.run_folder import (
    Claim,
    RunFolder,
    describe_start,
    open_run_once,
)
from nvae.training.signals import InterruptedRun
from nvae.training.trainer import TrainerConfig, meet

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
    return final_metric(path, config.optimized_metric) if in_sweep and is_first_process() else None


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
            if is_first_process():
                describe_start(folder, config.to_dict(), sys.argv)
                _announce(console, config, folder, changed)
    is_first = is_first_process()
    if not is_finished(folder, config):
        try:
            is_first = fit(console, config, folder, data, marks)
        except InterruptedRun as stop:
            if is_first_process():
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
