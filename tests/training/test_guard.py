"""Bad steps: left out whole, counted, named; too many end the run or take it back."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console

from nvae.cli.errors import UserError
from nvae.cli.fitting import build_module, fit
from nvae.data.module import ImageDataModule
from nvae.models.normalization import BatchNorm
from nvae.training.guard import DivergenceError, RunningStatistics, guard_of
from nvae.training.module import NVAELightning
from nvae.training.run_folder import open_run
from tests.training.runs import assert_identical, run, small_config


class Spoil(pl.Callback):
    """Turn the input of some steps into something that spoils the loss."""

    def __init__(self, steps: range, value: float = float("nan")) -> None:
        self.steps, self.value = steps, value

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in self.steps:
            batch.x[0, 0, 0, 0] = self.value


class Record(pl.Callback):
    """Copies of everything a step may change, after each optimizer step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        if not trainer.fit_loop._should_accumulate():
            states = {
                "model": pl_module.model.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict()["state"],
            }
            self.states.append({k: {n: _clone(t) for n, t in v.items()} for k, v in states.items()})


def _clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v.clone() for k, v in value.items()}
    return value.clone()


def _without_counters(state: dict[str, Any]) -> dict[str, Any]:
    model = {k: v for k, v in state["model"].items() if not k.endswith("num_batches_tracked")}
    return {**state, "model": model}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_step_changes_nothing_and_training_goes_on(tmp_path: Path, value: float) -> None:
    """Weights, optimizer state and running statistics are those of the step before."""
    record = Record()
    folder, _ = run(small_config(tmp_path), Spoil(range(3, 5), value), record)
    good, bad = record.states[2], record.states[4]
    assert assert_identical(_without_counters(good), _without_counters(bad)) > 100
    last = record.states[-1]["model"]
    assert all(t.isfinite().all() for t in last.values())
    name = "encoder.stem.weight"
    assert not torch.equal(last[name], bad["model"][name])
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    skipped = {x["step"]: x["train/skipped_steps"] for x in lines if "train/skipped_steps" in x}
    assert (skipped[3], skipped[4], skipped[5], skipped[24]) == (0, 1, 2, 2)


def test_statistics_in_one_block_begin_where_libraries_may_read_several() -> None:
    """A layer of three channels is followed by another; values and shapes are as before."""
    model = torch.nn.Sequential(BatchNorm(3), BatchNorm(20))
    for norm in model:
        norm.running_mean.uniform_()
    before = {name: each.clone() for name, each in model.named_buffers()}
    statistics = RunningStatistics(model)
    places = [b.data_ptr() for norm in model for b in (norm.running_mean, norm.running_var)]
    assert [place - places[0] for place in places] == [0, 64, 128, 256]
    assert all(torch.equal(each, before[name]) for name, each in model.named_buffers())
    statistics.keep()
    model[1].running_var.fill_(float("nan"))
    statistics.restore_where(torch.tensor(True))
    assert all(torch.equal(each, before[name]) for name, each in model.named_buffers())


def test_norm_beyond_the_threshold_is_skipped(tmp_path: Path) -> None:
    """A finite but huge gradient: with a tiny threshold every step is one, and the run fails."""
    config = small_config(tmp_path)
    config.callbacks["guard"] |= {"skip_threshold": 1e-6, "max_consecutive_skips": 100}
    module = build_module(config)
    before = {k: v.clone() for k, v in module.model.state_dict().items() if "num_b" not in k}
    said = r"24 steps in a row .* worst gradient .* above .*skip_threshold=1e-06 \(nats per image"
    with pytest.raises(DivergenceError, match=said):
        run(config, module=module)
    assert_identical(
        before, {k: v for k, v in module.model.state_dict().items() if "num_b" not in k}
    )


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    """By Lightning, after the guard has looked at them: its reading is the norm before."""
    norms = []
    module_type = type(build_module(small_config(tmp_path)))

    class Look(module_type):  # type: ignore[valid-type, misc]
        def configure_gradient_clipping(self, *arguments: Any, **more: Any) -> None:
            super().configure_gradient_clipping(*arguments, **more)
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    config = small_config(tmp_path)
    config.trainer.gradient_clip_val, config.trainer.max_epochs = 0.5, 1
    module = build_module(config)
    module.__class__ = Look
    _, trainer = run(config, module=module)
    guard = guard_of(trainer)
    assert guard is not None
    assert guard.read().norm > 0.5
    assert len(norms) == 8
    assert all(n == pytest.approx(0.5, rel=1e-4) for n in norms)


