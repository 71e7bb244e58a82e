"""Settings that are no numbers, hand-made checkpoints, runs of others, locks."""

import copy
import dataclasses
import errno
import os
import shutil
import signal
import threading
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.checkpoint import CheckpointError
from nvae.cli.config import TrainConfig, compose_train
from nvae.models import ModelConfig
from nvae.training.checkpointing import step_checkpoints
from nvae.training.resuming import check_resumable
from nvae.training.run_folder import LOCK_FILE, FolderInUseError, RunLock, lock_unused
from tests.hostile.runs import Job, assert_one_line, has_logged, numeric_settings, takes, train

NUMBERS = list(
    dict.fromkeys(numeric_settings(TrainConfig) + numeric_settings(ModelConfig, "model."))
)


def _set(config: Any, name: str, value: Any) -> None:
    """Make the dataclasses anew around one changed value, as Python code would."""
    first, _, rest = name.partition(".")
    if rest:
        _set(getattr(config, first), rest, value)
    dataclasses.replace(config, **({} if rest else {first: value}))


@pytest.fixture(scope="module")
def composed() -> TrainConfig:
    return compose_train()


@pytest.mark.parametrize(("name", "is_list"), NUMBERS, ids=lambda v: str(v))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_number_that_is_not_finite_is_named(
    composed: TrainConfig, name: str, is_list: bool, value: float
) -> None:
    """From Python too; the setting itself and not its neighbor."""
    with pytest.raises(ValueError, match="finite") as caught:
        _set(composed, name, [value] if is_list else value)
    assert str(caught.value).startswith(f"{name} is {value}"), caught.value
    assert "\n" not in str(caught.value)


def _scalars(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _scalars(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif kind is not Any and dict not in (
            typing.get_origin(kind),
            *map(typing.get_origin, typing.get_args(kind)),
        ):
            # what goes to Lightning as it is, and groups with _target_, are checked where they end
            yield prefix + field.name, kind


@pytest.mark.parametrize(
    ("name", "kind"),
    list(dict.fromkeys([*_scalars(TrainConfig), *_scalars(ModelConfig, "model.")])),
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


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["state_dict", "run_config", "model_config"])
def test_checkpoint_that_is_none_is_passed_over(tmp_path: Path, stopped: Path, entry: str) -> None:
    """As a damaged one is: said in a line, and the one before it goes on."""
    ended = train(_edited(stopped, tmp_path, (entry,), [1]))
    assert ended.code == 0, ended
    assert "passed over a newer checkpoint" in ended.out
    assert f"its {entry} is no dictionary" in ended.out


def test_other_labels_are_refused(tmp_path: Path, stopped: Path) -> None:
    """The pictures are the same; what the model is told of them is not."""
    labels = ("fingerprint", "data", "splits", "train", "labels")
    folder = _edited(stopped, tmp_path, labels, "0" * 64)
    assert_one_line(train(folder), "train labels: others", "another name=...")


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
    "trainer.limit_train_batches=3": "trainer.limit_train_batches: None -> 3",
    "optimizer=adamw": "optimizer.name: adamax -> adamw",
    "trainer.max_epochs=1": "is in epoch 2 already, beyond trainer.max_epochs=1",
}


@pytest.mark.parametrize("override", REFUSED)
def test_settings_that_a_run_depends_on_are_refused(
    tmp_path: Path, stopped: Path, override: str
) -> None:
    folder = _copy(stopped, tmp_path)
    before = _state(folder)
    assert_one_line(train(folder, override), REFUSED[override], "another name=...")
    assert _state(folder) == before


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.batch_size=4", "data.batch_size: 8 -> 4"),
        ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches: 1 -> 2"),
        ("data.global_batch=8", "data.global_batch: None -> 8"),
    ],
)
def test_batches_may_change(tmp_path: Path, stopped: Path, override: str, line: str) -> None:
    """Everything goes by images; it is said, and the run goes on to its end."""
    folder = _copy(stopped, tmp_path)
    ended = train(folder, override)
    assert ended.code == 0, ended
    assert f"changed since: {line}" in ended.out
    assert "is finished" in train(folder, override).out


def test_fewer_images_than_a_step_takes_are_one_line(tmp_path: Path) -> None:
    assert_one_line(
        train(tmp_path, "data.global_batch=65"),
        "data.global_batch=65 needs 65 training images a step, but there are 64",
    )


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


def test_second_process_of_a_name_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    job = Job(tmp_path, "trainer.max_epochs=400")
    job.until(lambda: has_logged(tmp_path))
    second = train(tmp_path, "trainer.max_epochs=400")
    assert_one_line(second, f"runs/r is in use by process {job.process.pid} on host", " since ")
    assert job.process.is_alive()
    job.signal(signal.SIGKILL)
    job.process.join()
    assert (tmp_path / "runs" / "r" / LOCK_FILE).exists()  # of a dead process: locks nothing
    again = Job(tmp_path, "trainer.max_epochs=400")
    again.until(lambda: "run runs/r, " in again.said())
    again.signal(signal.SIGKILL)
    again.process.join()


def test_processes_that_start_at_once_beside_get_a_folder_each(tmp_path: Path) -> None:
    jobs = [Job(tmp_path, "resume=never", "trainer.max_epochs=1") for _ in range(2)]
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
