"""From a run's configuration to Lightning's module and trainer; the fit and the ways it may end."""

import signal
from dataclasses import replace
from functools import partial
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console

from nvae.cli.config import (
    TrainConfig,
    averages_on_device,
    build_callbacks,
    build_loggers,
    with_objects,
)
from nvae.cli.errors import UserError, is_out_of_memory
from nvae.cli.training_errors import AGREED, ended, explained, how_to_go_on
from nvae.command_line import brief
from nvae.data.module import ImageDataModule
from nvae.training.end_together import EndTogether
from nvae.training.guard import DivergenceError, guard_of
from nvae.training.logging import log_errors_once
from nvae.training.module import NVAELightning
from nvae.training.module import build_module as build
from nvae.training.processes import decided, is_first_process
from nvae.training.ranks import OtherRankError, any_rank, has_others, together
from nvae.training.recompute import should_recompute
from nvae.training.run_folder import RunFolder, open_run_once
from nvae.training.signals import InterruptedRun, StopNow, StopsNow
from nvae.training.trainer import TrainerConfig, build_trainer


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
        marks: :func:`nvae.cli.train.fingerprint`, for the checkpoints.

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
            if is_first_process():
                console.print(
                    f"{error}; going back to step {folder.step} with "
                    f"{scale:g} times the learning rate"
                )
            continue
        except InterruptedRun:
            raise
        except StopNow:
            if is_first_process():
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
        marks: :func:`nvae.cli.train.fingerprint`, for the checkpoints.
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
