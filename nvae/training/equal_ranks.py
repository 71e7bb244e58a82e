"""Ranks begin with the same weights and buffers: checked once.

Data parallel training never compares them. A rank that began with other running statistics or
other spectral vectors would stay different, and what is saved would be one rank's alone.
"""

from collections.abc import Iterable

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from nvae.training.ranks import collective_device, has_others

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 2**22
_ODD = 0x9E3779B97F4A7C15 - 2**64
"""A factor that spreads places over 64 bits."""


class EqualRanks(pl.Callback):
    """Compares the ranks' weights and buffers when training begins, at first and after a resume."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is compared where a strategy gives each rank a part of the weights.

        Raises:
            RuntimeError: on all ranks; it names the first tensor that differs.
        """
        if isinstance(trainer.strategy, DDPStrategy):
            check_equal((*pl_module.named_parameters(), *pl_module.named_buffers()))


def check_equal(named: Iterable[tuple[str, Tensor]]) -> None:
    """A common act: every rank names the same tensors in the same order.

    Raises:
        RuntimeError: on all ranks; it names the first tensor that differs, bit for bit.
    """
    if not has_others():
        return
    names, tensors = zip(*named, strict=True)
    with torch.no_grad():
        digests = torch.stack([digest(tensor) for tensor in tensors]).to(collective_device())
    both = torch.cat([digests, ~digests])  # the second half's least is the first half's greatest
    dist.all_reduce(both, dist.ReduceOp.MIN)
    least, greatest = both.split(len(names))
    different = (least != ~greatest).nonzero()
    if len(different):
        first = int(different[0])
        raise RuntimeError(
            f"{names[first]} {tuple(tensors[first].shape)} is not the same on all ranks, and so "
            f"are {len(different)} of {len(names)} weights and buffers; they have to begin alike"
        )


def digest(tensor: Tensor) -> Tensor:
    """A number of 64 bits, 0-d, on the tensor's device; a change of one bit changes it."""
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGER[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, piece in enumerate(bits.split(_PIECE)):
        place = torch.arange(len(piece), device=tensor.device) + number * _PIECE
        total += ((2 * place + 1) * _ODD * (piece.long() + 1)).sum()  # odd, and modulo 2**64
    return total
