"""Settings that are no numbers, hand-made checkpoints, two processes, signals, full disks."""

import contextlib
import copy
import ctypes
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.checkpoint import CheckpointError
from nvae.cli.compose import compose_train
from nvae.cli.config import TrainConfig
from nvae.training import stop_now
from nvae.training.checkpointing import step_checkpoints
from nvae.training.module import NVAELightning
from nvae.training.resuming import check_resumable
from nvae.training.run_lock import LOCK_FILE, FolderInUseError, RunLock, lock_unused
from tests.hostile.runs import TINY, Ended, Job, assert_one_line, numeric_settings, takes, train

ROOT = Path(__file__).parents[2]
NUMBERS = numeric_settings(TrainConfig)
NOT_YET = ("data.", "model.")
"""Sections whose dataclasses are checked elsewhere."""


def _set(config: Any, name: str, value: Any) -> None:
    """Make the dataclasses anew around one changed value, as Python code would."""
    first, _, rest = name.partition(".")
    if rest:
        _set(getattr(config, first), rest, value)
    dataclasses.replace(config, **({} if rest else {first: value}))


@pytest.fixture(scope="module")
def composed() -> TrainConfig:
    return compose_train()


@pytest.mark.parametrize(
    ("name", "is_list"), [n for n in NUMBERS if not n[0].startswith(NOT_YET)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_number_that_is_not_finite_is_named(
    composed: TrainConfig, name: str, is_list: bool, value: float
) -> None:
    """From Python too; the setting itself and not its neighbour."""
    with pytest.raises(ValueError, match="finite") as caught:
        _set(composed, name, [value] if is_list else value)
    assert str(caught.value).startswith(f"{name} is {value}"), caught.value
    assert "\n" not in str(caught.value)


def _scalars(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _scalars(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name, kind


@pytest.mark.parametrize(
    ("name", "kind"), [s for s in _scalars(TrainConfig) if not s[0].startswith(NOT_YET)],
    ids=lambda v: str(v),
)  # fmt: skip
def test_value_of_another_type_is_named(composed: TrainConfig, name: str, kind: Any) -> None:
    for wrong in ({}, [object()], b"x", 10**30, -(10**30)):
        if isinstance(wrong, int) and not takes(kind, int):
            continue
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
            _set(composed, name, wrong)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose newest checkpoint is in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    every_step = ("callbacks.checkpoint.every_steps=1", "callbacks.checkpoint.keep_last=100")
    ended = train(folder, *every_step)
    assert ended.code == 0, ended
    for path in step_checkpoints(folder / "runs" / "r" / "checkpoints")[12:]:
        path.unlink()
    return folder


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source / "runs", target / "runs")
    return target


def _state(folder: Path) -> dict[str, bytes]:
    found = {str(p): p.read_bytes() for p in (folder / "runs").rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if LOCK_FILE not in name}


WRONG = (None, [], {}, "x", -1, 10**30, [1], {"x": 1}, float("nan"))


def _entries(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a checkpoint that is no tensor, holders included."""
    if isinstance(value, torch.Tensor):
        return
    if path:
        yield path
    pairs: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list | tuple):
        pairs = list(enumerate(value))[:2]
    for key, entry in pairs:
        yield from _entries(entry, (*path, key))


CHECKED = (
    "fingerprint", "callbacks", "loops", "global_step", "learning_rate_scale", "epoch",
    "optimizer_states", "lr_schedulers", "model_config", "run_config", "state_dict",
)  # fmt: skip
HARMLESS = (
    "model_config.", "run_config.", "fingerprint.model.", "param_groups", "lr_schedulers",
    ".validate_loop", ".test_loop", ".predict_loop", "manual_optimization", "val_loop",
    "fingerprint.data", "fingerprint.seed", "state_dict", "optimizer_states.0.state.",
)  # fmt: skip
"""Values that are compared, replaced at the start, or not used: other ones are another setting."""


def test_every_entry_of_another_type_is_refused(stopped: Path) -> None:
    """About four thousand edited checkpoints; none raises anything but the one line."""
    path = step_checkpoints(stopped / "runs" / "r" / "checkpoints")[-1]
    whole = torch.load(path, weights_only=True)
    check_resumable(whole, path)
    tried = passed = 0
    for entry in _entries({key: whole[key] for key in CHECKED}):
        name = ".".join(map(str, entry))
        for wrong in WRONG:
            edited = copy.copy(whole)
            holder: Any = edited
            for key in entry[:-1]:
                holder[key] = copy.copy(holder[key])
                holder = holder[key]
            if isinstance(holder, tuple):
                continue
            if type(holder[entry[-1]]) is type(wrong) and not isinstance(wrong, int):
                continue
            holder[entry[-1]] = wrong
            tried += 1
            refusal = _refusal(edited, path)
            if refusal is not None:
                assert "\n" not in refusal
                continue
            is_optional = wrong is None and name.endswith(".best")
            is_optional |= name.endswith(".best") and isinstance(wrong, int | float)
            assert is_optional or any(text in f".{name}." for text in HARMLESS), (name, wrong)
            passed += 1
    assert tried > 1000
    assert passed < tried / 2


def _refusal(checkpoint: dict[str, Any], path: Path) -> str | None:
    try:
        check_resumable(checkpoint, path)
    except CheckpointError as error:
        return str(error)
    return None


EDITS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "fingerprint of none": (("fingerprint",), None),
    "fingerprint a list": (("fingerprint",), []),
    "seed text": (("fingerprint", "seed"), "x"),
    "run_config none": (("run_config",), None),
    "run_config list": (("run_config",), [1]),
    "run_config number keys": (("run_config", "trainer"), {1: 2}),
    "callbacks none": (("callbacks",), None),
    "best text": (("callbacks", "Checkpoints", "best"), "x"),
    "loops list": (("loops",), []),
    "loops empty": (("loops",), {}),
    "fit loop without parts": (("loops", "fit_loop"), {"state_dict": {"combined_loader": []}}),
    "epoch progress empty": (("loops", "fit_loop", "epoch_progress"), {}),
    "a loop none": (("loops", "validate_loop"), None),
    "global_step text": (("global_step",), "12"),
    "global_step negative": (("global_step",), -1),
    "global_step huge": (("global_step",), 10**30),
    "scale nan": (("learning_rate_scale",), float("nan")),
    "scale text": (("learning_rate_scale",), "1"),
    "optimizer none": (("optimizer_states",), None),
    "optimizer empty": (("optimizer_states",), [{}]),
    "optimizer state text": (("optimizer_states", 0, "state"), "x"),
    "optimizer entry a list": (("optimizer_states", 0, "state", 0), []),
    "optimizer tensor of another shape": (
        ("optimizer_states", 0, "state", 0, "exp_avg"),
        torch.zeros(3, 3, 3),
    ),
    "weights none": (("state_dict",), None),
    "weights empty": (("state_dict",), {}),
    "no scheduler": (("lr_schedulers",), []),
}


def _edited(stopped: Path, target: Path, entry: tuple[Any, ...], value: Any) -> Path:
    folder = _copy(stopped, target)
    path = step_checkpoints(folder / "runs" / "r" / "checkpoints")[-1]
    checkpoint = torch.load(path, weights_only=True)
    holder = checkpoint
    for key in entry[:-1]:
        holder = holder[key]
    holder[entry[-1]] = value
    torch.save(checkpoint, path)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_hand_made_checkpoint_is_one_line(tmp_path: Path, stopped: Path, edit: str) -> None:
    """The command trains nothing and leaves checkpoints and logs as they were."""
    folder = _edited(stopped, tmp_path, *EDITS[edit])
    before = _state(folder)
    assert_one_line(train(folder))
    after = _state(folder)
    for name in ("config.yaml", "starts.jsonl"):  # what this start says about itself
        for state in (before, after):
            state.pop(str(folder / "runs" / "r" / name), None)
    assert after == before


def test_checkpoint_without_fingerprint_resumes(tmp_path: Path, stopped: Path) -> None:
    """Of an earlier version."""
    folder = _copy(stopped, tmp_path)
    path = step_checkpoints(folder / "runs" / "r" / "checkpoints")[-1]
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["fingerprint"], checkpoint["callbacks"]["BadSteps"]
    torch.save(checkpoint, path)
    assert_one_line(train(folder, "data.train_size=60"), "data.train_size: 64 -> 60")
    ended = train(folder)
    assert ended.code == 0, ended
    assert f"resumed from {path.name}" in ended.out


REFUSED = {
    "data.train_size=48": "train images: 64 -> 48",
    "data.split_seed=4": "train images: others, as many",
    "data.seed=3": "data.seed: 0 -> 3",
    "seed=3": "(seed: 0 -> 3)",
    "data.batch_size=4": "data.batch_size: 8 -> 4",
    "trainer.accumulate=2": "trainer.accumulate: 1 -> 2",
    "trainer.limit_train_batches=3": "trainer.limit_train_batches: None -> 3",
    "trainer.devices=2": "(trainer.devices x num_nodes): 1 -> 2",
    "optimizer=adamw": "optimizer.name: adamax -> adamw",
    "trainer.epochs=1": "is in epoch 2 already, beyond trainer.epochs=1",
}


@pytest.mark.parametrize("override", REFUSED)
def test_settings_that_a_run_depends_on_are_refused(
    tmp_path: Path, stopped: Path, override: str
) -> None:
    folder = _copy(stopped, tmp_path)
    before = _state(folder)
    assert_one_line(train(folder, override), REFUSED[override], "another name=...")
    assert _state(folder) == before


def test_finished_run_says_so_and_reports_anew(tmp_path: Path) -> None:
    train(tmp_path)
    before, run = _state(tmp_path), tmp_path / "runs" / "r"
    (run / "samples.png").unlink()
    ended = train(tmp_path)
    assert ended.code == 0
    assert "run runs/r is finished: 2 epochs, step 16; nothing was trained" in ended.out
    after = _state(tmp_path)
    assert {name for name in before if before[name] != after[name]} <= {str(run / "starts.jsonl")}
    assert_one_line(train(tmp_path, "seed=1"), "seed: 0 -> 1")


def test_damaged_newest_checkpoint_is_told_of(tmp_path: Path, stopped: Path) -> None:
    folder = _copy(stopped, tmp_path)
    newest, one_before = step_checkpoints(folder / "runs" / "r" / "checkpoints")[:-3:-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    ended = train(folder)
    assert ended.code == 0
    first, second, *_ = ended.out.splitlines()
    assert first.startswith(f"passed over a newer checkpoint: runs/r/checkpoints/{newest.name} is")
    assert second == f"run runs/r, resumed from {one_before.name}"


def _logs(folder: Path) -> bool:
    return (folder / "runs" / "r" / "metrics.jsonl").exists()


def test_second_process_of_a_name_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    job = Job(tmp_path, "trainer.epochs=400")
    job.until(lambda: _logs(tmp_path))
    second = train(tmp_path, "trainer.epochs=400")
    assert_one_line(second, f"runs/r is in use by process {job.process.pid} on host", " since ")
    assert job.process.is_alive()
    job.signal(signal.SIGKILL)
    job.process.join()
    assert (tmp_path / "runs" / "r" / LOCK_FILE).exists()  # of a dead process: locks nothing
    again = Job(tmp_path, "trainer.epochs=400")
    again.until(lambda: "run runs/r, " in again.said())
    again.signal(signal.SIGKILL)
    again.process.join()


def test_processes_that_start_at_once_beside_get_a_folder_each(tmp_path: Path) -> None:
    jobs = [Job(tmp_path, "resume=never", "trainer.epochs=1") for _ in range(2)]
    outs = [job.ended().out.splitlines()[0] for job in jobs]
    assert sorted(outs) == ["run runs/r, from the beginning", "run runs/r-2, from the beginning"]


def test_threads_that_look_at_once_get_a_folder_each(tmp_path: Path) -> None:
    """Thirty-two at the same instant, with leftovers of dead processes among the folders."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / LOCK_FILE).write_bytes(b"\xff\x00 no text")
    gate, taken = threading.Barrier(32), []

    def take() -> None:
        gate.wait()
        taken.append(lock_unused(tmp_path / "r"))

    threads = [threading.Thread(target=take) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({lock.folder for lock in taken}) == 32
    for lock in taken:
        lock.release()
    assert not list(tmp_path.iterdir())  # folders with nothing else in them went


@pytest.mark.parametrize("content", [b"", b"\xff" * 5000, b"1\n2\n", b"1\nhost\nyesterday\n"])
def test_stale_lock_is_taken_whatever_it_holds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    (tmp_path / "config.yaml").touch()
    with RunLock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"{os.getpid()}\n")
        (tmp_path / LOCK_FILE).write_bytes(content)
        with pytest.raises(FolderInUseError, match=r"is in use by (another )?process"):
            RunLock(tmp_path)
    RunLock(tmp_path).release()


def test_lock_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """And nothing is written where a link leads."""
    (tmp_path / "target").write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to("target")
    with pytest.raises(ValueError, match="no regular file"):
        RunLock(tmp_path)
    assert (tmp_path / "target").read_text() == "precious"
    (tmp_path / LOCK_FILE).unlink()
    os.mkfifo(tmp_path / LOCK_FILE)
    with pytest.raises(ValueError, match="no regular file"):
        RunLock(tmp_path)


def test_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with RunLock(tmp_path / "r"):
        pass
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "file system without locks" in err


def _slow_steps() -> None:
    """A step takes 1.6 seconds, and says when it has begun."""
    original = NVAELightning.training_step

    def slow(self: NVAELightning, *arguments: Any) -> torch.Tensor:
        Path("in_step").touch()
        for _ in range(160):
            time.sleep(0.01)
        return original(self, *arguments)

    NVAELightning.training_step = slow  # type: ignore[method-assign]


def _signalled(
    folder: Path, *signals: tuple[int, float], before: Callable[[], None] | None = None
) -> Ended:
    job = Job(folder, "trainer.epochs=400", before=before)
    job.until((folder / "in_step").exists if before else lambda: _logs(folder))
    for number, pause in signals:
        job.signal(number)
        time.sleep(pause)
    return job.ended()


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
    ended = _signalled(tmp_path, (signal.SIGINT, 0.1), (signal.SIGINT, 0), before=_slow_steps)
    assert (ended.code, ended.err) == (130, "")
    assert "saved at step 1" in ended.out


def test_second_press_stops_at_once(tmp_path: Path) -> None:
    ended = _signalled(tmp_path, (signal.SIGINT, 1.2), (signal.SIGINT, 0), before=_slow_steps)
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
    stop_now._GRACE = 0.2


def test_second_press_ends_a_run_that_is_stuck(tmp_path: Path) -> None:
    ended = _signalled(tmp_path, (signal.SIGINT, 1.2), (signal.SIGINT, 0), before=_stuck_step)
    assert (ended.code, ended.err) == (130, "interrupted; run the same command again\n")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_is_kept_beside_an_interrupt(tmp_path: Path, first: signal.Signals) -> None:
    second = ({signal.SIGTERM, signal.SIGINT} - {first}).pop()
    ended = _signalled(tmp_path, (first, 0.1), (second, 0), before=_slow_steps)
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
        tmp_path, "callbacks.ema.decay=0.9", "trainer.epochs=1", before=_InterruptIn(where)
    )
    assert ended.code == 130, ended
    assert ended.err == "interrupted; run the same command again\n"


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
        ("starts.jsonl", 0, "cannot write config.yaml and starts.jsonl in runs/r: No space left"),
        ("metrics.jsonl", 0, "cannot write runs/r/metrics.jsonl: No space left on device"),
        ("metrics.jsonl", 20, "cannot write runs/r/metrics.jsonl: No space left on device"),
        (".step_", 0, "cannot write runs/r/checkpoints/step_00000008.ckpt"),
        (".step_", 1, "cannot write runs/r/checkpoints/step_00000016.ckpt"),
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


class _SmallFiles:
    def __init__(self, largest: int) -> None:
        self.largest = largest

    def __call__(self) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest, self.largest))


@pytest.mark.slow
@pytest.mark.parametrize("largest", [3000, 5000, 20_000, 60_000, 100_000])
def test_files_that_cannot_grow_are_one_line(tmp_path: Path, largest: int) -> None:
    """All logs on: TensorBoard fails in a thread of its own."""
    logs = ("logger.tensorboard=true", "logger.csv=true")
    assert_one_line(train(tmp_path, *logs, before=_SmallFiles(largest)), "the same command again")


def test_picture_that_cannot_be_written_does_not_end_training(tmp_path: Path) -> None:
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "pictures").touch()
    ended = train(tmp_path, "callbacks.pictures.every_epochs=1")
    assert ended.code == 0
    assert ended.err.count("could not be written") == 4
    assert "Traceback" not in ended.err


