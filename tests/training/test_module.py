"""The training step's arithmetic: accumulation, annealing, what is logged."""

import json
from pathlib import Path

import pytest
import torch

from nvae.data.dataset import ImageBatch
from nvae.elbo import kl_coefficient
from nvae.objective import ObjectiveConfig
from nvae.training.logging import JsonLinesLogger
from nvae.training.module import NVAELightning
from nvae.training.optimizers import OptimizerConfig
from tests.training.runs import run, small_config


def test_a_step_weighs_its_micro_batches_alike_and_the_penalty_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven micro-batches in windows of two: the last, of one, must count as a whole step."""
    config = small_config(tmp_path)
    config.data.train_size = 30
    config.trainer.max_epochs = 1
    windows: dict[int, list[tuple[float, float, float]]] = {}
    original = NVAELightning.training_step

    def recorded(self: NVAELightning, batch: ImageBatch, batch_idx: int) -> torch.Tensor:
        loss = original(self, batch, batch_idx)
        last = self.last
        assert last is not None
        penalty = 0.0 if last.penalty is None else float(last.penalty)
        windows.setdefault(self.global_step, []).append(
            (float(loss) / 2, float(last.data), penalty)  # Lightning divides by 2
        )
        return loss

    monkeypatch.setattr(NVAELightning, "training_step", recorded)
    run(config)
    assert [len(w) for w in windows.values()] == [2, 2, 2, 1]
    for window in windows.values():
        given = sum(part for part, _, _ in window)
        elbo = sum(e for _, e, _ in window) / len(window)
        assert [p > 0 for _, _, p in window] == [False] * (len(window) - 1) + [True]
        assert given == pytest.approx(elbo + window[-1][2], rel=1e-5)


def test_beta_and_lambda_go_by_optimizer_steps(tmp_path: Path) -> None:
    """Not by micro-batches: 24 steps of two; lambda falls from 1 to 1e-2 as beta rises."""
    config = small_config(tmp_path)
    config.objective = ObjectiveConfig(kl_anneal_portion=0.5, spectral_weight_initial=1.0)
    folder, _ = run(config)
    logged = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "train/beta" in values:
            logged[values["step"]] = values
    assert sorted(logged) == list(range(1, 25))
    for step, values in logged.items():
        beta = kl_coefficient(step - 1, 24, 0.5)
        assert values["train/beta"] == beta
        assert values["train/lambda"] == pytest.approx(10 ** (-2 * beta))
        parts = values["train/reconstruction"] + values["train/kl_balanced"]
        penalty = values["train/lambda"] * (values["train/spectral"] + values["train/batchnorm"])
        assert values["train/loss"] == pytest.approx(parts + penalty, rel=1e-6)
        groups = sum(v for k, v in values.items() if k.startswith("train_kl_group"))
        assert groups == pytest.approx(values["train/kl"], rel=1e-5)
    assert logged[1]["train/beta"] == 1e-4
    assert logged[24]["train/beta"] == 1


def test_json_lines_of_a_lost_stretch_are_replaced(tmp_path: Path) -> None:
    """A killed run logged on after its last checkpoint; the resumed one writes those steps again.

    The line that the kill cut short goes too.
    """
    path = tmp_path / "metrics.jsonl"
    first = JsonLinesLogger(tmp_path)
    for step in range(1, 8):
        first.log_metrics({"x": step}, step)
    with path.open("a") as file:
        file.write('{"step": 8, "x"')
    JsonLinesLogger(tmp_path, start_step=5).log_metrics({"x": 60.0}, 6)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["x"]) for line in lines] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 60),
    ]  # fmt: skip


def test_bfloat16_trains_and_keeps_the_loss_in_float32(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.trainer.precision, config.trainer.max_epochs = "bf16-mixed", 1
    _, trainer = run(config)
    module = trainer.lightning_module
    assert isinstance(module, NVAELightning)
    assert module.last is not None
    assert {term.dtype for term in module.last.terms.values()} == {torch.float32}
    assert module.last.kl_per_group.dtype == torch.float32
    assert all(p.isfinite().all() for p in module.parameters())


def test_bfloat16_clips_the_gradients_of_a_fused_optimizer(tmp_path: Path) -> None:
    """Lightning refuses where a loss scaler might be undone in the step; bfloat16 has none."""
    config = small_config(tmp_path)
    config.trainer.precision, config.trainer.max_epochs = "bf16-mixed", 1
    config.trainer.gradient_clip_val = 1.0
    config.optimizer = OptimizerConfig(name="adamw", learning_rate=1e-3)
    _, trainer = run(config)
    assert trainer.optimizers[0].defaults["fused"]
    assert trainer.global_step == 8


def test_one_device_makes_no_process_group(tmp_path: Path) -> None:
    """Nor takes a port: two runs share a machine."""
    config = small_config(tmp_path)
    config.trainer.max_epochs = 1
    _, trainer = run(config)
    assert type(trainer.strategy).__name__ == "SingleDeviceStrategy"
    assert not torch.distributed.is_initialized()
