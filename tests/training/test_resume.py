"""Stopping and going on must equal never having stopped, bit for bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import Strategy

from benchmarks.kills import VOLATILE
from nvae.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from nvae.training import checkpointing
from nvae.training.checkpointing import AtomicCheckpointIO, step_checkpoints
from nvae.training.resuming import check_optimizer_shapes, check_resumable, conflicts
from nvae.training.run_folder import Claim, RunFolder, open_run
from nvae.training.validation import ValidationSums
from tests.training.runs import StopAt, assert_identical, last_checkpoint, run, small_config


def read_lines(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(VOLATILE)} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four steps in one go."""
    folder, _ = run(small_config(tmp_path_factory.mktemp("whole")))
    return folder


@pytest.mark.parametrize("stop", [(8,), (3, 13, 20), (16, 23)])
def test_resume_is_exact(tmp_path: Path, whole: Path, stop: tuple[int, ...]) -> None:
    """Weights, average, spectral vectors, optimizer, schedule, loops, logged metrics.

    The steps are in mid-epoch (3, 13, 20, 23) and at the end of an epoch (8, 16).
    """
    config = small_config(tmp_path)
    for step in stop:
        folder, trainer = run(config, StopAt(step))
        assert trainer.global_step == step
        assert step_checkpoints(folder / "checkpoints")[-1].name == f"step_{step:08d}.ckpt"
    folder, trainer = run(config)
    assert trainer.global_step == 24
    assert _assert_same_run(folder, whole) > 300


@pytest.mark.parametrize("family", ["vdvae", "evdvae"])
def test_resume_is_exact_of_other_families(tmp_path: Path, family: str) -> None:
    """In mid-epoch, while the KL is balanced and after; warm-up and cosine by the step."""
    folders = []
    for name, stops in (("whole", ()), ("again", (3,))):
        config = small_config(tmp_path / name, family)
        config.data = dataclasses.replace(config.data, train_size=34)
        config.trainer.max_epochs = 2
        for step in stops:
            run(config, StopAt(step))
        folders.append(run(config)[0])
    assert _assert_same_run(*folders) > 300


def _assert_same_run(folder: Path, whole: Path) -> int:
    """To the bit; how many tensors were compared in the last checkpoint."""
    a, b = last_checkpoint(whole), last_checkpoint(folder)
    for checkpoint in (a, b):
        del checkpoint["run_config"]["runs_dir"]
        # counts starts and stops, not steps
        del checkpoint["loops"]
    best, again = (load_checkpoint(path / "checkpoints/best.ckpt") for path in (whole, folder))
    for key in ("global_step", "state_dict", "current_model_state"):
        assert_identical(best[key], again[key])
    assert read_lines(folder) == read_lines(whole)
    return assert_identical(a, b)


def test_checkpoint_is_readable_by_everyone(whole: Path) -> None:
    """The averaged and the raw network load, and differ."""
    path = step_checkpoints(whole / "checkpoints")[-1]
    averaged, raw = load_model(path), load_model(path, weights="raw")
    pairs = zip(averaged.parameters(), raw.parameters(), strict=True)
    assert any(bool((p != q).any()) for p, q in pairs)


def test_best_is_the_lowest_validation_elbo(whole: Path) -> None:
    """And a resumed run keeps it: the value is in the checkpoint."""
    values = {
        line["step"]: line["valid/negative_elbo"]
        for line in read_lines(whole)
        if "valid/negative_elbo" in line
    }
    assert len(values) == 3
    state = last_checkpoint(whole)["callbacks"]["Checkpoints"]
    assert state["best"] == pytest.approx(min(values.values()), rel=1e-6)
    assert state["best_step"] == min(values, key=values.__getitem__)
    best = load_checkpoint(whole / "checkpoints" / "best.ckpt")
    assert best["global_step"] == state["best_step"]


def test_best_holds_the_average_that_was_validated(whole: Path) -> None:
    """Lightning puts the raw weights back before the best is written."""
    best = load_checkpoint(whole / "checkpoints" / "best.ckpt")
    same = load_checkpoint(whole / "checkpoints" / f"step_{best['global_step']:08d}.ckpt")
    assert_identical(best["state_dict"], same["state_dict"])
    assert_identical(best["current_model_state"], same["current_model_state"])
    path = whole / "checkpoints" / "best.ckpt"
    state, raw = (load_model(path, w).state_dict() for w in ("ema", "raw"))
    assert_identical(dict(state), {k: same["state_dict"][f"model.{k}"] for k in state})
    assert any(bool((state[k] != raw[k]).any()) for k in state)


