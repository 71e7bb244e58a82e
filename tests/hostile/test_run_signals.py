"""Ctrl-C and SIGTERM at every moment: one line, the right code, what can be saved is."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.training import signals as run_signals
from nvae.training.checkpointing import step_checkpoints
from nvae.training.module import NVAELightning
from tests import PATIENCE
from tests.hostile.runs import (
    TINY,
    Ended,
    Job,
    has_logged,
    train,
)

ROOT = Path(__file__).parents[2]


def _held_step() -> None:
    """A step says when it has begun, and is held until the signals are sent."""
    original = NVAELightning.training_step

    def held(self: NVAELightning, *arguments: Any) -> torch.Tensor:
        Path("in_step").touch()
        while not Path("signals_sent").exists():
            time.sleep(0.01)
        return original(self, *arguments)

    NVAELightning.training_step = held  # type: ignore[method-assign]


def _signalled(
    folder: Path, *signals: tuple[int, float], before: Callable[[], None] | None = None
) -> Ended:
    job = Job(folder, "trainer.max_epochs=400", before=before)
    job.until((folder / "in_step").exists if before else lambda: has_logged(folder))
    for number, pause in signals:
        job.signal(number)
        time.sleep(pause)
    (folder / "signals_sent").touch()
    return job.ended()


def _pressed_twice(folder: Path, before: Callable[[], None]) -> Ended:
    pause = 3 * run_signals.ONE_PRESS  # enough for a process that notices the first late
    return _signalled(folder, (signal.SIGINT, pause), (signal.SIGINT, 0), before=before)


def test_interrupt_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    ended = _signalled(tmp_path, (signal.SIGINT, 0))
    (path,) = step_checkpoints(tmp_path / "runs" / "r" / "checkpoints")[-1:]
    step = torch.load(path, weights_only=True)["global_step"]
    assert ended.code == 130, ended
    assert not ended.err
    last = f"stopped by SIGINT: saved at step {step}; run the same command again to go on"
    assert ended.out.splitlines()[-1] == last


def test_one_press_that_comes_twice_is_one(tmp_path: Path) -> None:
    """Of a terminal and a launcher; inside a step, which is finished."""
    ended = _signalled(tmp_path, (signal.SIGINT, 0.1), (signal.SIGINT, 0), before=_held_step)
    assert (ended.code, ended.err) == (130, "")
    assert "saved at step 1" in ended.out


def test_second_press_stops_at_once(tmp_path: Path) -> None:
    ended = _pressed_twice(tmp_path, before=_held_step)
    assert ended.code == 130
    assert ended.err == "interrupted; run the same command again\n"
    assert not list((tmp_path / "runs" / "r" / "checkpoints").iterdir())


def _stuck_step() -> None:
    """The main thread waits outside Python and answers no signal, as for a rank that hangs."""

    def stuck(*_: Any) -> torch.Tensor:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        Path("in_step").touch()
        ctypes.CDLL(None).sleep(60)
        raise AssertionError

    NVAELightning.training_step = stuck  # type: ignore[method-assign]
    run_signals._GRACE = 0.2


def test_second_press_ends_a_run_that_is_stuck(tmp_path: Path) -> None:
    ended = _pressed_twice(tmp_path, before=_stuck_step)
    assert (ended.code, ended.err) == (130, "interrupted; run the same command again\n")


@pytest.mark.parametrize(
    "first", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_sigterm_is_kept_beside_an_interrupt(tmp_path: Path, first: signal.Signals) -> None:
    second = ({signal.SIGTERM, signal.SIGINT} - {first}).pop()
    ended = _signalled(tmp_path, (first, 0.1), (second, 0), before=_held_step)
    assert (ended.code, ended.err) == (143, "")
    assert "stopped by SIGTERM: saved at step 1" in ended.out


BEFORE_TRAINING = {
    "nvae.data.module.ImageDataModule.prepare_data": "data",
    "nvae.models.nvae.NVAE.__init__": "model",
    "nvae.training.run_folder.git_revision": "start",
    "nvae.training.module.NVAELightning.configure_optimizers": "Lightning's setup",
    "nvae.training.ema.MovingAverage.setup": "a callback's setup",
    "nvae.cli.report.sample_grid": "the report",
}


def _interrupt_in(where: str) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(5)

    pytest.MonkeyPatch().setattr(where, interrupted)


class _InterruptIn:
    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self) -> None:
        _interrupt_in(self.where)


@pytest.mark.parametrize("where", BEFORE_TRAINING, ids=BEFORE_TRAINING.get)
def test_interrupt_outside_training_is_one_line(tmp_path: Path, where: str) -> None:
    ended = train(
        tmp_path, "callbacks.ema.decay=0.5", "trainer.max_epochs=1", before=_InterruptIn(where)
    )
    assert ended.code == 130, ended
    assert ended.err == "interrupted; run the same command again\n"


def _two_ranks(folder: Path, script: Path = ROOT / "train.py") -> subprocess.Popen[str]:
    """A command that starts its second rank itself, in a process group of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
    return subprocess.Popen(
        [sys.executable, script, *TINY, "trainer.devices=2", "trainer.max_epochs=4000",
         "trainer.accelerator=cpu"],
        cwd=folder, env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _ranks_left(group: int) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group and "train.py" in _command(process):
                found.append(process.name)
    return found


def _command(process: Path) -> str:
    return (process / "cmdline").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whole_group", "early"),
    [
        pytest.param(False, False, id="the first alone, in training"),
        pytest.param(True, True, id="a terminal, in setup"),
        pytest.param(False, True, id="the first alone, in setup", marks=pytest.mark.exhaustive),
        pytest.param(True, False, id="a terminal, in training", marks=pytest.mark.exhaustive),
    ],
)
def test_interrupt_ends_all_ranks(tmp_path: Path, whole_group: bool, early: bool) -> None:
    """Of the first alone, as `kill` does, and of all, as a terminal does; nobody is left behind."""
    job = _two_ranks(tmp_path)
    try:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if len(_ranks_left(job.pid)) == 2 if early else has_logged(tmp_path):
                break
            time.sleep(0.02)
        if whole_group:
            os.killpg(job.pid, signal.SIGINT)
        else:
            job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=PATIENCE)
        ended = Ended(job.returncode, out, err)
        assert ended.code == 130, ended
        # a rank may be inside Python's own start, where no code of ours answers for it
        assert "Traceback" not in err or (early and whole_group)
        assert not early or err.count("interrupted; run the same command again") >= 1
        assert early or "stopped by SIGINT: saved at step" in out
        while _ranks_left(job.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _ranks_left(job.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


INTERRUPTED_AT_ITS_START = """
import signal, subprocess
from nvae.cli import train_command

class Interrupted(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if "LOCAL_RANK" in (options.get("env") or {}):
            signal.raise_signal(signal.SIGINT)  # and Lightning never lists this process

subprocess.Popen = Interrupted
train_command()
"""


@pytest.mark.slow
def test_interrupt_while_a_rank_is_being_started_leaves_none(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(INTERRUPTED_AT_ITS_START)
    job = _two_ranks(tmp_path, script)
    try:
        _, err = job.communicate(timeout=PATIENCE)  # whoever is left holds the pipe
        assert (job.returncode, err) == (130, "interrupted; run the same command again\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
