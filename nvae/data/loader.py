"""The images of a split, and the way to uint8 batches: which images, in which order, read ahead by
threads.

Own loaders instead of torch's: orders are pure functions of seed, epoch and position, so training
resumes exactly; and a batch is one `index_select` from a memory-mapped array, which holds no
interpreter lock, so threads read in parallel and no batch is copied between processes.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from nvae.random import STREAM_CROP, STREAM_ORDER, image_keys, permutation
from nvae.settings import LARGEST_INTEGER

_AHEAD_PER_WORKER = 2

T = TypeVar("T")
U = TypeVar("U")


class Split(ABC):
    """The images of one split.

    Attributes:
        sha256: of the stored pixels: results name the images they were taken on by it.
    """

    sha256: str

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a gathered image."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def gather(self, index: Tensor, *, epoch: int | None, seed: int) -> Tensor:
        """Pixels of some images, (B, H, W, C) uint8.

        Args:
            index: (B,) int64.
            epoch: training epoch, None for evaluation; where a crop is drawn it depends on it.
            seed: seed of the crop.
        """


@dataclass(frozen=True)
class DenseSplit(Split):
    """Images of one size, (N, H, W, C) uint8, in memory, memory-mapped or on a device."""

    images: Tensor
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be (N, H, W, C) uint8, not {tuple(self.images.shape)} "
                f"{self.images.dtype}"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:  # noqa: D102
        _, height, width, channels = self.images.shape
        return height, width, channels

    def gather(self, index: Tensor, *, epoch: int | None, seed: int) -> Tensor:  # noqa: D102
        del epoch, seed
        return self.images.index_select(0, index)

    def to(self, device: torch.device) -> "DenseSplit":
        """The same images on another device."""
        return DenseSplit(self.images.to(device), self.sha256)


@dataclass(frozen=True)
class RaggedSplit(Split):
    """Images whose shorter side is `size`; a square window is cut when they are read: a random
    one in training, the central one otherwise.

    Attributes:
        pixels: (bytes,) uint8, all images one after another.
        layout: (N, 3) int64: offset, height, width.
        size: side of the window.
        channels: channels of every image.
        sha256: see `Split`.
    """

    pixels: Tensor
    layout: Tensor
    size: int
    channels: int
    sha256: str = ""

    def __len__(self) -> int:
        return self.layout.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:  # noqa: D102
        return self.size, self.size, self.channels

    def gather(self, index: Tensor, *, epoch: int | None, seed: int) -> Tensor:  # noqa: D102
        layout = self.layout[index]
        slack = layout[:, 1:] - self.size
        if epoch is None:
            corner = slack // 2
        else:
            keys = image_keys(index, seed=seed, epoch=epoch, stream=STREAM_CROP)
            # One side has no slack, so one draw serves both: floor(u * (slack + 1)).
            corner = ((keys & 0xFFFFFF)[:, None] * (slack + 1)) >> 24
        out = self.pixels.new_empty(len(index), *self.shape)
        starts = zip(layout.tolist(), corner.tolist(), strict=True)
        for i, ((offset, height, width), (top, left)) in enumerate(starts):
            end = offset + height * width * self.channels
            image = self.pixels[offset:end].view(height, width, self.channels)
            out[i] = image[top : top + self.size, left : left + self.size]
        return out


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


class RawBatch(NamedTuple):
    """What leaves a loader, before the device.

    Attributes:
        images: (B, H, W, C) uint8; None where the whole split lies on the device.
        indices: (B,) int64, positions in the split.
        split: `train`, `valid` or `test`: what the indices are of.
        epoch: training epoch, None for evaluation.
    """

    images: Tensor | None
    indices: Tensor
    split: str
    epoch: int | None


def read_ahead(read: Callable[[T], U], items: Iterator[T], workers: int, name: str) -> Iterator[U]:
    """`map(read, items)` by so many threads, results in order, a bounded number ahead."""
    if workers == 0:
        yield from map(read, items)
        return
    pending: deque[Future[U]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    try:
        for item in items:
            pending.append(pool.submit(read, item))
            if len(pending) > workers * _AHEAD_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(eq=False)
class _Loader:
    """Reads batches of one split.

    Attributes:
        order: which images each batch has.
        images: the split.
        split: its name.
        seed: seed of random crops.
        num_workers: threads that read ahead; 0 reads in the calling thread.
        index_only: leave the images out, because the device holds them.
        pin_memory: put batches in page-locked memory, for CUDA.
    """

    order: Any
    images: Split
    split: str
    seed: int
    num_workers: int
    index_only: bool
    pin_memory: bool

    def __len__(self) -> int:
        """Batches in a whole epoch, also when resumed within one."""
        return len(self.order)

    def _iterate(self, batches: Iterator[Tensor], epoch: int | None) -> Iterator[RawBatch]:
        def read(index: Tensor) -> RawBatch:
            if self.index_only:
                return RawBatch(None, index, self.split, epoch)
            images = self.images.gather(index, epoch=epoch, seed=self.seed)
            if self.pin_memory:
                images, index = images.pin_memory(), index.pin_memory()
            return RawBatch(images, index, self.split, epoch)

        workers = 0 if self.index_only else self.num_workers
        return read_ahead(read, batches, workers, "nvae-data")


@dataclass(eq=False)
class EvalLoader(_Loader):
    """Batches of an `EvalSampler`; the same at every iteration."""

    order: EvalSampler

    def __iter__(self) -> Iterator[RawBatch]:
        return self._iterate(self.order.batches(), None)


@dataclass(eq=False)
class TrainLoader(_Loader):
    """Batches of a `TrainSampler`, one epoch an iteration, from wherever the last state was.

    The state counts batches handed out, not batches read ahead. It is the same on every rank, so
    a checkpoint of rank 0 resumes them all, also with another number of ranks.

    Trainers that count epochs (Lightning) call `sampler.set_epoch`; a plain loop needs not, since a
    finished iteration moves on to the next epoch by itself.
    """

    order: TrainSampler
    _epoch: int = field(default=0, init=False)
    _position: int = field(default=0, init=False)

    @property
    def sampler(self) -> "TrainLoader":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; within the epoch at hand, stay where we are."""
        if epoch != self._epoch:
            self._epoch, self._position = epoch, 0

    def __iter__(self) -> Iterator[RawBatch]:
        # A generator: epoch and position are read at the first batch, because Lightning asks for
        # the iterator before it tells the epoch.
        order, epoch = self.order, self._epoch
        for batch in self._iterate(order.batches(epoch, self._position), epoch):
            self._position += order.global_batch_size
            yield batch
        self.set_epoch(epoch + 1)

    def state_dict(self) -> dict[str, int]:
        """Where training is, and in what: epoch, images read in it by all ranks, size and seed."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "size": self.order.size,
            "seed": self.order.seed,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a state.

        Raises:
            ValueError: The state belongs to another data set or another seed, or is none.
        """
        for key in ("epoch", "position", "size", "seed"):
            value = state_dict.get(key) if isinstance(state_dict, dict) else None
            if type(value) is not int or not 0 <= value <= LARGEST_INTEGER:
                raise ValueError(f"the checkpoint's state of the training data has no {key}")
        if state_dict["position"] > state_dict["size"]:
            raise ValueError("the checkpoint's state of the training data is behind their end")
        for key, have in (("size", self.order.size), ("seed", self.order.seed)):
            if state_dict[key] != have:
                raise ValueError(
                    f"the checkpoint was made with {key} {state_dict[key]} of the training data, "
                    f"but here it is {have}: the order could not be continued"
                )
        self._epoch = state_dict["epoch"]
        self._position = state_dict["position"]
