"""Which images a rank reads, in which order: pure functions of seed, epoch and position."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from nvae.random import STREAM_ORDER, permutation


@dataclass(frozen=True)
class Shard:
    """One process's share of the work: `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}; it must be in 0..{self.world_size - 1}")


@dataclass(frozen=True)
class TrainSampler:
    """Shuffled batches of equal size; what does not fill a batch on every rank is dropped.

    All ranks together take one global batch after another from the same permutation, so what a
    step sees depends on the global batch size, not on the number of ranks.

    Attributes:
        size: images in the split.
        batch_size: images a step on each rank.
        seed: seed of the order.
        shard: this process.
    """

    size: int
    batch_size: int
    seed: int
    shard: Shard = Shard()

    def __post_init__(self) -> None:
        if self.size < self.global_batch_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} on {self.shard.world_size} device(s) needs "
                f"{self.global_batch_size} training images a step, but there are {self.size}"
            )

    @classmethod
    def fitting(cls, size: int, batch_size: int, seed: int, shard: Shard) -> Self:
        """A sampler with as large a batch as there are images for, `batch_size` at most.

        Raises:
            ValueError: There is not one image for each device.
        """
        if size < shard.world_size:
            raise ValueError(
                f"{shard.world_size} devices need as many training images at least, but there are "
                f"{size}: set trainer.devices={size}"
            )
        return cls(size, min(batch_size, size // shard.world_size), seed, shard)

    @property
    def global_batch_size(self) -> int:
        """Images a step on all ranks together."""
        return self.batch_size * self.shard.world_size

    def __len__(self) -> int:
        """Steps an epoch."""
        return self.size // self.global_batch_size

    def batches(self, epoch: int, position: int = 0) -> Iterator[Tensor]:
        """This rank's batches of an epoch.

        Args:
            epoch: which permutation.
            position: images that all ranks together have already read in this epoch.

        Yields:
            (batch_size,) int64 indices.
        """
        order = permutation(self.size, seed=self.seed, epoch=epoch, stream=STREAM_ORDER)
        for start in range(
            position, self.size - self.global_batch_size + 1, self.global_batch_size
        ):
            begin = start + self.shard.rank * self.batch_size
            yield order[begin : begin + self.batch_size]


@dataclass(frozen=True)
class EvalSampler:
    """Every image once, in order, over all ranks: nothing padded, nothing repeated.

    Attributes:
        size: images in the split.
        batch_size: images a step on each rank; the last may be smaller.
        shard: this process, which takes every world_size-th image.
    """

    size: int
    batch_size: int
    shard: Shard = Shard()

    def __len__(self) -> int:
        mine = len(range(self.shard.rank, self.size, self.shard.world_size))
        return -(-mine // self.batch_size)

    def batches(self) -> Iterator[Tensor]:
        """This rank's batches: int64 indices of at most `batch_size` images each."""
        mine = torch.arange(self.size)[self.shard.rank :: self.shard.world_size]
        yield from mine.split(self.batch_size) if len(mine) else ()