def test_best_without_an_average_holds_the_weights(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.callbacks["ema"] = None
    config.trainer.max_epochs = 1
    folder, _ = run(config)
    best = load_checkpoint(folder / "checkpoints" / "best.ckpt")
    assert_identical(best["state_dict"], last_checkpoint(folder)["state_dict"])
    assert "current_model_state" not in best


def test_a_bad_validation_does_not_keep_the_best_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is below a NaN: the first validation's must not become the best."""
    means, bad = ValidationSums.means, ["valid/negative_elbo"]

    def first_is_nan(self: ValidationSums, strategy: Strategy, stage: str) -> dict[str, float]:
        found = means(self, strategy, stage)
        if bad:
            found[bad.pop()] = float("nan")
        return found

    monkeypatch.setattr(ValidationSums, "means", first_is_nan)
    folder, _ = run(small_config(tmp_path))
    assert not bad
    assert load_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] > 8


@pytest.mark.parametrize(
    "stored", [float("nan"), pytest.param(float("-inf"), marks=pytest.mark.exhaustive)]
)
def test_a_stored_best_that_is_no_number_is_beaten(tmp_path: Path, stored: float) -> None:
    """Of a run that an earlier version wrote."""
    config = small_config(tmp_path)
    folder, _ = run(config, StopAt(8))
    (path,) = step_checkpoints(folder / "checkpoints")
    checkpoint = last_checkpoint(folder)
    checkpoint["callbacks"]["Checkpoints"]["best"] = stored
    save_checkpoint(checkpoint, path)
    (folder / "checkpoints" / "best.ckpt").unlink(missing_ok=True)
    run(config)
    assert (folder / "checkpoints" / "best.ckpt").exists()


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.callbacks["checkpoint"] |= {"every_steps": 1, "keep_last": 3}
    folder, _ = run(config)
    names = [path.name for path in step_checkpoints(folder / "checkpoints")]
    assert names == [f"step_{step:08d}.ckpt" for step in (22, 23, 24)]


def test_changed_hyper_parameters_are_listed_and_taken(tmp_path: Path) -> None:
    """A lower learning rate on resume must reach the optimizer, not only the list."""
    config = small_config(tmp_path)
    run(config, StopAt(9))
    changed = small_config(tmp_path)
    changed.optimizer.learning_rate = 5e-3
    changed.optimizer.weight_decay = 0.0
    _, notes = open_run(tmp_path / "run", "auto", changed.to_dict())
    assert notes == [
        "optimizer.learning_rate: 0.01 -> 0.005",
        "optimizer.weight_decay: 0.0003 -> 0.0",
    ]
    path, _ = run(changed, StopAt(10))
    group = last_checkpoint(path)["optimizer_states"][0]["param_groups"][0]
    assert group["initial_lr"] == 5e-3
    assert group["weight_decay"] == 0.0
    assert 1e-3 < group["lr"] <= 5e-3


def test_resuming_without_the_average_goes_on_from_the_raw_weights(tmp_path: Path) -> None:
    """The optimizer's state is theirs; the average under `state_dict` is not what was trained."""
    run(small_config(tmp_path), StopAt(9))
    before = last_checkpoint(tmp_path / "run")
    changed = small_config(tmp_path)
    changed.callbacks["ema"] = None
    seen: list[dict[str, torch.Tensor]] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    run(changed, Look(), StopAt(10))
    assert_identical(seen[0], dict(before["current_model_state"]))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run(config, StopAt(2))
    other = small_config(
        tmp_path, model=dataclasses.replace(config.model, latent_channels=3, num_flows=1)
    )
    with pytest.raises(ValueError, match=r"latent_channels: 2 -> 3; model.num_flows: 0 -> 1"):
        open_run(tmp_path / "run", "auto", other.to_dict())
    values = {**config.to_dict(), "architecture": "own_model:Ladder"}
    with pytest.raises(ValueError, match=r"\(architecture: nvae -> own_model:Ladder\)"):
        open_run(tmp_path / "run", "auto", values)


def test_a_run_of_an_earlier_version_is_of_an_nvae(tmp_path: Path) -> None:
    """It does not say so; nothing has changed, and another architecture is refused."""
    config = small_config(tmp_path)
    run(config, StopAt(2))
    path = step_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    content = load_checkpoint(path)
    del content["run_config"]["architecture"]
    save_checkpoint(content, path)
    values = config.to_dict()
    assert open_run(tmp_path / "run", "auto", values)[1] == []
    with pytest.raises(ValueError, match=r"\(architecture: nvae -> own_model:Ladder\)"):
        open_run(tmp_path / "run", "auto", {**values, "architecture": "own_model:Ladder"})


