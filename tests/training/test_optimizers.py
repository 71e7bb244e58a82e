"""Optimizers by name, and apex's absence."""

import sys
from types import ModuleType

import pytest
import torch

from nvae.training.optimizers import HostSwitch, OptimizerConfig, build_optimizer


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["adamax", "adamw"])
def test_found_inf_leaves_the_step_out(name: str, fused: bool) -> None:
    """Every optimizer must honour the guard's flag, and step where it is 0."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(OptimizerConfig(name=name), [weight], fused=fused)
    for flag, moves in ((1.0, False), (0.0, True)):
        weight.grad = torch.full((3,), float("nan") if flag else 1.0)
        optimizer.found_inf = torch.tensor(flag)  # type: ignore[attr-defined]
        before = weight.detach().clone()
        optimizer.step()
        assert torch.equal(before, weight) != moves
        assert weight.isfinite().all()


class _Apex:
    """Stands in for an installed package of that name."""

    def __init__(self, patch: pytest.MonkeyPatch, fused: type | None, extension: bool) -> None:
        import importlib.machinery

        apex = ModuleType("apex")
        apex.__spec__ = importlib.machinery.ModuleSpec("apex", None)
        apex.__path__ = []
        patch.setitem(sys.modules, "apex", apex)
        if fused is not None:
            optimizers = ModuleType("apex.optimizers")
            optimizers.FusedAdam = fused  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "apex.optimizers", optimizers)
        if extension:
            amp = ModuleType("amp_C")
            amp.__spec__ = importlib.machinery.ModuleSpec("amp_C", None)
            patch.setitem(sys.modules, "amp_C", amp)


def test_missing_apex_is_named() -> None:
    with pytest.raises(ValueError, match="which is not installed; build NVIDIA's"):
        OptimizerConfig(name="apex_fused_adam")


def test_the_unrelated_apex_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    _Apex(monkeypatch, None, extension=False)
    with pytest.raises(ValueError, match=r"PyPI's is unrelated\): pip uninstall apex"):
        OptimizerConfig(name="apex_fused_lamb")


def test_apex_without_its_extension_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _Apex(monkeypatch, torch.optim.AdamW, extension=False)
    with pytest.raises(ValueError, match="amp_C"):
        OptimizerConfig(name="apex_fused_adam")
    _Apex(monkeypatch, torch.optim.AdamW, extension=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU"):
        OptimizerConfig(name="apex_fused_adam")


def test_apex_optimizer_gets_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for apex: built by name, and a bad step is left out."""

    class Fused(torch.optim.SGD):
        def __init__(self, parameters, lr, betas, eps, weight_decay):  # type: ignore[no-untyped-def]
            super().__init__(parameters, lr, weight_decay=weight_decay)

    _Apex(monkeypatch, Fused, extension=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(OptimizerConfig(name="apex_fused_adam"), [weight])
    assert isinstance(optimizer, HostSwitch)
    weight.grad = torch.ones(2)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(2))


def test_a_target_has_its_own_arguments_and_defaults() -> None:
    """Nothing of our settings for Adamax reaches a class that was named by `_target_`."""
    given = {"_target_": "torch.optim.SGD", "lr": 1e-3, "momentum": 0.9, "warmup_epochs": 2.0}
    config = OptimizerConfig.from_target(given)
    assert (config.warmup_epochs, config.min_learning_rate) == (2.0, 1e-5)
    group = build_optimizer(config, [torch.nn.Parameter(torch.ones(2))]).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1e-3, 0.9, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mom": 1}, "unknown key optimizer.mom"),
        ({"momentum": "much"}, "does not take these arguments"),
        ({"lr": None}, "optimizer.lr=None is not a number"),
        ({"_target_": "torch.optim.Nope"}, "cannot be imported"),
        ({"_target_": "torch.nn.Linear"}, "is no Optimizer"),
        ({"_target_": "torch.optim.LBFGS"}, "the loss several times a step"),
    ],
)
def test_wrong_targets_are_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OptimizerConfig.from_target({"_target_": "torch.optim.SGD", "lr": 1e-3, **change})
    assert "\n" not in str(caught.value)
