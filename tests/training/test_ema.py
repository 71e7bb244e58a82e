"""The moving average: where it lives, its bits, and what an update takes."""

import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from nvae.cli.fitting import build_module
from nvae.training import ema, optimizers
from nvae.training.captured import CapturedSteps
from nvae.training.ema import HostCopy, MovingAverage, move_by
from nvae.training.module import NVAELightning
from nvae.training.muon import Muon
from nvae.training.optimizers import Adamax, WeightAverages
from tests.training.runs import StopAt, assert_identical, last_checkpoint, run, small_config
from tests.training.tape import TapeGraphs
from tests.training.test_captured import short_config
from tests.training.test_guard import Spoil


def fitting(device: str) -> SimpleNamespace:
    """A Trainer that begins to fit there."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, global_step=0, state=SimpleNamespace(fn="fit"))


@pytest.mark.parametrize(("device", "expected"), [(None, "meta"), ("cpu", "cpu")])
def test_the_average_lives_where_it_should(
    tmp_path: Path, device: str | None, expected: str
) -> None:
    """Null is beside the model, which at this moment is still on the host.

    The meta device stands for a GPU.
    """
    trainer: Any = fitting("meta")
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
    trainer: Any = fitting("cpu")
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


class Steps:
    """Optimizer steps of a module, as its trainer would make them, and an average of them."""

    def __init__(self, module: NVAELightning) -> None:
        self.module = module
        self.trainer: Any = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            global_step=0,
            callbacks=[],
            optimizers=[],
        )
        self.average = MovingAverage(0.9)
        self.average.setup(self.trainer, module, "fit")
        self.average.on_train_start(self.trainer, module)
        self._generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        with torch.no_grad():
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                if tensor.is_floating_point():
                    tensor += torch.randn(tensor.shape, generator=self._generator)
                elif tensor.dtype == torch.bool:
                    tensor.fill_(True)
                else:
                    tensor += 1
        self.trainer.global_step += 1
        self.update()

    def update(self) -> None:
        self.average.on_train_batch_end(self.trainer, self.module, None, None, 0)


@pytest.fixture(params=["beside", "apart"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Apart: as if the model were on a GPU and the average in the host's memory."""
    if request.param == "apart":
        monkeypatch.setattr(ema, "_apart", lambda *_: True)
        monkeypatch.setattr(ema, "CHUNK", 100)
    return request.param


@pytest.mark.usefixtures("where")
def test_bits_are_those_of_torchs_average(tmp_path: Path) -> None:
    """Floats are averaged from the second update on, counters and flags copied."""
    steps = Steps(build_module(small_config(tmp_path)))

    def update(averaged: list[Any], current: list[Any], count: Any) -> None:
        if averaged[0].is_floating_point():
            get_ema_multi_avg_fn(0.9)(averaged, current, count)
        else:
            torch._foreach_copy_(averaged, current)

    expected = AveragedModel(deepcopy(steps.module), multi_avg_fn=update, use_buffers=True)
    for _ in range(4):
        steps.step()
        expected.update_parameters(steps.module)
        state = steps.average.averaged_state()
        want = expected.module.state_dict()
        assert state.keys() == want.keys()
        assert all(torch.equal(state[name], want[name]) for name in want)
    assert steps.average._average_model is not None
    assert int(steps.average._average_model.n_averaged) == int(expected.n_averaged) == 4
    steps.average.teardown(steps.trainer, steps.module, "fit")


class Operations(TorchDispatchMode):
    """Names of all that is computed, copied or made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_an_update_is_one_operation_a_type(tmp_path: Path) -> None:
    """Whatever the number of tensors; the other two are on the host's own counter."""
    steps = Steps(build_module(small_config(tmp_path)))
    steps.step()
    steps.trainer.global_step += 1
    with Operations() as operations:
        steps.update()
    assert sorted(operations.names) == [
        "aten::_foreach_copy_", "aten::_foreach_copy_", "aten::_foreach_lerp_",
        "aten::_local_scalar_dense", "aten::add_",
    ]  # fmt: skip


