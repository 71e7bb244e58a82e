import argparse
import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae import checkpoint as checkpoint_module
from nvae.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
)
from tests.models.small import small_model
from tests.reference import checkpoint_path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.ckpt"
    save_model(small_model(num_flows=1), path, run_config={"name": "test"})
    return path


def test_round_trip(tmp_path: Path) -> None:
    """Configuration and every weight survive; the result is ready to use."""
    model = small_model(cell_family="res_elu", num_flows=1)
    model(torch.rand(2, 1, 16, 16))
    path = tmp_path / "model.ckpt"
    save_model(model, path)
    loaded = load_model(path)
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_run_config_is_kept(saved: Path) -> None:
    assert load_checkpoint(saved)["run_config"] == {"name": "test"}


def test_published_checkpoint_loads() -> None:
    model = load_model(checkpoint_path("cifar10"))
    assert not model.training
    assert model.config.num_flows == 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    """With EMA the file's state is the average; raw weights are there on request."""
    averaged, raw = small_model(), small_model()
    content: dict[str, Any] = {
        **checkpoint_module.describe(averaged),
        "state_dict": {f"model.{n}": t for n, t in averaged.state_dict().items()},
        "current_model_state": {f"model.{n}": t for n, t in raw.state_dict().items()},
    }
    path = tmp_path / "ema.ckpt"
    save_checkpoint(content, path)
    assert torch.equal(load_model(path).initial_state, averaged.initial_state)
    assert torch.equal(load_model(path, weights="raw").initial_state, raw.initial_state)


class Malicious:
    """Runs a command when unpickled by a careless loader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["top", "args", "zipless"])
def test_a_file_that_carries_code_is_refused_and_nothing_runs(tmp_path: Path, place: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    evil = Malicious(marker)
    if place == "zipless":
        path.write_bytes(pickle.dumps(evil))
    else:
        args = argparse.Namespace(x=evil) if place == "args" else argparse.Namespace()
        top = {"evil": evil} if place == "top" else {}
        torch.save({"args": args, "state_dict": {}, **top}, path)
    with pytest.raises(CheckpointError, match=r"is refused|no archive") as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_what_it_asked_for_is_named(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"x": Malicious(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match=r"asks for posix\.system, which could run code"):
        load_model(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no checkpoint at"),
        (lambda path: path.mkdir(), "no checkpoint at"),
        (lambda path: path.write_bytes(b""), "damaged or no checkpoint"),
        (lambda path: path.write_text("hello"), "damaged or no checkpoint"),
        (lambda path: torch.save([1, 2], path), "does not hold a dictionary"),
        (lambda path: torch.save({"weights": 1}, path), "neither a checkpoint of this project"),
        (lambda path: torch.save({"nvae_format": 7}, path), "format version 7.*reads 1"),
        (
            lambda path: torch.save(
                {"nvae_format": 1, "model_config": {"depth": 3}, "state_dict": {}}, path
            ),
            "does not describe a usable model: unknown model setting.*depth",
        ),
        (
            lambda path: torch.save({"nvae_format": 1, "model_config": {}, "state_dict": {}}, path),
            "does not describe a usable model: .*72 tensors or more, but it has 0",
        ),
    ],
)
def test_unusable_files_are_one_clear_line(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.ckpt"
    make(path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value)


def test_a_runs_folder_says_which_file_to_give(saved: Path, tmp_path: Path) -> None:
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    best.parent.mkdir(parents=True)
    saved.rename(best)
    for folder in (best.parent, best.parent.parent):
        with pytest.raises(CheckpointError, match=rf"{folder}, which is a folder; give {best}$"):
            load_model(folder)


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(saved))

    monkeypatch.setattr("nvae.torch_file.open_regular", refused)  # root may read everything
    with pytest.raises(CheckpointError) as error:
        load_model(saved)
    assert str(error.value) == f"{saved} cannot be read: Permission denied"


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, kept: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_model(saved)


def test_a_failed_write_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle: the old checkpoint is whole, no debris stays."""
    before = saved.read_bytes()

    def fail(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(small_model(), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_unknown_choice_of_weights(saved: Path) -> None:
    with pytest.raises(ValueError, match="allowed: ema, raw"):
        load_model(saved, weights="best")  # type: ignore[arg-type]