def test_long_streak_stops_and_names_the_culprit(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.callbacks["guard"] |= {"max_consecutive_skips": 4}
    with pytest.raises(DivergenceError) as caught:
        run(config, Spoil(range(9, 99)))
    message = str(caught.value)
    assert "diverged at step 16: 7 steps" in message or "diverged at step 13: 4" in message
    assert "the KL of latent group 0 was not finite" in message
    assert "worst gradient was that of" in message


def test_streak_of_non_finite_weights_names_the_weight(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.callbacks["guard"] |= {"max_consecutive_skips": 2}
    module = build_module(config)
    with torch.no_grad():
        module.model.groups[1].merge_latent.weight[0] = float("nan")  # type: ignore[union-attr, index, operator]
    with pytest.raises(DivergenceError, match=r"weight groups.1.merge_latent.weight is not finite"):
        run(config, module=module)


def test_rollback_goes_back_with_a_lower_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One divergence after the first epoch; the second try, at half the rate, ends well."""
    config = small_config(tmp_path)
    config.callbacks["guard"] |= {"max_consecutive_skips": 2, "on_divergence": "rollback"}
    folder, _ = open_run(tmp_path / "run", "auto", config.to_dict())
    folder.checkpoints.mkdir(parents=True)
    tries = []
    original = NVAELightning.training_step

    def spoiled(self: NVAELightning, batch: Any, batch_idx: int) -> torch.Tensor:
        if not tries or tries[-1] is not self:
            tries.append(self)
        if len(tries) == 1 and self.global_step >= 9:
            batch.x[0, 0, 0, 0] = float("nan")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(NVAELightning, "training_step", spoiled)
    data = ImageDataModule(config.data)
    assert fit(Console(quiet=True), config, folder, data)
    assert [m.learning_rate_scale for m in tries] == [1.0, 0.5]
    again, _ = open_run(tmp_path / "run", "auto", config.to_dict())
    assert again.step == 24
    assert again.checkpoint is not None
    saved = torch.load(again.checkpoint, weights_only=True)
    assert saved["learning_rate_scale"] == 0.5


def test_stop_says_where_and_how_to_go_on(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.callbacks["guard"] |= {"max_consecutive_skips": 1, "skip_threshold": 1e-9}
    folder, _ = open_run(tmp_path / "run", "auto", config.to_dict())
    folder.checkpoints.mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        fit(Console(quiet=True), config, folder, ImageDataModule(config.data))
    message = str(caught.value)
    assert "\n" not in message
    assert "optimizer.learning_rate=0.005" in message
    assert "there is no checkpoint yet" in message


def test_the_first_bad_step_leaves_a_file_that_names_it(tmp_path: Path) -> None:
    """Read three steps later: images, noise, and which group was bad, of each micro-batch."""
    config = small_config(tmp_path)
    config.trainer.log_every_n_steps = 4
    seen: dict[int, list[list[int]]] = {}

    class Look(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            seen.setdefault(trainer.global_step + 1, []).append(batch.index.tolist())

    folder, _ = run(config, Spoil(range(4, 6)), Spoil(range(13, 14)), Look())
    files = sorted((folder / "bad_steps").iterdir())
    assert [file.name for file in files] == ["step_00000005.json", "step_00000014.json"]
    found = json.loads(files[0].read_text())
    assert found["step"] == 5
    assert found["gradient_norm"] == "nan"
    first, second = found["micro_batches"]
    assert [first["images"], second["images"]] == seen[5]
    assert [first["noise_key"], second["noise_key"]] == [[0, 0, 8], [0, 0, 9]]
    assert first["loss"]["reconstruction"] == "nan"
    assert first["kl_per_group"][0] == "nan"
    assert len(first["kl_per_group"]) == 3
    low, high = first["prior_sigma"][0]
    assert 0 < low <= high < 10  # the coarsest prior does not depend on the image
    assert first["posterior_sigma"][0] == ["nan", "nan"]
    assert "(" in found["worst_gradient"]


def test_ever_bad_steps_leave_a_bounded_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvae.training.bad_step.MOST_FILES", 2)
    callbacks = [Spoil(range(step, step + 1)) for step in (2, 5, 8, 11)]
    folder, _ = run(small_config(tmp_path), *callbacks)
    assert len(list((folder / "bad_steps").iterdir())) == 2
