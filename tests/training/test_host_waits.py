"""A step must not make the host wait for the device; only readings may, every k steps."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nvae.training.ema import MovingAverage
from tests.training.runs import RECIPES, run, small_config

EVERY = 6


class CountReads(TorchDispatchMode):
    """Counts what copies a value from a tensor to Python: item(), bool(), float(), tolist()."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.on_host: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = bool(args) and isinstance(args[0], torch.Tensor) and id(args[0]) in self.on_host
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.reads += not known
        out = func(*args, **(kwargs or {}))
        if known and isinstance(out, torch.Tensor):  # a comparison of what the host has
            self.on_host[id(out)] = out
        return out


class ReadsPerStep(pl.Callback):
    def __init__(self, counter: CountReads) -> None:
        self.counter, self.by_step, self.before = counter, {}, 0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        average = next(c for c in trainer.callbacks if isinstance(c, MovingAverage))
        assert average._average_model is not None
        counter = average._average_model.n_averaged
        assert counter.device.type == "cpu"  # wherever the model is
        self.counter.on_host[id(counter)] = counter

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.batch_idx % 2 == 1:  # the first micro-batch of two
            self.before = self.counter.reads

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.by_step[trainer.global_step] = self.counter.reads - self.before


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.exhaustive] * (f == "vdvae")) for f in RECIPES],
)
def test_no_reads_between_logs(tmp_path: Path, family: str) -> None:
    """Clipping, bad-step guard, KL annealing, spectral norm, average and metrics included.

    With Adamax and AdamW, which is VDVAE's.
    """
    config = small_config(tmp_path, family)
    config.trainer.log_every_n_steps = EVERY
    config.trainer.gradient_clip_val = 1.0
    config.callbacks["guard"]["skip_threshold"] = 1e6
    counter = CountReads()
    reads = ReadsPerStep(counter)

    config.trainer.max_epochs = 2
    with counter:
        run(config, reads)
    # the first step reads the spectral vectors' flag; tolist() of a stack reads no scalar here
    between = {s: n for s, n in reads.by_step.items() if s > 1 and s % EVERY and s % 8}
    assert len(between) > 8
    assert not any(between.values()), between


def test_the_counter_counts() -> None:
    """It can fail."""
    counter = CountReads()
    with counter:
        x = torch.ones(())
        float(x)
        x.item()
        bool(x)
    assert counter.reads == 3
