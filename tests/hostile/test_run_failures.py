"""Full disks, folders that are gone or were never there, runs that trained nothing."""

import dataclasses
import errno
import json
import pathlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from nvae.checkpoint import CheckpointError
from nvae.training.checkpointing import step_checkpoints
from tests.hostile.runs import Job, assert_one_line, train


class _FullDisk:
    """Files whose name holds a text cannot be written, after the first few times."""

    def __init__(self, text: str, after: int = 0) -> None:
        self.text, self.left = text, after

    def __call__(self) -> None:
        original = pathlib.Path.open

        def full(path: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            if self.text in str(path.name) and ("w" in mode or "a" in mode):
                self.left -= 1
                if self.left < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return original(path, mode, *arguments, **more)

        pathlib.Path.open = full  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("file", "after", "told"),
    [
        (".config", 0, "cannot write config.yaml and starts.jsonl in runs/r: No space left"),
        pytest.param(
            "starts.jsonl",
            0,
            "cannot write config.yaml and starts.jsonl in runs/r: No space left",
            marks=pytest.mark.slow,
        ),
        (".step_", 0, "cannot write runs/r/checkpoints/step_00000008.ckpt"),
        pytest.param(
            ".step_",
            1,
            "cannot write runs/r/checkpoints/step_00000016.ckpt",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_full_disk_is_one_line(tmp_path: Path, file: str, after: int, told: str) -> None:
    ended = train(tmp_path, before=_FullDisk(file, after))
    assert_one_line(ended, told, "then run the same command again")
    again = train(tmp_path)  # with room again
    assert again.code == 0, again
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sorted(set(steps)) == list(range(1, 17))
    assert steps == sorted(steps)


@pytest.mark.parametrize("after", [0, 20])
def test_a_log_that_cannot_be_written_is_one_warning(tmp_path: Path, after: int) -> None:
    """Training goes on; what was logged before stays, and a resumed run begins where it was."""
    ended = train(tmp_path, before=_FullDisk("metrics.jsonl", after))
    assert ended.code == 0, ended
    assert ended.err.count("\n") == 1, ended
    told = "logger.jsonl failed in log_metrics (LogWriteError: cannot write runs/r/metrics.jsonl: "
    assert ended.err.startswith(f"{told}No space left on device); training goes on"), ended
    (tmp_path / "runs" / "r" / "checkpoints" / "step_00000016.ckpt").unlink()
    again = train(tmp_path, "callbacks.checkpoint.keep_last=3")
    assert (again.code, again.err) == (0, "")
    lines = (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)
    assert steps[-1] == 16
    assert (1 in steps) == (after > 0)


class _Broken(Logger):
    """Somebody's logger, whose network is gone."""

    name = version = "broken"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    def log_metrics(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    def finalize(self, status: str) -> None:
        raise KeyError("never began")


def test_a_logger_of_anybody_that_fails_is_one_warning_a_cause(tmp_path: Path) -> None:
    ended = train(
        tmp_path, f"+logger.mine={{_target_: {__name__}._Broken}}", "trainer.max_epochs=1"
    )
    assert ended.code == 0, ended
    assert [line.split(")")[0] for line in ended.err.splitlines()] == [
        "logger.mine failed in log_hyperparams (ConnectionError: no route to host",
        "logger.mine failed in finalize (KeyError: 'never began'",
    ]


class _BrokenCallback(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise KeyError("mine")


def test_a_callback_of_the_user_that_fails_is_an_error(tmp_path: Path) -> None:
    ended = train(tmp_path, f"+callbacks.mine={{_target_: {__name__}._BrokenCallback}}")
    assert ended.code == 1
    assert "crashed at step 1, epoch 1: KeyError: 'mine'" in ended.err


class _SmallFiles:
    def __init__(self, largest: int) -> None:
        self.largest = largest

    def __call__(self) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest, self.largest))


@pytest.mark.slow
@pytest.mark.parametrize("largest", [3000, 5000, 20_000, 60_000, 100_000])
def test_files_that_cannot_grow_are_one_line(tmp_path: Path, largest: int) -> None:
    """All logs on: TensorBoard fails in a thread of its own. Warnings may come before the line."""
    logs = [
        f"logger.{name}={{_target_: nvae.training.logging.{kind}}}"
        for name, kind in (("tensorboard", "RunTensorBoard"), ("csv", "RunCSV"))
    ]
    ended = train(tmp_path, *logs, before=_SmallFiles(largest))
    *warnings, last = ended.err.splitlines(keepends=True)
    assert_one_line(dataclasses.replace(ended, err=last), "the same command again")
    assert all(line.startswith("logger.") for line in warnings), ended
    assert len(warnings) <= 6, ended


def test_picture_that_cannot_be_written_does_not_end_training(tmp_path: Path) -> None:
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "pictures").touch()
    ended = train(tmp_path, "callbacks.pictures.every_epochs=1")
    assert ended.code == 0
    assert ended.err.startswith("callbacks.pictures failed in samples (FileExistsError")
    assert ended.err.count("\n") == 1


def test_folder_deleted_meanwhile_is_one_line(tmp_path: Path) -> None:
    job = Job(tmp_path, "trainer.max_epochs=400", "logger.jsonl=null")
    run = tmp_path / "runs" / "r"
    job.until(lambda: bool(step_checkpoints(run / "checkpoints")))
    while run.exists():
        shutil.rmtree(run, ignore_errors=True)
    assert_one_line(job.ended(), "then run the same command again")
    assert not run.exists()


def test_written_file_that_reads_otherwise_is_one_line(tmp_path: Path) -> None:
    ended = train(tmp_path, before=_read_back_wrongly)
    assert_one_line(ended, ".ckpt is damaged", "then run the same command again")


def _read_back_wrongly() -> None:
    def damaged(path: Path) -> None:
        raise CheckpointError(f"{path} is damaged")

    pytest.MonkeyPatch().setattr("nvae.training.checkpointing.load_checkpoint", damaged)


@pytest.mark.parametrize("runs", ["/dev/null", "/proc", "/dev/null/x", "file"])
def test_runs_dir_that_is_none_is_one_line(tmp_path: Path, runs: str) -> None:
    (tmp_path / "file").touch()
    assert_one_line(train(tmp_path, f"runs_dir={runs}"), f"{runs}/r cannot be the run's folder")


BAD = {
    "nothing": ("callbacks.guard.skip_threshold=1e-9", "16 steps in a row"),
    "nearly nothing": ("optimizer.learning_rate=1000", "steps in a row"),
}


@pytest.mark.parametrize("kind", BAD)
def test_run_that_trained_nothing_fails(tmp_path: Path, kind: str) -> None:
    override, told = BAD[kind]
    assert_one_line(train(tmp_path, override), "training diverged at step 16", told, "at the first")


def test_model_that_no_memory_holds_is_one_line(tmp_path: Path) -> None:
    ended = train(tmp_path, before=_NoMemory())
    assert_one_line(ended, "not enough memory to build this model", "lower model.")


class _NoMemory:
    def __call__(self) -> None:
        def fails(*_: Any) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to\nallocate")

        pytest.MonkeyPatch().setattr("nvae.models.nvae.NVAE.__init__", fails)
