"""Exponential moving average of the weights, by Lightning's weight averaging."""

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nvae.models.folding import forget


def ema_of_floats(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    """torch's moving average for floating tensors; counters and flags are copied."""
    average = get_ema_multi_avg_fn(decay)

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            average(averaged, current, count)
        else:
            torch._foreach_copy_(averaged, current)

    return update


class MovingAverage(WeightAveraging):
    """Averages parameters and running statistics after every optimizer step.

    Validation and pictures use the average. It is the `state_dict` of every checkpoint, and the raw
    weights are `current_model_state` there: in `step_N.ckpt` by Lightning's hook, in `best.ckpt` by
    :class:`~nvae.training.checkpointing.Checkpoints`.

    Args:
        decay: of the average, a step.
        device: where the average lives; None: beside the model.
    """

    def __init__(self, decay: float, device: str | None = None) -> None:
        super().__init__(device=device, multi_avg_fn=ema_of_floats(decay))
        self.device = device

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average; its counter stays on the host, which looks at it at every update."""
        if self._device is None:
            # where the model is going to be: the strategy moves it only after this hook
            self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged = torch.zeros((), dtype=torch.long)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in; through ``.data``, which derived weights do not see."""
        super().on_validation_epoch_start(trainer, pl_module)
        forget(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the raw weights back."""
        super().on_validation_epoch_end(trainer, pl_module)
        forget(pl_module)

    def averaged_state(self) -> dict[str, Tensor]:
        """The average, under the names that the module's own ``state_dict`` uses.

        Not inside a validation, where the module holds the average and this the raw weights.
        """
        assert self._average_model is not None
        module: nn.Module = self._average_model.module
        return dict(module.state_dict())


def moving_average(decay: float | None = None, device: str | None = None) -> MovingAverage | None:
    """The average that a run keeps, or none.

    Args:
        decay: a step, in [0, 1); None: no average.
        device: None: beside the model; ``cpu`` saves GPU memory.

    Raises:
        ValueError: an impossible decay or device.
    """
    if device not in (None, "cpu"):
        raise ValueError(f"callbacks.ema.device={device} is unknown; allowed: cpu, null")
    if decay is None:
        return None
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        raise ValueError(f"callbacks.ema.decay={decay!r} is not a number or null")
    if not 0 <= decay < 1:
        raise ValueError(f"callbacks.ema.decay is {decay}; allowed: 0 up to, not with, 1, or null")
    return MovingAverage(decay, device)
