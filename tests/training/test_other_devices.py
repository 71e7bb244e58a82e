"""Runs that stop and go on with other devices: the same schedules, epochs and images."""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.checkpoint import load_checkpoint, save_checkpoint
from nvae.cli.fitting import build_module
from nvae.data.module import ImageDataModule
from nvae.elbo import kl_coefficient
from nvae.models.normalization import MOMENTUM
from nvae.regularizers import batchnorms
from nvae.training.checkpointing import step_checkpoints
from nvae.training.pending import is_pending
from nvae.training.run_folder import open_run
from nvae.training.run_length import steps_ahead
from nvae.training.schedule import learning_rate_factor
from tests import PATIENCE
from tests.training.other_devices_job import config_of, train
from tests.training.runs import StopAt, last_checkpoint, run

ROOT = Path(__file__).parents[2]
GLOBAL_BATCH = 7
"""Nine steps an epoch: on one device 2 + 2 + 2 + 1 images, on two (2, 2) and (2, 1)."""


def _on_two(folder: Path, stop: int) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [str(folder), "2", str(stop), str(GLOBAL_BATCH)]
    job = subprocess.run(
        [sys.executable, str(ROOT / "tests/training/other_devices_job.py"), *words],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-3000:]


def _on_one(folder: Path, stop: int) -> None:
    train(config_of(folder, 1, GLOBAL_BATCH, batch_size=2), folder, stop)


def _read(folder: Path) -> list[dict[str, Any]]:
    """Every rank's micro-batches."""
    return [
        {"rank": rank, **json.loads(line)}
        for rank in (0, 1)
        if (folder / f"read-{rank}.jsonl").exists()
        for line in (folder / f"read-{rank}.jsonl").read_text().splitlines()
    ]


def _images(folder: Path) -> list[list[int]]:
    """Of each step: those of its micro-batches on all ranks.

    A step's first micro-batches end with its number not yet counted, its last one counts it.
    """

    def step(line: dict[str, Any]) -> tuple[int, int]:
        return line["epoch"], line["step"] + (line["penalty"] == 0)

    return [
        sorted(chain(*(line["images"] for line in lines)))
        for _, lines in groupby(sorted(_read(folder), key=step), key=step)
    ]


