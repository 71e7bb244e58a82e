"""Folded and normalized weights are never older than the parameters they came from."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from nvae.models import NVAE
from nvae.models.folding import Derived, forget
from nvae.training.optimizers import Adamax
from tests.models.small import small_model

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamax": lambda p: Adamax(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
}


@torch.no_grad()
def logits(model: NVAE, noise: list[Tensor]) -> Tensor:
    return model.eval().sample_logits(2, noise=noise)


def fresh(model: NVAE) -> NVAE:
    copied = NVAE(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_evaluation_after_a_step_sees_the_new_weights(name: str) -> None:
    """Fused optimizers and apex write without counting versions."""
    torch.manual_seed(0)
    model = small_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    noise = model.draw_noise(2)
    before = logits(model, noise)
    model.train()(torch.rand(2, 1, 16, 16)).logits.square().sum().backward()
    optimizer.step()
    found = logits(model, noise)
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, logits(fresh(model), noise), rtol=0, atol=1e-6)


def test_forget_sees_what_was_written_through_data() -> None:
    model = small_model()
    noise = model.draw_noise(2)
    before = logits(model, noise)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    forget(model)
    found = logits(model, noise)
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, logits(fresh(model), noise), rtol=0, atol=1e-6)


def test_training_frees_what_evaluation_kept() -> None:
    """A second copy of all weights would stay on the device through the next epoch."""
    model = small_model()
    logits(model, model.draw_noise(2))
    kept = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Derived)]
    assert any(derived._value is not None for derived in kept)
    model.train()(torch.rand(2, 1, 16, 16))
    assert all(derived._value is None for derived in kept)


def test_weights_folded_under_autocast_are_full_precision() -> None:
    """Validation in bf16 fills the cache that pictures in float32 then use."""
    torch.manual_seed(0)
    model = small_model()
    model.train()(torch.rand(4, 1, 16, 16))
    noise = model.draw_noise(2)
    expected = logits(copy.deepcopy(model), noise)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, noise)
    assert torch.equal(logits(model, noise), expected)