def test_folder_deleted_meanwhile_is_one_line(tmp_path: Path) -> None:
    job = Job(tmp_path, "trainer.epochs=400", "logger.jsonl=false")
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

    pytest.MonkeyPatch().setattr("nvae.training.checkpointing.load_whole", damaged)


@pytest.mark.parametrize("runs", ["/dev/null", "/proc", "/dev/null/x", "file"])
def test_runs_dir_that_is_none_is_one_line(tmp_path: Path, runs: str) -> None:
    (tmp_path / "file").touch()
    assert_one_line(train(tmp_path, f"runs_dir={runs}"), f"{runs}/r cannot be the run's folder")


BAD = {
    "nothing": ("trainer.guard.skip_threshold=1e-9", "16 steps in a row"),
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


def _two_ranks(folder: Path) -> subprocess.Popen[str]:
    """A command that starts its second rank itself, in a process group of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *TINY, "trainer.devices=2", "trainer.epochs=4000",
         "trainer.accelerator=cpu"],
        cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
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
@pytest.mark.parametrize("early", [False, True], ids=["in training", "in setup"])
@pytest.mark.parametrize("whole_group", [False, True], ids=["the first alone", "a terminal"])
def test_interrupt_ends_all_ranks(tmp_path: Path, whole_group: bool, early: bool) -> None:
    """Of the first alone, as `kill` does, and of all, as a terminal does; nobody is left behind."""
    job = _two_ranks(tmp_path)
    try:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            if len(_ranks_left(job.pid)) == 2 if early else _logs(tmp_path):
                break
            time.sleep(0.02)
        if whole_group:
            os.killpg(job.pid, signal.SIGINT)
        else:
            job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=60)
        ended = Ended(job.returncode, out, err)
        assert ended.code == 130, ended
        assert "Traceback" not in err
        assert not early or err.count("interrupted; run the same command again") >= 1
        assert early or "stopped by SIGINT: saved at step" in out
        while _ranks_left(job.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _ranks_left(job.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
