"""Exponential moving average of the weights, by Lightning's weight averaging."""

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


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
    """Averages parameters and running statistics after every optimiser step.

    Validation, pictures and `best.ckpt` use the average.

    Args:
        decay: of the average, a step.
        device: where the average lives; None: beside the model.
    """

    def __init__(self, decay: float, device: str | None = None) -> None:
        super().__init__(device=device, multi_avg_fn=ema_of_floats(decay))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average; its counter stays on the host, which looks at it at every update."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