def test_never_starts_beside_and_must_needs_something(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run(config, StopAt(1))
    values = config.to_dict()
    with Claim(tmp_path / "run", beside=True) as claim:
        assert claim.path == tmp_path / "run-2"
        assert open_run(claim.path, "never", values)[0] == RunFolder(tmp_path / "run-2")
        (tmp_path / "run-2" / "x").touch()
    with Claim(tmp_path / "run", beside=True) as claim:
        assert claim.path == tmp_path / "run-3"
    assert open_run(tmp_path / "run", "must", values)[0].step == 1
    with pytest.raises(ValueError, match="has no checkpoint"):
        open_run(tmp_path / "other", "must", values)


def test_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """A file cut short is not resumed from; the one before it is."""
    config = small_config(tmp_path)
    folder, _ = run(config, StopAt(10))
    newest = step_checkpoints(folder / "checkpoints")[-1]
    whole = newest.read_bytes()
    newest.write_bytes(whole[:5000])
    assert open_run(folder, "auto", config.to_dict())[0].step == 8
    newest.write_bytes(flip_weights(whole))
    assert open_run(folder, "auto", config.to_dict())[0].step == 8
    newest.write_bytes(whole)
    assert open_run(folder, "auto", config.to_dict())[0].step == 10


def test_bytes_that_were_written_wrongly_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also inside a tensor, where the file still opens."""

    def write_wrongly(checkpoint: dict[str, Any], path: Path) -> None:
        save_checkpoint(checkpoint, path)
        path.write_bytes(flip_weights(path.read_bytes()))
        load_checkpoint(path)

    monkeypatch.setattr(checkpointing, "save_checkpoint", write_wrongly)
    weights = {"nvae_format": 1, "model_config": {}, "state_dict": {"w": torch.arange(9999.0)}}
    with pytest.raises(CheckpointError, match=r"checksum of .*data/0 is wrong"):
        AtomicCheckpointIO().save_checkpoint(weights, tmp_path / "step_1.ckpt")


def flip_weights(content: bytes) -> bytes:
    """32 bytes turned over in the middle of the file, which is a tensor's."""
    middle = len(content) // 2
    turned = bytes(byte ^ 255 for byte in content[middle : middle + 32])
    return content[:middle] + turned + content[middle + 32 :]


def test_rotation_leaves_what_it_has_just_written(tmp_path: Path) -> None:
    """Gone back behind damaged files of later steps, which would fill the places that are kept."""
    config = small_config(tmp_path)
    config.callbacks["checkpoint"] |= {"every_steps": 1, "keep_last": 2}
    folder, _ = run(config, StopAt(2))
    for step in (4, 6):
        (folder / f"checkpoints/step_{step:08d}.ckpt").write_bytes(b"damaged")
    (folder / "checkpoints/step_00000001.ckpt").unlink()
    run(config, StopAt(3))
    names = [path.name for path in step_checkpoints(folder / "checkpoints")]
    assert names == ["step_00000002.ckpt", "step_00000003.ckpt"]
    assert open_run(folder, "auto", config.to_dict())[0].step == 3


STEPS = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 3}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (STEPS, None, ["optimizer.schedule: torch.optim.lr_scheduler.StepLR -> None"]),
        (None, STEPS, ["optimizer.schedule: None -> torch.optim.lr_scheduler.StepLR"]),
        (STEPS, {**STEPS, "interval": "step"}, ["optimizer.schedule.interval: epoch -> step"]),
        (STEPS, {**STEPS, "_target_": "torch.optim.lr_scheduler:StepLR", "gamma": 0.5}, []),
        (STEPS, {**STEPS, "interval": "epoch"}, []),
        (None, None, []),
    ],
)
def test_another_schedule_is_refused(
    tmp_path: Path, before: Any, after: Any, told: list[str]
) -> None:
    """Its state is of its class: torch fails on another's, or goes on with wrong rates."""
    configs = []
    for schedule in (before, after):
        configs.append(small_config(tmp_path).to_dict())
        configs[-1]["optimizer"]["schedule"] = schedule
    assert conflicts({"run_config": configs[0]}, configs[1], None) == told


def test_several_groups_and_optimizers_resume(tmp_path: Path) -> None:
    """As torch numbers them: parameters count on from one group to the next."""
    config = small_config(tmp_path)
    folder, _ = run(config, StopAt(1))
    (path,) = step_checkpoints(folder / "checkpoints")
    checkpoint = load_checkpoint(path)
    (state,) = checkpoint["optimizer_states"]
    (group,) = state["param_groups"]
    state["param_groups"] = [group | {"params": group["params"][:3]},
                             group | {"params": group["params"][3:]}]  # fmt: skip
    for states in ([state], [state, state]):
        checkpoint["optimizer_states"] = states
        check_resumable(checkpoint, path)
        check_optimizer_shapes(checkpoint, [])
    state["param_groups"].pop(0)
    with pytest.raises(CheckpointError, match="params do not count from 0"):
        check_resumable(checkpoint, path)
