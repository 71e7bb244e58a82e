"""Captured steps are the steps that Lightning's loop would have taken, to the bit on the CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from nvae.cli.config import TrainConfig
from nvae.objective import Objective, ObjectiveConfig
from nvae.training.captured import WARM_UPS, CapturedSteps
from nvae.training.module import NVAELightning
from nvae.training.optimizers import OptimizerConfig
from nvae.training.trainer import TrainerConfig, build_trainer
from tests.training.runs import (
    RECIPES,
    StopAt,
    assert_identical,
    last_checkpoint,
    run,
    small_config,
)
from tests.training.tape import FORBIDDEN, TapeGraphs
from tests.training.test_guard import Spoil

SAVED = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "loops")
TIMED = ("train/images_per_second", "train/data_wait", "train/tflops", "train/peak_memory_gib")


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(s).items() if k not in (*TIMED, "time")} for s in lines]


def assert_same_run(a: Path, b: Path) -> None:
    one, other = last_checkpoint(a), last_checkpoint(b)
    for part in SAVED:
        assert_identical(one[part], other[part], part)
    assert str(metrics(a)) == str(metrics(b))  # text, since a NaN is unequal to itself
    described = [sorted((each / "bad_steps").glob("*.json")) for each in (a, b)]
    assert [p.name for p in described[0]] == [p.name for p in described[1]]
    for p, q in zip(*described, strict=True):
        assert p.read_text() == q.read_text()


def short_config(root: Path, case: str = "two batches a step") -> TrainConfig:
    """Eight micro-batches an epoch, three epochs."""
    config = small_config(root, case if case in RECIPES else "nvae")
    config.data = replace(config.data, train_size=34)
    if case == "one batch a step":
        config.trainer.accumulate_grad_batches = 1
    if case == "batches of two sizes":
        config.data = replace(config.data, train_size=42, global_batch=10)
        config.trainer.accumulate_grad_batches = 3
    if case in RECIPES:
        config.trainer.gradient_clip_val, config.trainer.max_epochs = 0.1, 2
    if case == "clipped, with options":
        config.trainer.gradient_clip_val = 1.0
        config.objective.free_bits = 0.5
        config.objective.encoder_noise = 0.05
        config.objective.spectral_weight_initial = 1.0
    return config


REPLAYED = {
    "two batches a step": 24 - 2 * WARM_UPS,
    "one batch a step": 24 - WARM_UPS,
    "batches of two sizes": 36 - 3 * WARM_UPS,
    "clipped, with options": 24 - 2 * WARM_UPS,
    "vdvae": 16 - 2 * WARM_UPS,
    "evdvae": 16 - 2 * WARM_UPS,
}


@pytest.mark.parametrize("case", REPLAYED)
def test_replayed_steps_are_the_steps_of_lightning(tmp_path: Path, case: str) -> None:
    """Beta below 1 and at 1, a NaN step, average, checkpoints, logs and descriptions included."""
    spoil = Spoil(range(6, 7))
    plain, _ = run(short_config(tmp_path / "plain", case), spoil)
    watched = CapturedSteps(TapeGraphs)
    taped, _ = run(short_config(tmp_path / "taped", case), spoil, watched)
    assert watched.replays == REPLAYED[case]
    assert_same_run(plain, taped)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Lightning's own loop."""
    return run(short_config(tmp_path_factory.mktemp("plain")))[0]


def test_a_run_resumes_in_the_middle_of_an_epoch(tmp_path: Path, plain: Path) -> None:
    """What warms up anew after a signal, and is captured again, is the uninterrupted run."""
    config = short_config(tmp_path)
    first, second = CapturedSteps(TapeGraphs), CapturedSteps(TapeGraphs)
    run(config, StopAt(6), first)
    taped, _ = run(config, second)
    assert first.replays
    assert second.replays
    one, other = last_checkpoint(plain), last_checkpoint(taped)
    for part in SAVED[:-1]:  # the loops' own counters differ in what was interrupted
        assert_identical(one[part], other[part], part)


def test_a_validation_sees_the_weights_of_replayed_steps(tmp_path: Path) -> None:
    """No average: nothing but their versions tells that the weights are other ones than at the last
    validation, whose normalized and folded weights are kept."""
    folders, watched = [], CapturedSteps(TapeGraphs)
    for name, more in (("plain", []), ("taped", [watched])):
        config = short_config(tmp_path / name)
        config.callbacks["ema"]["decay"] = None
        folders.append(run(config, *more)[0])
    assert watched.replays == REPLAYED["two batches a step"]
    plain, taped = map(metrics, folders)
    assert sum("valid/negative_elbo" in line for line in plain) == 3
    assert str(taped) == str(plain)


