"""Arrays of images in files, read row after row, whatever the files are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvae.data.config import DataConfig, DataError
from nvae.data.decoding import LARGEST_PICTURE
from nvae.data.labels import label_of
from nvae.data.pixels import Pixels
from nvae.data.readers import PIECE, Item, Part, loaded_item

LARGEST_LABELS = 1 << 30
"""Bytes of the labels of a split."""


@dataclass(frozen=True)
class Rows:
    """An array in a file, read row after row.

    Attributes:
        name: of the file, and of the array in it.
        shape: (N, ...).
        dtype: of its numbers.
        blocks: a fresh iteration over its rows in order, some at a time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[], Iterator[NDArray[Any]]]

    @property
    def step(self) -> int:
        """Rows to read at a time."""
        return max(1, PIECE // max(1, prod(self.shape[1:]) * self.dtype.itemsize))

    def whole(self) -> NDArray[Any]:
        """All rows, of labels."""
        if prod(self.shape) * self.dtype.itemsize > LARGEST_LABELS:
            raise DataError(f"{self.name} claims {self.shape} labels, more than a split has")
        return np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *self.blocks()])


def part_of(rows: Rows, labels: Rows | None, config: DataConfig) -> Part:
    """The images of an array, (N, H, W), (N, H, W, C) or (N, C, H, W), with their labels, (N,).

    Raises:
        DataError: It is of another shape or type, or there are fewer or more labels.
    """
    if len(rows.shape) not in (3, 4):
        raise DataError(f"{rows.name} is {rows.shape}, not (N, H, W) or (N, H, W, C)")
    if prod(rows.shape[1:]) * rows.dtype.itemsize > LARGEST_PICTURE:
        raise DataError(
            f"{rows.name} claims {rows.shape}: an image has at most {LARGEST_PICTURE} bytes"
        )
    if rows.dtype.kind not in "biuf":
        raise DataError(f"{rows.name} holds {rows.dtype}, which is no number")
    classes = None if labels is None or config.labels is False else _labels(labels, rows)
    is_planar = _is_planar(rows.shape, config)

    def items() -> Iterator[Item]:
        number = 0
        for block in rows.blocks():
            for image in block:
                pixels = image[:, :, None] if image.ndim == 2 else image
                pixels = np.moveaxis(pixels, 0, 2) if is_planar else pixels
                label = None if classes is None else label_of(classes[number])
                yield loaded_item(f"{rows.name} number {number}", pixels, label)
                number += 1

    return Part(rows.shape[0], items)


def _is_planar(shape: tuple[int, ...], config: DataConfig) -> bool:
    """Whether channels come first, as torch has them: only where they fit there and not last."""
    return len(shape) == 4 and shape[3] != config.channels and shape[1] == config.channels


def _labels(labels: Rows, images: Rows) -> Pixels:
    if prod(labels.shape) != images.shape[0]:
        raise DataError(f"{labels.name} is {labels.shape}, and there are {images.shape[0]} images")
    return labels.whole().reshape(-1)
