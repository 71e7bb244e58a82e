"""Several devices, several machines: strategy, launcher, synchronised batch statistics."""

from datetime import timedelta

import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from nvae.regularizers import batchnorms


def ddp_strategy(accelerator: str, accumulate: int, timeout_seconds: float) -> DDPStrategy:
    """Data parallel over all devices of all machines.

    Every parameter gets a gradient at every step, so nothing is searched for. Buffers need no
    broadcast: statistics are synchronised in the forward pass, spectral vectors advance alike from
    equal weights.

    Args:
        accelerator: ``cpu`` | ``gpu``.
        accumulate: micro-batches a step. The graph is static only with one: the regularisers
            belong to the last.
        timeout_seconds: after which a collective that some rank did not join is an error.
    """
    return DDPStrategy(
        process_group_backend="nccl" if accelerator == "gpu" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        find_unused_parameters=False,
        static_graph=accumulate == 1,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


def synchronize_batchnorm(model: nn.Module) -> None:
    """Batch statistics over all ranks of the default group, from now on."""
    for norm in batchnorms(model):
        norm.group = dist.group.WORLD