def test_a_share_that_the_device_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in the place of lerp, by as many chunks as it takes; 0 changes nothing."""
    monkeypatch.setattr(ema, "CHUNK", 10)
    averages = [torch.randn(size) for size in (4, 5, 30, 1)]
    current = [torch.randn_like(average) for average in averages]
    before = deepcopy(averages)
    move_by(averages, current, torch.tensor(0.0))
    assert all(map(torch.equal, averages, before))
    move_by(averages, current, torch.tensor(0.25))
    for average, old, new in zip(averages, before, current, strict=True):
        torch.testing.assert_close(average, old.lerp(new, 0.25))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Adamax had its kernel; the op that stands for it does on the CPU what it does."""
    monkeypatch.setattr(optimizers, "has_kernels", lambda _: True)


BAD = range(0, 1), range(5, 7)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(BAD[0], id="first step left out"),
        pytest.param(BAD[1], id="later steps left out", marks=pytest.mark.exhaustive),
    ],
)
def test_the_optimizers_pass_moves_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: range
) -> None:
    """Weights, running statistics, optimizer and counters keep their bits; the average differs from
    that of a pass of its own by rounding. So it is in captured steps, of two micro-batches here."""
    with monkeypatch.context() as without:
        without.setattr(optimizers, "has_kernels", lambda _: False)
        plain, _ = run(short_config(tmp_path / "plain"), Spoil(bad))
    folder, trainer = run(short_config(tmp_path / "fused"), Spoil(bad))
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, Adamax)
    assert optimizer.moving is not None
    assert len(optimizer.moving.of) == len(optimizer.param_groups[0]["params"])
    (average,) = (c for c in trainer.callbacks if isinstance(c, MovingAverage))  # type: ignore[attr-defined]
    left = {id(average) for average, _ in average._pairs}
    assert left
    assert not left & {id(average) for average in optimizer.moving.of.values()}
    expected, got = last_checkpoint(plain), last_checkpoint(folder)
    for part in ("current_model_state", "optimizer_states", "averaging_state"):
        assert_identical(expected[part], got[part], part)
    buffers = {name for name, _ in average._average_model.module.named_buffers()}  # type: ignore[union-attr]
    for name, tensor in got["state_dict"].items():
        tolerance = 0 if name in buffers else 1e-6
        torch.testing.assert_close(
            tensor, expected["state_dict"][name], rtol=tolerance, atol=tolerance
        )
    watched = CapturedSteps(TapeGraphs)
    taped, _ = run(short_config(tmp_path / "taped"), Spoil(bad), watched)
    assert watched.replays
    for part in ("state_dict", "current_model_state"):
        assert_identical(got[part], last_checkpoint(taped)[part], part)


@pytest.mark.usefixtures("kernels")
def test_a_resumed_run_has_the_same_average(tmp_path: Path) -> None:
    """The optimizer has it from the first step on, which is no copy."""
    whole, _ = run(short_config(tmp_path / "whole"))
    config = short_config(tmp_path / "parts")
    run(config, StopAt(5))
    parts, _ = run(config)
    expected, got = last_checkpoint(whole), last_checkpoint(parts)
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert_identical(expected[part], got[part], part)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", ["reference", "apart", "another layout", "adamw", "muon"])
def test_what_keeps_the_average_out_of_the_optimizers_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """It is moved all the same."""
    steps = Steps(build_module(small_config(tmp_path)))
    parameters = list(steps.module.parameters())
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "muon": Muon}
    optimizer = kinds.get(case, Adamax)(parameters)
    if case == "reference":
        optimizer.kernels = "reference"
    elif case == "apart":
        monkeypatch.setattr(ema, "_apart", lambda *_: True)
    elif case == "another layout":
        weight = next(p for p in parameters if p.ndim == 4 and p.shape[1] > 1 < p.shape[2])
        weight.data = weight.data.contiguous()
    steps.trainer.optimizers = [optimizer]
    for _ in range(3):
        steps.step()
    assert getattr(optimizer, "moving", None) is None
    assert steps.average.averaged_state().keys() == steps.module.state_dict().keys()
    moved = dict(steps.average._average_model.module.named_parameters())  # type: ignore[union-attr]
    for name, parameter in steps.module.named_parameters():
        assert float((moved[name] - parameter).detach().norm()) > 0


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_what_is_not_trained_is_averaged_too(off: float) -> None:
    """A frozen weight's average comes closer, in steps that are not left out."""
    trained, frozen = (nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0))
    averages = {trained: torch.zeros(3), frozen: torch.zeros(3)}
    optimizer = Adamax([trained, frozen])
    optimizer.moving = WeightAverages(averages, torch.tensor(0.25, dtype=torch.float64))
    optimizer.found_inf = torch.tensor(off)
    trained.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(averages[frozen], torch.full((3,), 0.5 * (1 - off)))
    torch.testing.assert_close(averages[trained], trained.detach() * 0.25 * (1 - off))


