"""Several processes at one evaluation, as `torchrun` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from nvae.data.dataset import ImageBatch

_PATIENCE = timedelta(days=7)
"""A process that is done waits for the slowest, which may be hours behind on another GPU: torch's
half an hour would end both. One that fails still ends all at once: `torchrun` sees to that."""


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Rank and number of processes; more than one where `torchrun` started us."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    # only records and features travel, from the CPU
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def share_of(batches: Iterator[ImageBatch], rank: int, world: int) -> Iterator[ImageBatch]:
    """Every ``world``-th image of a split; no batch is empty."""
    if world == 1:
        yield from batches
        return
    for batch in batches:
        mine = batch.index % world == rank
        if mine.any():
            yield ImageBatch(batch.x[mine], batch.index[mine])
