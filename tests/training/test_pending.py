"""An epoch is saved before its validation, and a run that ends in it goes on from there."""

import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from nvae.checkpoint import load_checkpoint
from nvae.cli.config import TrainConfig
from nvae.cli.train import is_finished
from nvae.training.checkpointing import newest_checkpoint, step_checkpoints
from nvae.training.pending import is_pending
from nvae.training.run_folder import open_run
from tests.training.runs import StopAt, assert_identical, last_checkpoint, run, small_config
from tests.training.test_resume import read_lines


class Killed(Exception):  # noqa: N818
    """As abrupt as can be within a process: nothing of the run's own comes after it."""


class Kill(pl.Callback):
    """At a hook's call at one step."""

    def __init__(self, hook: str, step: int) -> None:
        def fall(trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == step and trainer.state.fn == "fit":
                raise Killed

        setattr(self, hook, fall)


MOMENTS = {
    "at its start": ("on_validation_epoch_start", 16),
    "in it": ("on_validation_batch_end", 16),
    "at its end": ("on_validation_epoch_end", 16),
    "after the epoch": ("on_train_epoch_start", 16),
    "in the next epoch": ("on_train_batch_start", 19),
    "in the last": ("on_validation_batch_end", 24),
    "after all": ("on_train_end", 24),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = run(small_config(tmp_path_factory.mktemp("whole")))
    return folder


def _assert_equal_ends(folder: Path, whole: Path) -> None:
    a, b = last_checkpoint(whole), last_checkpoint(folder)
    for checkpoint in (a, b):
        del checkpoint["run_config"]["runs_dir"]
        del checkpoint["loops"]  # counts starts and stops, not steps
    assert assert_identical(a, b) > 100
    best = [path / "checkpoints" / "best.ckpt" for path in (whole, folder)]
    found = [load_checkpoint(path) for path in best]
    for key in ("global_step", "state_dict"):
        assert_identical(found[0][key], found[1][key])
    assert read_lines(folder) == read_lines(whole)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_around_a_validation_nothing_is_lost(
    tmp_path: Path, whole: Path, moment: str
) -> None:
    """Weights, best, every metric: bit for bit as if nothing had happened."""
    config = small_config(tmp_path)
    hook, step = MOMENTS[moment]
    with pytest.raises(Killed):
        run(config, Kill(hook, step))
    folder = tmp_path / "run"
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.content["global_step"] == step // 8 * 8
    assert is_pending(newest.content) == (moment != "after all")
    if moment != "after all":
        run(config)
    _assert_equal_ends(folder, whole)


def test_bounded_by_steps_the_last_validation_is_done_as_well(tmp_path: Path) -> None:
    """Lightning begins nothing once `max_steps` are done."""

    def bounded(root: Path) -> TrainConfig:
        config = small_config(root)
        config.trainer.max_epochs, config.trainer.max_steps = None, 16
        return config

    whole, _ = run(bounded(tmp_path / "whole"))
    config = bounded(tmp_path)
    with pytest.raises(Killed):
        run(config, Kill("on_validation_batch_end", 16))
    begun, _ = open_run(tmp_path / "run", "auto", config.to_dict())
    assert begun.step == 16
    assert not is_finished(begun, config)
    folder, _ = run(config)
    assert is_finished(open_run(folder, "auto", config.to_dict())[0], config)
    _assert_equal_ends(folder, whole)


def test_a_schedule_that_follows_the_validation_sees_it_once(tmp_path: Path) -> None:
    """ReduceLROnPlateau takes its step after the validation; Lightning omits it on a restart."""

    def on_plateau(root: Path) -> TrainConfig:
        config = small_config(root)
        config.optimizer.schedule = {
            "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "patience": 0,
            "threshold": 1.0, "monitor": "valid/negative_elbo", "interval": "epoch",
        }  # fmt: skip
        config.optimizer.__post_init__()
        return config

    whole, _ = run(on_plateau(tmp_path / "whole"))
    config = on_plateau(tmp_path)
    with pytest.raises(Killed):
        run(config, Kill("on_validation_batch_end", 16))
    folder, _ = run(config)
    _assert_equal_ends(folder, whole)
    rate = last_checkpoint(folder)["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate < 0.9 * config.optimizer.learning_rate


def test_a_validation_in_mid_epoch_is_done_again_too(tmp_path: Path) -> None:
    def every_half(root: Path) -> TrainConfig:
        config = small_config(root)
        config.trainer.val_check_interval = 0.5  # type: ignore[attr-defined]
        config.callbacks["checkpoint"]["every_steps"] = 4
        return config

    whole, _ = run(every_half(tmp_path / "whole"))
    config = every_half(tmp_path)
    with pytest.raises(Killed):
        run(config, Kill("on_validation_batch_end", 12))
    folder, _ = run(config)
    assert [line["step"] for line in read_lines(folder) if "valid/kl" in line] == [
        4, 8, 12, 16, 20, 24,
    ]  # fmt: skip
    _assert_equal_ends(folder, whole)


class SignalIn(pl.Callback):
    def __init__(self, hook: str, step: int) -> None:
        def tell(trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == step:
                signal.raise_signal(signal.SIGTERM)

        setattr(self, hook, tell)


@pytest.mark.parametrize("when", ["last batch", "validation"])
def test_told_to_stop_it_does_not_wait_for_the_validation(
    tmp_path: Path, whole: Path, when: str
) -> None:
    config = small_config(tmp_path)
    callback = StopAt(16) if when == "last batch" else SignalIn("on_validation_batch_start", 16)
    folder, _ = run(config, callback)
    assert step_checkpoints(folder / "checkpoints")[-1].name == "step_00000016.ckpt"
    assert is_pending(last_checkpoint(folder))
    assert [line["step"] for line in read_lines(folder) if "valid/kl" in line] == [8]
    run(config)
    _assert_equal_ends(folder, whole)
