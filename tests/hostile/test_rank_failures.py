"""What fails on one of two ranks ends both in seconds: one message, the cause, no exit code 0."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from nvae.cli.training_errors import AGREED, explained
from nvae.training.checkpointing import step_checkpoints
from nvae.training.end_together import EndTogether
from nvae.training.run_folder import RunFolder
from tests import PATIENCE
from tests.hostile.runs import TINY, Ended, has_logged
from tests.training.ranks import free_port

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, signal, sys, time
import torch
from nvae.cli import train_command
from nvae.data.module import ImageDataModule
from nvae.models import NVAE
from nvae.training import checkpointing
from nvae.training.checkpointing import Checkpoints
from nvae.training.module import NVAELightning

rank, mode = int(os.environ.get("LOCAL_RANK", "0")), os.environ["MODE"]
original_step = NVAELightning.training_step

def fails(self, batch, batch_idx):
    if self.trainer.global_step == 2:
        match mode, rank:
            case "data", 1:
                raise OSError("image 5 cannot be read")
            case "memory", 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            case "stuck", 0:
                time.sleep(600)  # as in a kernel that waits for the other rank
            case "stuck", 1:
                raise ZeroDivisionError("of a user's own")
            case "killed", 1:
                os.kill(os.getpid(), signal.SIGKILL)
            case "first killed", 0:
                os.kill(os.getpid(), signal.SIGKILL)
    return original_step(self, batch, batch_idx)

def full(checkpoint, path):
    raise OSError(28, "No space left on device")

def callback(self, trainer, *_):
    if rank == 1 and trainer.global_step == 2:
        sys.exit(3)

def no_memory(self, *_, **__):
    raise MemoryError("not enough memory")

NVAELightning.training_step = fails
if mode == "disk" and rank == 0:
    checkpointing.save_checkpoint = full
if mode == "exit":
    Checkpoints.on_train_batch_end = callback
if mode == "build" and rank == 1:
    NVAE.__init__ = no_memory
train_command()
"""


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "NVAE"))}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _ended(folder: Path, mode: str, *command: object) -> Ended:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    job = subprocess.Popen(
        [sys.executable, *command, script, *TINY, "trainer.devices=2", "trainer.max_epochs=4000",
         "trainer.accelerator=cpu"],
        cwd=folder, env=_environment() | {"MODE": mode}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = job.communicate(timeout=PATIENCE)  # the process group's own time-out is longer
        return Ended(job.returncode, out, err)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def _errors(ended: Ended) -> list[str]:
    return [line for line in ended.err.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "cause"),
    [
        ("data", "error: rank 1: image 5 cannot be read; "),
        pytest.param(
            *("memory", "error: rank 1: there is not enough memory (CUDA out of memory); "),
            marks=pytest.mark.exhaustive,
        ),
        ("disk", "No space left on device; older checkpoints are intact; "),
    ],
)
def test_what_the_user_can_put_right_is_one_line(tmp_path: Path, mode: str, cause: str) -> None:
    ended = _ended(tmp_path, mode)
    (line,) = _errors(ended)
    assert ended.code == 2, ended
    assert cause in line
    assert "Traceback" not in ended.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "cause"),
    [
        ("stuck", "ZeroDivisionError: of a user's own"),
        pytest.param("exit", "SystemExit: 3", marks=pytest.mark.exhaustive),
    ],
)
def test_a_crash_of_one_rank_is_told_once(tmp_path: Path, mode: str, cause: str) -> None:
    """Also where the first rank is in the middle of a call that does not return."""
    ended = _ended(tmp_path, mode)
    assert ended.code == 1, ended
    assert ended.err.count("Traceback (most recent call last)") == 1
    assert f"rank 1: crashed at step 2, epoch 1: {cause}" in ended.err


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    ended = _ended(tmp_path, "killed")
    (line,) = _errors(ended)
    assert ended.code == 1, ended
    assert line.startswith("error: rank 1 (process ")
    assert "was ended by SIGKILL" in line
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_the_others_end_with_a_first_rank_that_is_killed(tmp_path: Path) -> None:
    ended = _ended(tmp_path, "first killed")  # at once: whoever is left holds the pipe
    assert ended.code == -signal.SIGKILL
    assert "Traceback" not in ended.err


def test_what_explains_an_error_goes_to_a_spawned_process() -> None:
    end = EndTogether(partial(explained, folder=RunFolder(Path("run"))), AGREED)
    assert isinstance(pickle.loads(pickle.dumps(end)), EndTogether)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "options"),
    [
        pytest.param(signal.SIGTERM, [], marks=pytest.mark.exhaustive),
        (signal.SIGUSR1, ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]),
    ],
)
def test_torchrun_hands_signals_on(tmp_path: Path, number: int, options: list[str]) -> None:
    """And the run saves within the time that it leaves."""
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *options,
         f"--master-port={free_port()}", ROOT / "train.py", *TINY, "trainer.devices=2",
         "trainer.max_epochs=4000", "trainer.accelerator=cpu"],
        cwd=tmp_path, env=_environment(), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while not has_logged(tmp_path):
            assert job.poll() is None
            time.sleep(0.1)
        job.send_signal(number)
        out, _ = job.communicate(timeout=PATIENCE)
        assert f"stopped by {signal.Signals(number).name}: saved at step" in out
        assert step_checkpoints(tmp_path / "runs" / "r" / "checkpoints")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_rank_that_fails_before_training_ends_the_first(tmp_path: Path) -> None:
    """Which waits for it to join the process group."""
    ended = _ended(tmp_path, "build")
    (line,) = _errors(ended)
    assert ended.code != 0
    assert "there is not enough memory to build this model" in line


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("data", marks=pytest.mark.exhaustive), "build"])
def test_under_torchrun_too(tmp_path: Path, mode: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    ended = _ended(tmp_path, mode, *launcher)
    (line,) = _errors(ended)
    assert ended.code != 0
    assert {"data": "image 5 cannot be read", "build": "not enough memory"}[mode] in line
