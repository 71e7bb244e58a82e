"""The images of a split, and the way to batches, read ahead by threads.

Own loaders instead of torch's: orders are pure functions of seed, epoch and position, so training
resumes exactly; and a batch is one `index_select` from a memory-mapped array, which holds no
interpreter lock, so threads read in parallel and no batch is copied between processes.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nvae.data.samplers import EvalSampler, TrainSampler
from nvae.random import STREAM_CROP, image_keys
from nvae.settings import LARGEST_INTEGER

_AHEAD_PER_WORKER = 2

_PIXEL_TYPES = (torch.uint8, torch.uint16, torch.float32)
"""Of stored images."""

T = TypeVar("T")
U = TypeVar("U")


class Split(ABC):
    """The images of one split.

    Attributes:
        sha256: of the stored pixels: results name the images they were taken on by it.
        labels: (N,) int64 class numbers; None where there are none.
    """

    sha256: str
    labels: Tensor | None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a gathered image."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def gather(self, index: Tensor, *, epoch: int | None, seed: int) -> Tensor:
        """Pixels of some images, (B, H, W, C) as stored.

        Args:
            index: (B,) int64.
            epoch: training epoch, None for evaluation; where a crop is drawn it depends on it.
            seed: seed of the crop.
        """


@dataclass(frozen=True)
class DenseSplit(Split):
    """Images of one size, (N, H, W, C), in memory, memory-mapped or on a device."""

    images: Tensor
    sha256: str = ""
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype not in _PIXEL_TYPES or self.images.ndim != 4:
            raise ValueError(
                "images must be (N, H, W, C) uint8, uint16 or float32, not "
                f"{tuple(self.images.shape)} {self.images.dtype}"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:  # noqa: D102
        _, height, width, channels = self.images.shape
        return height, width, channels

    def gather(self, index: Tensor, *, epoch: int | None, seed: int) -> Tensor:  # noqa: D102
        del epoch, seed
        if self.images.dtype == torch.uint16:  # of which torch has few kernels
            return self.images.view(torch.int16).index_select(0, index).view(torch.uint16)
        return self.images.index_select(0, index)

    def to(self, device: torch.device) -> "DenseSplit":
        """The same images on another device."""
        return replace(self, images=self.images.to(device))


@dataclass(frozen=True)
class RaggedSplit(Split):
    """Images of different sizes, each as high or as wide as a window that is cut when they are
    read: a random one in training, the central one otherwise.

    Attributes:
        pixels: flat, all images one after another.
        layout: (N, 3) int64: offset, height, width.
        window: (H, W) of the window.
        channels: channels of every image.
        sha256, labels: see `Split`.
    """

    pixels: Tensor
    layout: Tensor
    window: tuple[int, int]
    channels: int
    sha256: str = ""
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.layout.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:  # noqa: D102
        return (*self.window, self.channels)

    def gather(self, index: Tensor, *, epoch: int | None, seed: int) -> Tensor:  # noqa: D102
        layout = self.layout[index]
        slack = layout[:, 1:] - torch.tensor(self.window)
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
            out[i] = image[top : top + self.window[0], left : left + self.window[1]]
        return out


class RawBatch(NamedTuple):
    """What leaves a loader, before the device.

    Attributes:
        images: (B, H, W, C) as stored; None where the whole split lies on the device.
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
        # torch's as the first batch is asked for; that of a new thread is the first GPU
        gpu = torch.cuda.current_device() if self.pin_memory else None

        def read(index: Tensor) -> RawBatch:
            if self.index_only:
                return RawBatch(None, index, self.split, epoch)
            images = self.images.gather(index, epoch=epoch, seed=self.seed)
            if gpu is not None:
                with torch.cuda.device(gpu):
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
        batches = self._iterate(order.batches(epoch, self._position), epoch)
        for batch, images in zip(batches, cycle(order.micro_batches), strict=False):
            self._position += images
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
