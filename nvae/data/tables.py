"""Splits of images that answer one question: the uint8 pixels at these indices."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nvae.random import STREAM_CROP, image_keys

TRAIN, VALID, TEST = "train", "valid", "test"
SPLITS = (TRAIN, VALID, TEST)


class ImageTable(Protocol):
    """One split. `shape` is that of a gathered image, (H, W, C)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        ...

    @property
    def sha256(self) -> str:
        """Of the stored pixels: results name the images they were taken on by it."""
        ...

    def __len__(self) -> int: ...

    def gather(self, index: Tensor, *, epoch: int | None, seed: int) -> Tensor:
        """Pixels of some images.

        Args:
            index: (B,) int64.
            epoch: training epoch, None for evaluation; where a crop is drawn it depends on it.
            seed: seed of the crop.

        Returns:
            (B, H, W, C) uint8.
        """
        ...


@dataclass(frozen=True)
class DenseTable:
    """Images of one size in one tensor, in memory, memory-mapped or on a device.

    Attributes:
        images: (N, H, W, C) uint8.
        sha256: see `ImageTable`.
    """

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
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def gather(self, index: Tensor, *, epoch: int | None, seed: int) -> Tensor:
        """See `ImageTable.gather`; nothing is drawn here."""
        del epoch, seed
        return self.images.index_select(0, index)

    def to(self, device: torch.device) -> "DenseTable":
        """The same images on another device."""
        return DenseTable(self.images.to(device), self.sha256)


@dataclass(frozen=True)
class RaggedTable:
    """Images whose shorter side is `size`; a square window is cut when they are read.

    Attributes:
        pixels: (bytes,) uint8, all images one after another.
        layout: (N, 3) int64: offset, height, width.
        size: side of the window.
        channels: channels of every image.
        sha256: see `ImageTable`.
    """

    pixels: Tensor
    layout: Tensor
    size: int
    channels: int
    sha256: str = ""

    def __len__(self) -> int:
        return self.layout.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(size, size, C)."""
        return self.size, self.size, self.channels

    def gather(self, index: Tensor, *, epoch: int | None, seed: int) -> Tensor:
        """See `ImageTable.gather`: a random window in training, the central one otherwise."""
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