def test_between_steps_nothing_is_updated(tmp_path: Path) -> None:
    """After a micro-batch that is not the last of its step."""
    steps = Steps(build_module(small_config(tmp_path)))
    steps.step()
    with Operations() as operations:
        steps.update()
    assert operations.names == []


def test_a_replaced_buffer_is_found(tmp_path: Path) -> None:
    """A module may assign a new tensor to a buffer instead of writing to the old one."""
    steps = Steps(build_module(small_config(tmp_path)))
    steps.step()
    norm = next(m for m in steps.module.modules() if hasattr(m, "running_mean"))
    norm.num_batches_tracked = torch.tensor(77)
    steps.trainer.global_step += 1
    steps.update()
    assert any(int(t) == 77 for t in steps.average.averaged_state().values() if t.numel() == 1)


def test_readers_wait_for_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update on the host is never seen half done, and its error is not lost."""
    monkeypatch.setattr(ema, "_apart", lambda *_: True)
    update = ema._Averaged.update

    def slow(self: Any, first: bool) -> None:
        time.sleep(0.1)
        update(self, first)

    monkeypatch.setattr(ema._Averaged, "update", slow)
    steps = Steps(build_module(small_config(tmp_path)))
    steps.step()
    state = steps.average.averaged_state()
    assert all(torch.equal(state[name], value) for name, value in steps.module.state_dict().items())

    def broken(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(ema._Averaged, "update", broken)
    steps.step()
    with pytest.raises(MemoryError, match="no room"):
        steps.average.averaged_state()
    steps.average.teardown(steps.trainer, steps.module, "fit")


@pytest.mark.parametrize("chunk", [1, 7, 12, 10_000])
def test_host_copies_keep_values_and_memory_formats(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ema, "CHUNK", chunk)
    conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    tensors = [
        torch.tensor(2.0), conv.weight, torch.randn(5), torch.ones(1).expand(4), torch.randn(0),
        torch.randn(3, 2).t(), torch.randn(20)[3:10:2],
    ]  # fmt: skip
    copy = HostCopy(tensors)
    for _ in range(2):
        copy.start(tensors)
        copy.wait()
        for made, tensor in zip(copy.copies, tensors, strict=True):
            assert torch.equal(made, tensor)
            assert made.stride() == torch.empty_like(tensor).stride()
        with torch.no_grad():
            conv.weight.add_(1)  # written to later: the next copy has it


def test_a_checkpoint_says_what_it_always_said(tmp_path: Path) -> None:
    """Lightning's own names, so that earlier checkpoints resume, and these do elsewhere."""
    folder, _ = run(small_config(tmp_path))
    checkpoint = last_checkpoint(folder)
    assert checkpoint["averaging_state"].keys() == {"n_averaged"}
    assert int(checkpoint["averaging_state"]["n_averaged"]) == checkpoint["global_step"] == 24
    assert checkpoint["state_dict"].keys() == checkpoint["current_model_state"].keys()


@pytest.mark.parametrize(("decay", "lines"), [(0.9999, 1), (0.8, 0)])
def test_an_average_that_is_longer_than_the_run_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, decay: float, lines: int
) -> None:
    """It would be the initial weights, validated and sampled as if they had been trained."""
    config = small_config(tmp_path)
    config.callbacks["ema"]["decay"] = decay
    run(config, StopAt(1))
    told = [record.message for record in caplog.records if "callbacks.ema" in record.message]
    assert len(told) == lines
    assert all("a run of 24" in line and "decay=0.5833" in line for line in told)
