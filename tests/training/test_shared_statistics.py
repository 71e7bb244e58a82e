"""Which ranks share batch statistics: groups of their own, by machine, or none."""

import os
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nvae.models.normalization import BatchNorm
from nvae.training.module import NVAELightning
from nvae.training.shared_statistics import SharedStatistics
from nvae.training.trainer import TrainerConfig, build_trainer
from tests.training.ranks import run_ranks
from tests.training.runs import small_config

IMAGES = (3, 1, 2, 4)  # of every rank: uneven shares
NODES = (0, 1, 0, 1)  # machines of the ranks, as a cyclic launcher numbers them
CHANNELS = 3
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def _images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(IMAGES), CHANNELS, 2, 3, generator=generator, dtype=torch.float64)
    return list(x.split(IMAGES))


def _norms() -> nn.Sequential:
    return nn.Sequential(BatchNorm(CHANNELS), BatchNorm(CHANNELS, "swish")).double()


def _passes(x: Tensor, model: nn.Module) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y * x.detach().cos()).sum().backward()
    assert x.grad is not None
    running = {name: b.numpy().copy() for name, b in model.named_buffers() if "running" in name}
    return {"y": y.detach().numpy(), "dx": x.grad.numpy(), **running}


def _share(rank: int, world: int, sharing: str) -> dict[str, Any]:
    model = _norms()
    shared = SharedStatistics(model, sharing, NODES[rank])
    group = next(m.group for m in model.modules() if isinstance(m, BatchNorm))
    assert group is not dist.group.WORLD
    result = _passes(_images()[rank], model)
    result["ranks"] = None if group is None else dist.get_process_group_ranks(group)
    shared.settle()
    result["settled"] = {n: b.numpy() for n, b in model.named_buffers() if "running" in n}
    shared.close()
    assert all(m.group is None for m in model.modules() if isinstance(m, BatchNorm))
    return result


@pytest.mark.parametrize(
    ("sharing", "groups"),
    [
        ("world", [[0, 1, 2, 3]]),
        ("node", [[0, 2], [1, 3]]),
        ("none", [[0], [1], [2], [3]]),
    ],
)
def test_statistics_are_those_of_the_groups_images(sharing: str, groups: list[list[int]]) -> None:
    """Every image counts the same, however many a rank has; afterwards all ranks are equal."""
    ranks = run_ranks(_share, 4, sharing)
    images, running = _images(), []
    for group in groups:
        together = _passes(torch.cat([images[rank] for rank in group]), _norms())
        first = 0
        for rank in group:
            found, share = ranks[rank], slice(first, first := first + IMAGES[rank])
            assert found["ranks"] == (group if len(group) > 1 else None)
            for name in ("y", "dx"):
                np.testing.assert_allclose(found[name], together[name][share], **CLOSE)
            for name in ranks[0]["settled"]:
                np.testing.assert_allclose(found[name], together[name], **CLOSE)
            running.append({name: found[name] for name in found["settled"]})
    for name, value in ranks[0]["settled"].items():
        np.testing.assert_allclose(value, np.mean([r[name] for r in running], 0), **CLOSE)
        for found in ranks[1:]:
            assert np.array_equal(found["settled"][name], value)


def _settle_twice(rank: int, world: int) -> list[Any]:
    model = nn.Sequential(BatchNorm(40))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(40, generator=torch.Generator().manual_seed(3)))
    before = [b.clone() for b in model.buffers()]
    SharedStatistics(model, "none").settle()
    return [bool((a == b).all()) for a, b in zip(model.buffers(), before, strict=True)]


def test_a_step_that_was_left_out_changes_no_bit() -> None:
    """Three ranks, whose mean of equal numbers rounds in float32."""
    assert all(all(same) for same in run_ranks(_settle_twice, 3))


class Linear(pl.LightningModule):
    """A loss whose gradient is the rank's own batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64))
        self.gradient: np.ndarray | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch[0]).sum()

    def on_after_backward(self) -> None:
        assert self.weight.grad is not None
        self.gradient = self.weight.grad.numpy().copy()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _gradients(rank: int, world: int, hook: str, folder: str) -> Any:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0", TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    config = TrainerConfig(
        accelerator="cpu", devices=world, max_steps=1, max_epochs=1, ddp_comm_hook=hook
    )
    trainer = build_trainer(config, [], [], folder)  # type: ignore[arg-type]
    module = Linear()
    trainer.fit(module, torch.utils.data.DataLoader([_own(rank)], batch_size=1))
    return module.gradient


def _own(rank: int) -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("hook", ["bf16", "none"])
def test_gradients_travel_in_the_type_that_was_asked_for(hook: str, tmp_path: Any) -> None:
    """On the CPU too, where Lightning leaves a communication hook out without a word."""
    found = run_ranks(_gradients, 2, hook, str(tmp_path))
    rounded = (_own(0).bfloat16() / 2 + _own(1).bfloat16() / 2).float().numpy()
    exact = ((_own(0) + _own(1)) / 2).numpy()
    assert not np.array_equal(rounded, exact)
    for gradient in found:
        if hook == "bf16":
            assert np.array_equal(gradient, rounded)
        else:
            np.testing.assert_allclose(gradient, exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("said", "meant"),
    [(True, "world"), (False, "none"), ("True", "world"), ("node", "node"), ("none", "none")],
)
def test_lightnings_own_values_have_a_meaning(said: Any, meant: str) -> None:
    """And never reach Lightning, which would convert layers."""
    config = TrainerConfig(accelerator="cpu", sync_batchnorm=said)
    assert config.sync_batchnorm == meant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sync_batchnorm": "machine"}, "trainer.sync_batchnorm='machine' is unknown; allowed: "),
        ({"ddp_comm_hook": "fp8"}, "trainer.ddp_comm_hook='fp8' is unknown; allowed: none, bf16"),
        (
            {"ddp_comm_hook": "bf16", "strategy": "fsdp"},
            "trainer.ddp_comm_hook=bf16 belongs to trainer.strategy=ddp",
        ),
    ],
)
def test_other_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(accelerator="cpu", **settings)


def test_a_module_refuses_them_too(tmp_path: Any) -> None:
    model = small_config(tmp_path).build_model()
    with pytest.raises(ValueError, match="sync_batchnorm='everyone' is unknown"):
        NVAELightning(model, sync_batchnorm="everyone")