def _schedules(folder: Path) -> list[dict[str, Any]]:
    """Step, learning rate, beta and lambda as logged, and the steps of validations."""
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    names = ("step", "train/learning_rate", "train/beta", "train/lambda")
    return [
        {name: line[name] for name in names if name in line}
        for line in lines
        if "train/beta" in line or "valid/negative_elbo" in line
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    _on_one(folder, 0)
    return folder


@pytest.mark.parametrize(
    ("first", "then"),
    [(_on_one, _on_two), pytest.param(_on_two, _on_one, marks=pytest.mark.exhaustive)],
    ids=["one to two", "two to one"],
)
def test_other_devices_go_on_as_if_nothing_had_changed(
    tmp_path: Path, whole: Path, first: Any, then: Any
) -> None:
    """Stopped in the second epoch, after one of its nine steps."""
    first(tmp_path, 10)
    assert last_checkpoint(tmp_path / "run")["global_step"] == 10
    then(tmp_path, 0)
    assert _schedules(tmp_path) == _schedules(whole)
    assert len(_schedules(whole)) == 27 + 3
    assert _images(tmp_path) == _images(whole)
    assert [len(step) for step in _images(whole)] == [GLOBAL_BATCH] * 27
    ends = [last_checkpoint(folder / "run") for folder in (tmp_path, whole)]
    assert [(e["epoch"], e["global_step"]) for e in ends] == [(2, 27)] * 2
    assert [e["images"] for e in ends] == [{"seen": 27 * GLOBAL_BATCH, "a_step": GLOBAL_BATCH}] * 2
    keys = [(line["rank"], line["key"]) for line in _read(tmp_path)]
    assert len(set(keys)) == len(keys)


def test_a_step_is_the_mean_over_its_images(whole: Path) -> None:
    """Unlike micro-batches count by their images; regularizers count once."""
    lines = sorted(_read(whole), key=lambda line: line["key"])
    for i in range(0, len(lines), 4):
        step = lines[i : i + 4]
        assert [len(line["images"]) for line in step] == [2, 2, 2, 1]
        mean = sum(len(line["images"]) * line["mean"] for line in step) / GLOBAL_BATCH
        # Lightning has divided by the four
        total = sum(line["loss"] for line in step)
        assert total == pytest.approx(mean + step[-1]["penalty"], rel=1e-5)


def test_changed_devices_are_listed(tmp_path: Path) -> None:
    _on_one(tmp_path, 2)
    other = config_of(tmp_path, 2, GLOBAL_BATCH)
    _, changed = open_run(tmp_path / "run", "auto", other.to_dict())
    assert changed == [
        "data.batch_size: 2 -> 4",
        "trainer.accumulate_grad_batches: 4 -> 1",
        "trainer.devices: 1 -> 2",
    ]


@pytest.mark.parametrize(
    ("before", "after"), [((4, 2), (4, 1)), ((4, 2), (8, 2)), ((4, 2), (5, 3)), ((4, 1), (8, 2))]
)
def test_another_number_of_images_a_step_moves_no_schedule(
    tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Without data.global_batch, (images at once, accumulated): stopped after step 11."""
    train(config_of(tmp_path, 1, None, before[1], before[0]), tmp_path, 11)
    train(config_of(tmp_path, 1, None, after[1], after[0]), tmp_path, 0)
    lines = sorted(_read(tmp_path), key=lambda line: line["key"])
    assert [line["key"] for line in lines] == list(range(len(lines)))
    for epoch in (0, 1, 2):
        seen = list(chain(*(line["images"] for line in lines if line["epoch"] == epoch)))
        assert len(set(seen)) == len(seen), "an image was read twice"
        assert len(seen) > 66 - max(before[0] * before[1], after[0] * after[1])
    was, now = before[0] * before[1], after[0] * after[1]
    later = [line for line in lines if line["step"] > 11]
    assert later
    for line in later:
        images = 11 * was + (line["step"] - 11) * now
        assert line["position"] * now == pytest.approx(images)
    config = config_of(tmp_path, 1, None, after[1], after[0])
    micro_batches = 66 // after[0]
    steps = -(-micro_batches // after[1])
    assert {line["total"] for line in later} == {3 * steps}
    factor = learning_rate_factor(config.optimizer, steps, 3 * steps)
    for logged in _schedules(tmp_path):
        if logged["step"] > 12 and "train/learning_rate" in logged:
            position = 11 * was / now + (logged["step"] - 12)
            rate = config.optimizer.learning_rate * factor(position)
            assert logged["train/learning_rate"] == pytest.approx(rate)


@pytest.mark.parametrize("is_old", [True, False])
def test_the_kl_coefficient_does_not_fall_when_devices_are_taken_away(is_old: bool) -> None:
    """ImageNet-32 from 24 to 16 GPUs at step 12,000: counted in steps it fell from 0.40 to 0.27."""

    def run_config(devices: int) -> dict[str, Any]:
        return {"data": {"batch_size": 24}, "trainer": {"devices": devices, "num_nodes": 1}}

    checkpoint = {"global_step": 12_000, "run_config": run_config(24)}
    if not is_old:
        checkpoint["images"] = {"seen": 12_000 * 576, "a_step": 576}
    totals = {gpus: 45 * (1_281_149 // (24 * gpus)) for gpus in (16, 24)}
    before = kl_coefficient(12_000, totals[24])
    assert before == pytest.approx(0.399, abs=1e-3)
    assert kl_coefficient(12_000, totals[16]) == pytest.approx(0.266, abs=1e-3)
    position = 12_000 + steps_ahead(checkpoint, 384, run_config(16))
    assert position == 18_000
    assert kl_coefficient(position, totals[16]) == pytest.approx(before, rel=1e-3)
    assert steps_ahead(checkpoint, 576, run_config(24)) == 0


def test_a_checkpoint_of_an_earlier_version_says_it_by_its_settings(tmp_path: Path) -> None:
    """It holds no images: its steps times its batch."""
    train(config_of(tmp_path, 1, None, 2), tmp_path, 11)
    (path,) = [p for p in step_checkpoints(tmp_path / "run/checkpoints") if "11" in p.name]
    content = load_checkpoint(path)
    assert content.pop("images") == {"seen": 88, "a_step": 8}
    save_checkpoint(content, path)
    train(config_of(tmp_path, 1, None, 1), tmp_path, 12)
    assert last_checkpoint(tmp_path / "run")["images"] == {"seen": 92, "a_step": 4}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("limit", r"trainer.accumulate_grad_batches: 2 -> 1"),
        ("schedule", r"images a step, of optimizer.schedule: 8 -> 4"),
    ],
)
def test_what_is_counted_in_batches_holds_them_fixed(
    tmp_path: Path, setting: str, words: str
) -> None:
    def configured(accumulate: int) -> Any:
        config = config_of(tmp_path, 1, None, accumulate)
        if setting == "limit":
            config.trainer.limit_train_batches = 8
        else:
            config.optimizer = dataclasses.replace(
                config.optimizer,
                warmup_epochs=0,
                schedule={"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 3},
            )
        return config

    train(configured(2), tmp_path, 2)
    with pytest.raises(ValueError, match=words):
        open_run(tmp_path / "run", "auto", configured(1).to_dict())


def test_a_trainer_that_counts_otherwise_is_told(tmp_path: Path) -> None:
    """In a notebook nothing makes it follow."""
    config = config_of(tmp_path, 1, GLOBAL_BATCH, batch_size=2)
    config.trainer.accumulate_grad_batches = 2
    with pytest.raises(ValueError, match="give the Trainer accumulate_grad_batches=4"):
        run(config)


def test_running_statistics_span_as_many_images_as_a_whole_batch(tmp_path: Path) -> None:
    """What was there before counts as much after a step of four micro-batches as after one."""
    left = {}
    for batch_size in (8, 2):
        config = config_of(tmp_path / str(batch_size), 1, 8, batch_size=batch_size)
        config.callbacks["ema"] = None
        config.optimizer.learning_rate = config.optimizer.min_learning_rate = 1e-30
        module = build_module(config)
        for norm in batchnorms(module.model):
            norm.running_mean.fill_(1e6)
        run(config, StopAt(3), module=module)
        left[batch_size] = torch.stack([n.running_mean.mean() for n in batchnorms(module.model)])
        saved = last_checkpoint(tmp_path / str(batch_size) / "run")
        assert not [name for name in saved["state_dict"] if name.endswith("momentum")]
    torch.testing.assert_close(left[8], torch.full_like(left[8], 0.95**3 * 1e6), rtol=1e-4, atol=0)
    torch.testing.assert_close(left[2], left[8], rtol=1e-4, atol=0)


def test_momentum_is_as_ever_without_accumulation(tmp_path: Path) -> None:
    config = config_of(tmp_path, 1, None)
    module = build_module(config)
    run(config, StopAt(1), module=module)
    assert {norm.momentum for norm in batchnorms(module.model)} == {MOMENTUM}


def test_fewer_images_than_a_step_takes_are_one_line(tmp_path: Path) -> None:
    data = ImageDataModule(dataclasses.replace(config_of(tmp_path, 1, 64).data, global_batch=67))
    data.setup()
    with pytest.raises(ValueError, match=r"data\.global_batch=67 needs 67 .* there are 66"):
        data.train_sampler()


@pytest.mark.parametrize(
    ("epochs", "every", "validations"), [(1, 1, [4]), (2, 1, [4, 6]), (2, 2, [6])]
)
def test_an_epoch_whose_last_images_fill_no_batch_is_validated(
    tmp_path: Path, epochs: int, every: int, validations: list[int]
) -> None:
    """Of 22 images 16 are read in batches of four; the six that are left are no batch of eight."""

    def configured(batch_size: int) -> Any:
        config = config_of(tmp_path, 1, None, batch_size=batch_size)
        config.data = dataclasses.replace(config.data, train_size=22)
        config.trainer.max_epochs, config.trainer.check_val_every_n_epoch = epochs, every
        return config

    train(configured(4), tmp_path, 4)
    folder, trainer = run(configured(8))
    assert (trainer.current_epoch, trainer.global_step) == (epochs, 4 + 2 * (epochs - 1))
    validated = [line["step"] for line in _schedules(tmp_path) if "train/beta" not in line]
    assert validated == validations
    assert (folder / "checkpoints/best.ckpt").exists()
    assert not is_pending(last_checkpoint(folder))
