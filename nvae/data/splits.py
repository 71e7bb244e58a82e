"""The splits of a data set: their pixels, and how they are drawn where the source has none."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvae.counter_rng import STREAM_CROP, STREAM_SPLIT, image_keys, permutation
from nvae.data.config import SPLITS, TEST, TRAIN, VALID, DataConfig, DataError

TOO_FEW = "it takes at least two: one to train on, one to hold out"


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


def split_counts(available: dict[str, int], wanted: dict[str, int | None]) -> dict[str, int]:
    """Sizes of the three splits, given what the source has and what the config asks for.

    A split that the source lacks is drawn from its training part. Where the source has nothing
    but a training part and the config names no size, a tenth goes to validation, at least one.

    Args:
        available: images in each split of the source.
        wanted: `train_size`, `valid_size`, `test_size` of the config, None = no wish.

    Returns:
        Images in each of train, valid, test.

    Raises:
        ValueError: The source cannot give what is asked for.
    """
    have = {split: available.get(split, 0) for split in SPLITS}
    if sum(have.values()) == 1:
        raise ValueError(f"the source has one picture; {TOO_FEW}")
    counts = dict(have)
    drawn = 0
    no_wish = all(wanted.get(split) is None for split in SPLITS)
    for split in (VALID, TEST):
        if not have[split]:
            counts[split] = wanted.get(split) or 0
            if split == VALID and no_wish and not have[TEST]:
                counts[split] = max(have[TRAIN] // 10, 1)
            drawn += counts[split]
    counts[TRAIN] = have[TRAIN] - drawn
    for split in SPLITS:
        asked = wanted.get(split)
        # A source's own validation or test images may be left unused, never cut short.
        if asked == 0 and split != TRAIN:
            counts[split] = 0
        elif asked is not None and asked != counts[split]:
            raise ValueError(
                f"data.{split}_size is {asked}, but the source gives {counts[split]} (it has "
                + ", ".join(f"{n} {name}" for name, n in have.items())
                + " images)"
            )
    if counts[TRAIN] < 1:
        raise ValueError(
            f"no training images are left: the source has {have[TRAIN]}, and {drawn} are asked "
            "for validation and test"
        )
    return counts


def draw_splits(n: int, valid: int, test: int, *, seed: int) -> dict[str, Tensor]:
    """Divide n images at random; every split keeps the order of the source.

    Returns:
        Sorted int64 indices for train, valid and test, disjoint and complete.
    """
    order = permutation(n, seed=seed, epoch=0, stream=STREAM_SPLIT)
    parts = order.split([n - valid - test, valid, test])
    return {split: part.sort().values for split, part in zip(SPLITS, parts, strict=True)}


class Plan(NamedTuple):
    """Which picture of which part of a source goes to which split.

    Attributes:
        counts: pictures by split, before unreadable ones are left out.
        destination: for each part, the number in `SPLITS` of every picture, -1 for none.
        rule: the same in words.
    """

    counts: dict[str, int]
    destination: dict[str, NDArray[np.int8]]
    rule: str


def plan_splits(available: dict[str, int], config: DataConfig) -> Plan:
    """Decide the splits, given how many pictures each part of the source has.

    Raises:
        DataError: The source cannot give the sizes that the config asks for.
    """
    try:
        counts = split_counts(available, {n: getattr(config, f"{n}_size") for n in SPLITS})
    except ValueError as error:
        raise DataError(error) from error
    drawn = {split: 0 if split in available else counts[split] for split in SPLITS[1:]}
    destination = {
        split: np.full(count, SPLITS.index(split) if counts[split] else -1, dtype=np.int8)
        for split, count in available.items()
    }
    if not any(drawn.values()):
        return Plan(counts, destination, "as in the source")
    indices = draw_splits(available[TRAIN], *drawn.values(), seed=config.split_seed)
    for split, rows in indices.items():
        destination[TRAIN][rows.numpy()] = SPLITS.index(split)
    names = " and ".join(split for split, count in drawn.items() if count)
    rule = f"{names} drawn from the source's training part (draw_splits, version 1, seed "
    return Plan(counts, destination, f"{rule}{config.split_seed})")
