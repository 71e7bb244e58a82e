"""Our Adamax against torch's, and its switch."""

import copy

import pytest
import torch

from nvae.training.optimizers import Adamax


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (7,), (2, 3, 5, 5), ()]
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes
    ]


def _set_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 3e-4])
def test_equals_torch(weight_decay: float) -> None:
    """Twenty steps, learning rate changing, agree with torch.optim.Adamax to rounding."""
    ours, theirs = _parameters(), _parameters()
    options = {"lr": 1e-2, "eps": 1e-3, "weight_decay": weight_decay}
    a, b = Adamax(ours, **options), torch.optim.Adamax(theirs, **options, foreach=True)
    for step in range(20):
        for optimizer, parameters in ((a, ours), (b, theirs)):
            _set_gradients(parameters, step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("warm", [False, True])
def test_switched_off_changes_nothing(bad: float, warm: bool) -> None:
    """With found_inf = 1, also at the very first step, parameters and state stay bit for bit."""
    parameters = _parameters()
    optimizer = Adamax(parameters, lr=1e-2, weight_decay=3e-4)
    if warm:
        _set_gradients(parameters, 0)
        optimizer.step()
    _set_gradients(parameters, 1)
    assert parameters[1].grad is not None
    parameters[1].grad[2] = bad
    weights = [p.detach().clone() for p in parameters]
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for p, w in zip(parameters, weights, strict=True):
        assert torch.equal(p, w)
    after = optimizer.state_dict()
    if warm:
        assert after["param_groups"][0]["step"] == before["param_groups"][0]["step"] == 1
        for index, state in before["state"].items():
            for name, value in state.items():
                assert torch.equal(value, after["state"][index][name])


def test_switch_left_on_steps_as_without() -> None:
    """found_inf = 0 is the ordinary step, bit for bit."""
    ours, theirs = _parameters(), _parameters()
    a, b = Adamax(ours, weight_decay=3e-4), Adamax(theirs, weight_decay=3e-4)
    a.found_inf = torch.tensor(0.0)
    for step in range(3):
        _set_gradients(ours, step)
        _set_gradients(theirs, step)
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def test_state_survives_saving() -> None:
    """Save, load, go on equals going on; the saved state is tensors and plain types."""
    ours, theirs = _parameters(), _parameters()
    a = Adamax(ours)
    _set_gradients(ours, 0)
    a.step()
    for p, q in zip(theirs, ours, strict=True):
        p.data.copy_(q.data)
    b = Adamax(theirs)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for step in (1, 2):
        for optimizer, parameters in ((a, ours), (b, theirs)):
            _set_gradients(parameters, step)
            optimizer.step()
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)
