"""The moving average: where it lives."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvae.cli.train import build_module
from nvae.training.ema import MovingAverage
from tests.training.runs import small_config


@pytest.mark.parametrize(("device", "expected"), [(None, "meta"), ("cpu", "cpu")])
def test_the_average_lives_where_it_should(
    tmp_path: Path, device: str | None, expected: str
) -> None:
    """Null is beside the model, which at this moment is still on the host.

    The meta device stands for a GPU.
    """
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    average = MovingAverage(0.9, device)
    module = build_module(small_config(tmp_path))
    average.setup(trainer, module, "fit")
    assert module.device.type == "cpu"
    state = average.averaged_state()
    assert state.keys() == module.state_dict().keys()
    assert {tensor.device.type for tensor in state.values()} == {expected}


@torch.no_grad()
def test_swapping_reaches_the_derived_weights(tmp_path: Path) -> None:
    """Weights folded from the average must not be used for the raw weights, nor the reverse."""
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    average = MovingAverage(0.9)
    module = build_module(small_config(tmp_path)).eval()
    model = module.model
    noise = model.draw_noise(2)
    average.setup(trainer, module, "fit")
    for parameter in model.parameters():
        parameter.mul_(1.2)
    raw = model.sample_logits(2, noise=noise)
    average.on_validation_epoch_start(trainer, module)
    averaged = model.sample_logits(2, noise=noise)
    average.on_validation_epoch_end(trainer, module)
    assert not torch.allclose(averaged, raw)
    assert torch.equal(model.sample_logits(2, noise=noise), raw)
