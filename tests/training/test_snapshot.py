"""Copies that training cannot change, written by a thread whose errors are heard."""

import threading
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from nvae.checkpoint import load_checkpoint, load_model
from nvae.files import link_or_copy
from nvae.training import checkpointing
from nvae.training.checkpointing import CheckpointWriteError, step_checkpoints
from nvae.training.snapshot import BackgroundWriter, Snapshots
from tests import PATIENCE
from tests.training.runs import assert_identical, run, small_config


def test_a_copy_is_the_content_of_that_moment() -> None:
    """Views, layouts, shared storages, attributes; the second copy takes the first's memory."""
    block = torch.arange(12.0)
    state = nn.Linear(2, 3).state_dict()
    content = {
        "views": [block[1:5], block.view(3, 4).t()], "state": state, "empty": torch.empty(0),
        "plain": (1, {"a": None, "b": [2.5, "x", True]}), "whole": torch.tensor(3),
    }  # fmt: skip
    snapshots = Snapshots()
    first = snapshots.take(content).finish()
    expected = {**content, "views": [block[1:5].clone(), block.view(3, 4).t().clone()]}
    block.zero_()
    assert_identical(first, expected)
    one, two = first["views"]
    assert one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
    assert one.stride() == (1,)
    assert two.stride() == (1, 4)
    assert first["state"]._metadata == state._metadata
    second = snapshots.take(content).finish()
    assert second["views"][0].data_ptr() == one.data_ptr()
    assert not one.any()


def test_what_is_constant_is_copied_when_it_is_finished() -> None:
    weight, statistics = torch.ones(3), torch.ones(3)
    snapshot = Snapshots().take({"w": weight, "s": statistics, "again": [weight[:2]]}, [weight])
    statistics.zero_()
    weight.mul_(2)  # nobody should; it shows when the copy was made
    found = snapshot.finish()
    weight.zero_()
    assert_identical(
        found, {"w": torch.full((3,), 2.0), "s": torch.ones(3), "again": [torch.full((2,), 2.0)]}
    )


def test_one_at_a_time_and_an_error_stops_what_follows() -> None:
    writer, begun, go, done = BackgroundWriter(), threading.Event(), threading.Event(), []

    def write(content: Any) -> None:
        begun.set()
        assert go.wait(PATIENCE)
        raise OSError("no space")

    tensor = torch.ones(2)
    writer.save({"a": tensor}, write, [tensor])
    writer.submit(lambda: done.append("link"))
    writer.settle()
    assert begun.wait(PATIENCE)
    assert not writer.has_failed
    go.set()
    with pytest.raises(OSError, match="no space"):
        writer.save({}, done.append)
    assert not done
    writer.save({"a": tensor}, done.append)
    writer.wait()
    assert_identical(done, [{"a": torch.ones(2)}])


def test_an_error_in_the_thread_ends_the_run_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one of the next steps, not at the next checkpoint; older files stay."""
    original = checkpointing.write_checked

    def fails_late(checkpoint: dict[str, Any], path: Path) -> None:
        if checkpoint["global_step"] == 10:
            raise CheckpointWriteError(f"cannot write {path}")
        original(checkpoint, path)

    monkeypatch.setattr(checkpointing, "write_checked", fails_late)
    config = small_config(tmp_path)
    config.callbacks["checkpoint"] |= {"every_steps": 5, "keep_last": 2}
    reached = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            reached.append(trainer.global_step)
            checkpoints = next(
                c for c in trainer.callbacks if isinstance(c, checkpointing.Checkpoints)
            )
            for future in checkpoints._writer._pending:  # the disk is quick today
                future.result()

    with pytest.raises(CheckpointWriteError):
        run(config, Look())
    assert max(reached) <= 11
    names = [path.name for path in step_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step_00000005.ckpt", "step_00000008.ckpt"]


def test_minutes_make_checkpoints_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes a minute at a look: every second step, looked at once a step."""
    ticks = iter(range(0, 10**6, 60))
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: float(next(ticks)))
    config = small_config(tmp_path)
    config.trainer.max_epochs = 1
    config.callbacks["checkpoint"] |= {"every_minutes": 2.0, "every_epochs": 7}
    config.callbacks["signals"] = None
    folder, _ = run(config)
    steps = [int(path.stem[5:]) for path in step_checkpoints(folder / "checkpoints")]
    assert steps == [2, 4, 6, 8]
    with pytest.raises(ValueError, match="every_minutes is 0"):
        checkpointing.Checkpoints(every_minutes=0)


def test_the_best_is_a_second_name_and_outlives_the_first(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.trainer.max_epochs = 1
    folder, _ = run(config)
    best = folder / "checkpoints" / "best.ckpt"
    for path in step_checkpoints(folder / "checkpoints"):
        path.unlink()
    assert load_checkpoint(best)["global_step"] == 8
    load_model(best)


def test_without_links_it_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("new")
    target.write_text("old")
    link_or_copy(source, target)
    link_or_copy(source, target)
    assert target.samefile(source)
    target.unlink()
    monkeypatch.delattr("os.link")
    monkeypatch.setattr("os.link", _no_links, raising=False)
    link_or_copy(source, target)
    assert target.read_text() == "new"
    assert not target.samefile(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def _no_links(*_: Any) -> None:
    raise PermissionError("no links here")


def test_checkpoints_of_lightnings_own_callback_are_there_at_once(tmp_path: Path) -> None:
    seen = []

    class Own(ModelCheckpoint):
        def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            seen.append(load_checkpoint(filepath)["global_step"])

    config = small_config(tmp_path)
    config.trainer.max_epochs = 1
    run(config, Own(tmp_path / "own", save_last="link"))
    assert seen == [8]
    assert load_checkpoint(tmp_path / "own" / "last.ckpt")["global_step"] == 8
