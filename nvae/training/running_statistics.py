"""Batch normalisation's running statistics as one vector, to be kept and put back in one go.

A forward pass updates them before anyone knows that the step is bad. One batch with a NaN would
stay in them for ever, which is why training that meets a NaN cannot be cured by resuming.
"""

import torch
from torch import Tensor, nn

from nvae.regularizers import batchnorms


class RunningStatistics:
    """All running means and variances of a model, moved into one block of memory.

    The layers keep their buffers, which become views; names and checkpoints do not change.

    Args:
        model: on its device already; moving it afterwards ends the sharing.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = [b for norm in batchnorms(model) for b in (norm.running_mean, norm.running_var)]
        self._block = torch.cat([b.flatten() for b in buffers]) if buffers else torch.zeros(0)
        for buffer, view in zip(
            buffers, self._block.split([b.numel() for b in buffers]), strict=True
        ):
            buffer.data = view
        self._kept = self._block.clone()

    def keep(self) -> None:
        """Remember the present values."""
        self._kept.copy_(self._block)

    def restore_where(self, condition: Tensor) -> None:
        """Put the kept values back where the 0-d ``condition`` is true; the host does not ask."""
        if self._block.numel():
            self._block.copy_(
                torch.where(condition.to(self._block.device), self._kept, self._block)
            )
