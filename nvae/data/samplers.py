"""Which images a process reads, and in which order: pure functions of seed, epoch and position.

The step is the user's, not the machine's: with `data.global_batch` every step takes the same images
on any number of devices, in as many micro-batches as the devices' memory asks for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
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


def micro_batches_a_step(global_batch: int, world_size: int, batch_size: int) -> int:
    """The fewest micro-batches a step in which no device takes more than `batch_size` images.

    Raises:
        ValueError: some device would have no image in one of them.
    """
    # ceil(global_batch / (world_size * k)) <= batch_size
    k = -(-global_batch // (world_size * batch_size))
    if global_batch < world_size * k:
        raise ValueError(
            f"data.global_batch={global_batch} in micro-batches of at most "
            f"data.batch_size={batch_size} leaves some of {world_size} devices without an image: "
            "give a larger data.batch_size, or fewer devices"
        )
    return k


@dataclass(frozen=True)
class TrainSampler:
    """Shuffled batches; what does not fill a step on all ranks is dropped.

    All ranks together take one step's images after another from the same permutation. With
    `global_batch` a step's images depend on nothing else; they are shared out over its
    micro-batches and the ranks, in this order, in shares that differ by one image at most.

    Attributes:
        size: images in the split.
        batch_size: images a micro-batch on each rank; the most, where `global_batch` is given.
        seed: seed of the order.
        shard: this process.
        global_batch: images a step on all ranks together. None: `batch_size` on each rank, and
            micro-batches are the trainer's to count.
    """

    size: int
    batch_size: int
    seed: int
    shard: Shard = Shard()
    global_batch: int | None = None

    def __post_init__(self) -> None:
        if self.size < self.global_batch_size:
            setting = (
                f"data.batch_size={self.batch_size} on {self.shard.world_size} device(s)"
                if self.global_batch is None
                else f"data.global_batch={self.global_batch}"
            )
            raise ValueError(
                f"{setting} needs {self.global_batch_size} training images a step, but there are "
                f"{self.size}"
            )

    @classmethod
    def fitting(
        cls, size: int, batch_size: int, seed: int, shard: Shard, global_batch: int | None = None
    ) -> Self:
        """A sampler with as large a batch as there are images for, `batch_size` at most.

        Raises:
            ValueError: There is not one image for each device, or fewer than `global_batch`, which
                is taken as it is.
        """
        if size < shard.world_size:
            raise ValueError(
                f"{shard.world_size} devices need as many training images at least, but there are "
                f"{size}: set trainer.devices={size}"
            )
        if global_batch is None:
            batch_size = min(batch_size, size // shard.world_size)
        return cls(size, batch_size, seed, shard, global_batch)

    @property
    def global_batch_size(self) -> int:
        """Images that all ranks together take before the order goes on from where they end."""
        return self.global_batch or self.batch_size * self.shard.world_size

    @cached_property
    def _ends(self) -> list[int]:
        """Where each share of a step's images ends: ranks within micro-batches."""
        world = self.shard.world_size
        count = world
        if self.global_batch is not None:
            count *= micro_batches_a_step(self.global_batch, world, self.batch_size)
        each, more = divmod(self.global_batch_size, count)
        return [(i + 1) * each + min(i + 1, more) for i in range(count)]

    @cached_property
    def micro_batches(self) -> list[int]:
        """Images of each micro-batch of a step, on all ranks together."""
        ends = [0, *self._ends[self.shard.world_size - 1 :: self.shard.world_size]]
        return [end - begin for begin, end in pairwise(ends)]

    def __len__(self) -> int:
        """Micro-batches an epoch."""
        return self.remaining(0)

    def remaining(self, position: int) -> int:
        """Micro-batches of an epoch that are left when `position` of its images have been read."""
        return (self.size - position) // self.global_batch_size * len(self.micro_batches)

    def batches(self, epoch: int, position: int = 0) -> Iterator[Tensor]:
        """This rank's batches of an epoch, from the beginning of a step.

        Args:
            epoch: which permutation.
            position: images that all ranks together have already read in this epoch.

        Yields:
            (at most batch_size,) int64 indices.
        """
        order = permutation(self.size, seed=self.seed, epoch=epoch, stream=STREAM_ORDER)
        ends = [0, *self._ends]
        mine = range(self.shard.rank, len(self._ends), self.shard.world_size)
        step = self.global_batch_size
        for start in range(position, self.size - step + 1, step):
            for share in mine:
                yield order[start + ends[share] : start + ends[share + 1]]


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
