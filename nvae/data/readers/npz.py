"""The npz batches of the newer downsampled ImageNet (Chrabaszcz, Loshchilov and Hutter, 2017)."""

import zipfile
import zlib
from collections.abc import Iterator
from math import isqrt
from pathlib import Path

import numpy as np

from nvae.data.config import DataConfig
from nvae.data.manifest import DataError
from nvae.data.readers.source import Item, MissingSourceError, Part, Pixels, constant, split_of_word
from nvae.data.tables import TRAIN

_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def _count(path: Path) -> int:
    """Rows of `data`, from its header alone: a batch takes up to 1.6 GB."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("data.npy") as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    except _ERRORS as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if dtype != np.uint8 or len(shape) != 2 or isqrt(shape[1] // 3) ** 2 * 3 != shape[1]:
        raise DataError(f"{path}: data must be (N, 3 * side * side) uint8, not {shape} {dtype}")
    return int(shape[0])


def _images(path: Path) -> Pixels:
    try:
        with np.load(path, allow_pickle=False) as content:
            planes = content["data"]
    except _ERRORS as error:
        raise DataError(f"{path} is damaged: {error}") from error
    side = isqrt(planes.shape[1] // 3)
    images: Pixels = planes.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    return images


def _natural(path: Path) -> tuple[int, str]:
    """Batch 10 comes after batch 9."""
    digits = path.stem.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else 0, path.name)


def _part(paths: list[Path]) -> Part:
    def items() -> Iterator[Item]:
        for path in paths:
            for i, image in enumerate(_images(path)):
                yield Item(f"{path.name} number {i}", constant(image))

    return Part(sum(_count(path) for path in paths), items)


def read_npz(source: Path, config: DataConfig) -> dict[str, Part]:
    """`train_data_batch_*.npz` and `val_data.npz` below `source`, in the order of their numbers."""
    del config
    groups: dict[str, list[Path]] = {}
    for path in sorted(source.rglob("*.npz"), key=_natural):
        split = split_of_word(path.name)
        if split is not None:
            groups.setdefault(split, []).append(path)
    if TRAIN not in groups:
        raise MissingSourceError(f"train_data_batch_*.npz not found in {source}")
    return {split: _part(paths) for split, paths in groups.items()}
