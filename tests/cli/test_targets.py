"""Callbacks, loggers and plugins by `_target_`, and everything that Lightning's Trainer takes."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from hydra.errors import HydraException
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.profilers import SimpleProfiler

from nvae.cli.config import (
    TrainConfig,
    build_callbacks,
    build_loggers,
    check_installed,
    compose_train,
    with_objects,
)
from nvae.cli.errors import one_line
from nvae.training.checkpointing import Checkpoints
from nvae.training.logging import RunTensorBoard, kept_id
from nvae.training.trainer import NOT_SETTINGS, TrainerConfig, build_trainer


def test_every_argument_of_the_trainer_is_a_setting() -> None:
    arguments = set(inspect.signature(pl.Trainer.__init__).parameters) - set(NOT_SETTINGS)
    assert arguments <= set(TrainerConfig.__dataclass_fields__)


def test_arguments_reach_the_trainer(tmp_path: Path) -> None:
    config = compose_train(
        ["trainer.max_steps=7", "trainer.val_check_interval=3", "trainer.limit_train_batches=0.5",
         "trainer.gradient_clip_val=2", "trainer.check_val_every_n_epoch=null",
         "trainer.profiler={_target_: pytorch_lightning.profilers.SimpleProfiler}",
         "trainer.plugins=[{_target_: "
         "pytorch_lightning.plugins.environments.LightningEnvironment}]"],
    )  # fmt: skip
    trainer = build_trainer(with_objects(config.trainer), [], [], tmp_path)
    assert (trainer.max_steps, trainer.max_epochs, trainer.val_check_interval) == (7, 60, 3)  # type: ignore[attr-defined]
    assert (trainer.limit_train_batches, trainer.gradient_clip_val) == (0.5, 2)  # type: ignore[attr-defined]
    assert isinstance(trainer.profiler, SimpleProfiler)  # type: ignore[attr-defined]
    environment = trainer.strategy.cluster_environment if trainer.world_size > 1 else None
    assert environment is None or isinstance(environment, LightningEnvironment)


def test_null_switches_off_and_a_further_one_is_added(tmp_path: Path) -> None:
    config = compose_train(
        ["callbacks.checkpoint=null", "callbacks=early_stopping", "logger.csv=null"]
    )
    callbacks = build_callbacks(config.callbacks)
    assert not any(isinstance(callback, Checkpoints) for callback in callbacks)
    (stopping,) = [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
    assert stopping.monitor == "valid/negative_elbo"
    loggers = build_loggers(config.logger, tmp_path, 0)
    assert [type(logger).__name__ for logger in loggers] == ["RunTensorBoard", "JsonLinesLogger"]
    assert isinstance(loggers[0], RunTensorBoard)
    assert Path(loggers[0].log_dir).parent == tmp_path
    assert not list(tmp_path.iterdir())


MISTAKES: dict[str, str] = {
    "trainer.max_step=3": "unknown key trainer.max_step (did you mean max_steps?)",
    "trainer.limit_val_batches=1.5": "it must be at least 1 batch, or a share above 0",
    "trainer.max_epochs=null": "trainer.max_epochs is null; then give trainer.max_steps",
    "callbacks.guard.max_rollback=3": "unknown key callbacks.guard.max_rollback (did you mean "
    "max_rollbacks?)",
    "+callbacks.guard.max_rollback=3": "unknown key callbacks.guard.max_rollback (did you mean "
    "max_rollbacks?)",
    "callbacks.checkpoint.every_steps=often": "every_steps='often' is not an integer or null",
    "callbacks.signals.requeue=3": "callbacks.signals.requeue=3 is not true or false",
    "callbacks.progress=false": "callbacks.progress=False: it takes a group with _target_, or null",
    "+callbacks.mine._target_=no.such.Thing": "callbacks.mine._target_=no.such.Thing: No module",
    "callbacks.mine._target_=math.gcd": "unknown key callbacks.mine; allowed here: pictures, ema, "
    "guard, checkpoint, signals, progress; +callbacks.mine._target_=... adds one",
    "logger.csv.color=red": "unknown key logger.csv.color; allowed here: ",
    "+callbacks.mine._target_=math.gcd": "callbacks.mine",
    "+callbacks.mine._target_=./mine.py": "mine._target_=./mine.py: write package.module.Class, no",
    "+callbacks.mine._target_=.mine.Thing": "write package.module.Class, not a path",
    "+logger.csv.color=red": "",  # Lightning's take any
    "+logger.jsonl.color=red": "unknown key logger.jsonl.color; allowed here: save_dir",
    "optimizer.name=torch.optim:Sgd": "optimizer.name=torch.optim:Sgd cannot be imported",
    "+optimizer.arguments.momentum=1": "unknown key optimizer.arguments.momentum; allowed here: ",
    "optimizer.schedule={_target_: math.gcd}": "optimizer.schedule._target_=math:gcd is no LRSched",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistake_is_one_line(override: str) -> None:
    if not MISTAKES[override]:
        compose_train([override])
        return
    with pytest.raises((HydraException, ValueError)) as caught:
        compose_train([override])
    line = one_line(caught.value, TrainConfig)
    assert MISTAKES[override] in line
    assert "\n" not in line


def test_a_logger_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_train(["logger=wandb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        check_installed(config.logger)


def test_a_run_keeps_its_id_and_shares_it_with_no_other(tmp_path: Path) -> None:
    """Runs of one name in two folders are two pages; a resumed run goes on in its own."""
    first, second = (kept_id(tmp_path / folder / "r" / "wandb_id") for folder in "ab")
    assert first != second
    assert kept_id(tmp_path / "a" / "r" / "wandb_id") == first


@pytest.mark.slow
def test_a_run_ends_after_max_steps_and_stays_ended(tmp_path: Path) -> None:
    """In the middle of an epoch, with a schedule, an optimizer and a callback of others."""
    root = Path(__file__).parents[2]
    command: list[Any] = [
        sys.executable, root / "train.py", f"runs_dir={tmp_path}", "name=r", "trainer.max_steps=5",
        "model=nvae_tiny",
        "report.importance_samples=0", "report.samples=2", "callbacks=early_stopping",
        "optimizer.name=torch.optim:RAdam", "callbacks.pictures=null",
        "optimizer.schedule={_target_: torch.optim.lr_scheduler.ExponentialLR, gamma: 0.9}",
    ]  # fmt: skip
    first, again = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "r/checkpoints/step_00000005.ckpt").exists()
    assert "is finished: 1 epochs, step 5" in again.stdout, again.stdout + again.stderr
    command[4] = "trainer.max_steps=8"
    longer = subprocess.run(command, capture_output=True, text=True)
    assert longer.returncode == 0, longer.stderr
    assert "resumed from step_00000005.ckpt" in longer.stdout
    assert (tmp_path / "r/checkpoints/step_00000008.ckpt").exists()
