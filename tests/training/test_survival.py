"""Killed at any moment, out of disk space, told to stop: a loadable checkpoint remains."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from nvae.checkpoint import load_checkpoint, load_model, save_checkpoint
from nvae.cli.fitting import fit
from nvae.data.module import ImageDataModule
from nvae.training.checkpointing import newest_checkpoint, step_checkpoints
from nvae.training.module import NVAELightning
from nvae.training.run_folder import open_run
from tests import PATIENCE
from tests.training.runs import StopAt, run, small_config

ROOT = Path(__file__).parents[2]


def _process(target: Any, *arguments: Any) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def _write_for_ever(path: Path) -> None:
    torch.set_num_threads(1)
    number = 0
    while True:
        number += 1
        weights = torch.full((200_000,), float(number))
        save_checkpoint({"nvae_format": 1, "model_config": {}, "state_dict": {"w": weights}}, path)


def test_kill_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    """Thirty kills at random moments of a process that does nothing but save."""
    path, moments = tmp_path / "c.ckpt", random.Random(0)
    for _ in range(30):
        process = _process(_write_for_ever, path)
        while not path.exists():
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        weights = load_checkpoint(path)["state_dict"]["w"]
        assert bool((weights == weights[0]).all())


def _train(folder: Path) -> None:
    torch.set_num_threads(1)
    config = small_config(folder)
    config.trainer.max_epochs = 40
    config.callbacks["checkpoint"] |= {"every_steps": 1, "keep_last": 2}
    run(config)


@pytest.mark.slow
def test_kill_while_training_loses_at_most_a_step(tmp_path: Path) -> None:
    """Ten kills of a run that saves at every step; each start goes on from where it was."""
    moments, reached = random.Random(1), 0
    checkpoints = tmp_path / "run" / "checkpoints"
    for _ in range(10):
        process = _process(_train, tmp_path)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            paths = step_checkpoints(checkpoints)
            if paths and int(paths[-1].stem[5:]) > reached:
                break
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))
        assert process.pid is not None
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = newest_checkpoint(checkpoints)
        assert found is not None
        path, checkpoint = found.path, found.content
        load_model(path)
        assert checkpoint["global_step"] > reached
        reached = checkpoint["global_step"]
        assert len(list(checkpoints.glob(".*.ckpt"))) <= 1
    # each kill may have come between writing a file and dropping another; a start that lives drops
    # what they left
    process = _process(_train, tmp_path)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and _newest_step(checkpoints) < reached + 6:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert _newest_step(checkpoints) >= reached + 6
    assert len(step_checkpoints(checkpoints)) <= 4


def _newest_step(checkpoints: Path) -> int:
    return int(step_checkpoints(checkpoints)[-1].stem[5:])


def _train_on_a_full_disk(folder: Path, queue: Any) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # no file may grow beyond a few kilobytes: what a full disk looks like to a writer
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        run(small_config(folder))
    except BaseException as error:
        queue.put((type(error).__name__, isinstance(error, OSError), str(error)))
        return
    queue.put(("finished", False, ""))


def test_full_disk_stops_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    folder, _ = run(small_config(tmp_path), StopAt(5))
    before = {p.name: p.read_bytes() for p in (folder / "checkpoints").iterdir()}
    queue = multiprocessing.get_context("forkserver").Queue()
    process = _process(_train_on_a_full_disk, tmp_path, queue)
    name, is_os_error, message = queue.get(timeout=PATIENCE)
    process.join()
    assert is_os_error, (name, message)
    assert "cannot write" in message
    after = {p.name: p.read_bytes() for p in (folder / "checkpoints").iterdir()}
    assert after == before


def test_crash_ends_with_what_where_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The traceback first, then the three things one needs, last of all."""
    config = small_config(tmp_path)
    run(config, StopAt(5))
    folder, _ = open_run(tmp_path / "run", "auto", config.to_dict())

    def broken(*_: Any) -> None:
        raise RuntimeError("the cat\nsat on the keyboard")

    monkeypatch.setattr(NVAELightning, "training_step", broken)
    with pytest.raises(SystemExit) as caught:
        fit(Console(quiet=True), config, folder, ImageDataModule(config.data))
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    what, where, how = err.strip().splitlines()[-3:]
    assert what == "crashed at step 5, epoch 1: RuntimeError: the cat sat on the keyboard"
    assert str(tmp_path / "run") in where
    assert "step_00000005.ckpt" in where
    assert "the same command" in how


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive), signal.SIGUSR1]
)
def test_command_saves_on_a_signal_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    """`train.py`, told to stop, says so, exits with 128 + the signal, and resumes."""
    command = [
        sys.executable, str(ROOT / "train.py"), f"runs_dir={tmp_path}", "name=r",
        "trainer.limit_train_batches=8", "optimizer.warmup_epochs=0", "trainer.log_every_n_steps=1",
        "callbacks.pictures=null", "report.importance_samples=0", "report.samples=2",
        "trainer.max_epochs=60",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "r" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(number)
    out, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 128 + number
    assert "run the same command again to go on" in out
    (path,) = step_checkpoints(tmp_path / "r" / "checkpoints")[-1:]
    step = load_checkpoint(path)["global_step"]
    assert f"saved at step {step}" in out
    again = subprocess.run(
        [*command[:-1], "trainer.max_epochs=1"],
        env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert f"resumed from {path.name}" in again.stdout
    assert "changed since: trainer.max_epochs: 60 -> 1" in again.stdout