@pytest.mark.parametrize("number", [0, 1])
def test_a_failed_capture_loses_nothing(
    tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """Of the first graph, or of the second, in the middle of a step that the first has begun."""

    class Failing(TapeGraphs):
        fail_at = number

    watched = CapturedSteps(Failing)
    taped, _ = run(short_config(tmp_path), watched)
    lines = [s for s in capsys.readouterr().err.splitlines() if "not captured" in s]
    assert len(lines) == 1
    assert FORBIDDEN in lines[0]
    assert watched.replays <= 1
    assert_same_run(plain, taped)


def test_a_schedule_that_moves_betas_is_not_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are numbers in the graph."""
    folders, watched = [], CapturedSteps(TapeGraphs)
    for name, more in (("plain", []), ("taped", [watched])):
        config = short_config(tmp_path / name)
        schedule = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.01,
                    "interval": "step"}  # fmt: skip
        config.optimizer = OptimizerConfig(name="adamw", schedule=schedule)
        folders.append(run(config, *more)[0])
    assert "moves more than the learning rate" in capsys.readouterr().err
    assert watched.replays == 2
    assert_same_run(*folders)


def test_a_recomputed_segment_is_captured_too(tmp_path: Path, plain: Path) -> None:
    config = short_config(tmp_path)
    config.checkpoint_cells = True
    watched = CapturedSteps(TapeGraphs)
    taped, _ = run(config, watched)
    assert watched.replays == REPLAYED["two batches a step"]
    one, other = last_checkpoint(plain), last_checkpoint(taped)
    for part in SAVED[:-1]:
        assert_identical(one[part], other[part], part)


class Frozen(pl.Callback):
    """From the third epoch on a part of the model is not trained."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2:
            assert isinstance(pl_module, NVAELightning)
            next(pl_module.model.parameters()).requires_grad_(False)


def test_what_is_frozen_later_is_captured_anew(tmp_path: Path) -> None:
    plain, _ = run(short_config(tmp_path / "plain"), Frozen())
    watched = CapturedSteps(TapeGraphs)
    taped, _ = run(short_config(tmp_path / "taped"), Frozen(), watched)
    # callbacks of this test come first, ours is the last in train.py
    assert watched.replays == 2 * REPLAYED["two batches a step"] - 24
    assert_same_run(plain, taped)


class Own(Objective):
    """It may do anything."""


class Looks(pl.Callback):
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As a logger of gradients would."""


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("sgd", "decides in SGD"), ("muon", "decides in Muon"), ("anomaly", "detect_anomaly"),
        ("callback", "Looks has on_after_backward"),
        ("profiler", "profiler"), ("objective", "Own does not say"),
    ],
)  # fmt: skip
def test_where_steps_are_not_captured_a_line_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, reason: str
) -> None:
    """And Lightning's own loop trains."""
    config = short_config(tmp_path)
    config.trainer.max_epochs, more = 1, []
    if case == "sgd":
        config.optimizer = OptimizerConfig(name="torch.optim:SGD")
    if case == "muon":
        config.optimizer = OptimizerConfig(name="nvae.training.muon:Muon")
    if case == "objective":
        config.objective = ObjectiveConfig(name=f"{__name__}:Own")
    if case == "callback":
        more = [Looks()]
    if case == "anomaly":
        config.trainer.detect_anomaly = True
    if case == "profiler":
        config.trainer.profiler = "simple"  # type: ignore[attr-defined]
    watched = CapturedSteps(TapeGraphs)
    _, trainer = run(config, *more, watched)
    lines = [s for s in capsys.readouterr().err.splitlines() if "not captured" in s]
    assert len(lines) == 1
    assert reason in lines[0]
    assert not watched.replays
    assert trainer.global_step == 4


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="cuda_graph=true needs an NVIDIA GPU"):
        TrainerConfig(accelerator="cpu", cuda_graph=True)
    with pytest.raises(ValueError, match="allowed: true, false, auto"):
        TrainerConfig(accelerator="cpu", cuda_graph="yes")


def test_the_cpu_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """auto is the default, and no news."""
    trainer = build_trainer(TrainerConfig(accelerator="cpu"), [], [], tmp_path)
    assert not any(isinstance(c, CapturedSteps) for c in trainer.callbacks)  # type: ignore[attr-defined]
    assert "captured" not in capsys.readouterr().err
