"""Captured steps on a GPU: those of Lightning's loop, as far as two runs of that agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.cli.config import TrainConfig
from nvae.training.captured import WARM_UPS, CapturedSteps
from nvae.training.optimizers import OptimizerConfig
from tests.training.runs import StopAt, last_checkpoint, run, small_config
from tests.training.test_guard import Spoil

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS = 208
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bf16-mixed"},
    "two micro-batches": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 100.0},
    "adamw": {},
    "compiled": {},
    "recomputed": {},
}


def config_of(root: Path, case: str, *, captured: bool) -> TrainConfig:
    """Steps of four images, with beta = 1 from the 63rd on."""
    config = small_config(root)
    config.trainer.accelerator, config.trainer.cuda_graph = "gpu", captured
    config.trainer.accumulate_grad_batches, config.trainer.max_epochs = 1, 13
    for name, value in CASES[case].items():
        setattr(config.trainer, name, value)
    config.trainer.max_epochs *= config.trainer.accumulate_grad_batches
    if case == "adamw":
        config.optimizer = OptimizerConfig(name="adamw", learning_rate=1e-3, warmup_epochs=1)
    config.compile = case == "compiled"
    config.checkpoint_cells = case == "recomputed"
    return config


def train(config: TrainConfig, *callbacks: Any) -> tuple[Path, int]:
    """The run's folder, and how many micro-batches were replayed."""
    folder, trainer = run(config, *callbacks)
    found = [c for c in trainer.callbacks if isinstance(c, CapturedSteps)]  # type: ignore[attr-defined]
    return folder, sum(c.replays for c in found)


def losses(folder: Path, stage: str = "train") -> torch.Tensor:
    """-ELBO of every step, or of every validation, in nats."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    name = f"{stage}/negative_elbo"
    return torch.tensor([line[name] for line in lines if name in line])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean relative difference, of the steps that are finite in both."""
    fine = a.isfinite() & b.isfinite()
    assert fine.sum() >= len(a) - 1
    return float(((a - b).abs() / b.abs())[fine].mean())


@pytest.mark.parametrize("case", CASES)
def test_200_captured_steps_are_the_steps_of_lightning(tmp_path: Path, case: str) -> None:
    """Over a NaN step, in -ELBO: within a thousandth, or within four times what lies between two
    runs of Lightning's loop, whose convolutions may add in any order."""
    spoil = Spoil(range(20, 21))
    one, none = train(config_of(tmp_path / "one", case, captured=False), spoil)
    other, _ = train(config_of(tmp_path / "other", case, captured=False), spoil)
    taken, replays = train(config_of(tmp_path / "taken", case, captured=True), spoil)
    kinds = CASES[case].get("accumulate_grad_batches", 1)
    assert none == 0
    assert replays == kinds * (STEPS - WARM_UPS)
    expected = losses(one)
    assert len(expected) == STEPS
    # the first replays, before any rounding has grown
    torch.testing.assert_close(losses(taken)[:8], expected[:8], rtol=1e-3, atol=0)
    allowed = max(1e-3, 4 * distance(losses(other), expected))
    assert distance(losses(taken), expected) <= allowed
    (bad,) = (taken / "bad_steps").glob("*.json")
    assert bad.name == "step_00000021.json"
    weights = last_checkpoint(taken)["current_model_state"]
    assert all(t.isfinite().all() for t in weights.values())


def test_validations_are_of_the_weights_at_hand(tmp_path: Path) -> None:
    """Without an average nobody writes the weights but the graph, which autograd does not see."""
    found = []
    for captured in (False, True):
        config = config_of(tmp_path / str(captured), "float32", captured=captured)
        config.callbacks["ema"]["decay"] = None
        folder, replays = train(config)
        assert (replays > 0) == captured
        found.append(losses(folder, "valid"))
    assert len(found[0]) == 13
    assert distance(found[1], found[0]) < 1e-2


def test_a_captured_run_resumes(tmp_path: Path) -> None:
    """From the middle of an epoch, with graphs before and after."""
    whole, _ = train(config_of(tmp_path / "whole", "float32", captured=True))
    config = config_of(tmp_path / "parts", "float32", captured=True)
    _, before = train(config, StopAt(40))
    parts, after = train(config)
    assert before > 30
    assert after > 150
    assert last_checkpoint(parts)["global_step"] == STEPS
    assert len(losses(parts)) == STEPS
    assert distance(losses(parts), losses(whole)) < 1e-2


def test_a_checkpoint_of_captured_steps_goes_on_without(tmp_path: Path) -> None:
    """Learning rate and counts are numbers and tensors as ever."""
    config = config_of(tmp_path, "adamw", captured=True)
    train(config, StopAt(40))
    group = last_checkpoint(tmp_path / "run")["optimizer_states"][0]["param_groups"][0]
    assert isinstance(group["lr"], float)
    assert group["capturable"] is False
    config.trainer.cuda_graph = False
    folder, replays = train(config)
    assert replays == 0
    assert last_checkpoint(folder)["global_step"] == STEPS
