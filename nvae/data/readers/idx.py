"""IDX files, as MNIST and Fashion-MNIST are distributed, plain or gzipped."""

import gzip
import os
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch

from nvae.data.config import DataConfig
from nvae.data.images import BadImageError, check_sides
from nvae.data.manifest import DataError
from nvae.data.readers.source import (
    Item,
    Part,
    Pixels,
    array_part,
    constant,
    find_files,
    open_source,
    read_pieces,
    unpacked_limit,
)
from nvae.data.tables import TEST, TRAIN
from nvae.random import STREAM_CONTENT, image_keys

_FILES = {TRAIN: "train-images-idx3-ubyte", TEST: "t10k-images-idx3-ubyte"}
_MAGIC = b"\x00\x00\x08\x03"
_HEADER_BYTES = 16
_CHUNK = 4096


def read_idx_images(path: Path) -> Pixels:
    """Images of an IDX file, (N, H, W, 1) uint8: mapped, or unpacked in memory.

    Raises:
        DataError: Wrong magic, cut short, longer than its header says, or claiming what no file of
            its size can hold.
    """
    try:
        with open_source(path) as raw:
            size = os.fstat(raw.fileno()).st_size
            if path.suffix == ".gz":
                with gzip.open(raw) as file:
                    return _unpack(cast(IO[bytes], file), path, size)
            shape = _read_header(raw, path)
            if prod(shape) != size - _HEADER_BYTES:
                raise DataError(
                    f"{path} is damaged: {_claim(shape)}, it has {_amount(size, shape)}"
                )
            return np.memmap(raw, np.uint8, "r", _HEADER_BYTES, shape)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _unpack(file: IO[bytes], path: Path, packed: int) -> Pixels:
    shape = _read_header(file, path)
    if prod(shape) > unpacked_limit(packed):
        raise DataError(
            f"{path} is refused: {_claim(shape)}, of {packed} packed ones; if that is right, "
            "unpack it first"
        )
    # One byte more than the header promises shows a file that is too long.
    data = read_pieces(file, prod(shape) + 1)
    if len(data) != prod(shape):
        raise DataError(
            f"{path} is damaged: {_claim(shape)}, it has "
            f"{_amount(len(data) + _HEADER_BYTES, shape)}"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _claim(shape: tuple[int, ...]) -> str:
    count, height, width = shape[:3]
    return f"its header says {count} images of {height}x{width} = {prod(shape)} bytes"


def _amount(size: int, shape: tuple[int, ...]) -> str:
    have = size - _HEADER_BYTES
    return "more" if have > prod(shape) else str(have)


def _read_header(file: IO[bytes], path: Path) -> tuple[int, int, int, int]:
    """(N, H, W, 1)."""
    header = file.read(_HEADER_BYTES)
    if header[:4] != _MAGIC or len(header) < _HEADER_BYTES:
        raise DataError(
            f"{path} is not an IDX file of uint8 images (it starts with "
            f"{header[:4].hex(' ') or 'nothing'}, not {_MAGIC.hex(' ')})"
        )
    count, height, width = (int.from_bytes(header[i : i + 4]) for i in (4, 8, 12))
    try:
        check_sides(width, height)
    except BadImageError as error:
        raise DataError(f"{path} is damaged: a picture in it is no picture: {error}") from error
    if not count:
        raise DataError(f"{path} is damaged: it holds no images")
    return count, height, width, 1


def _locate(source: Path, split: str) -> Path:
    name = _FILES[split]
    dotted = name.replace("-idx", ".idx")
    return find_files(source, (name, f"{name}.gz", dotted, f"{dotted}.gz"))


def read_idx(source: Path, config: DataConfig) -> dict[str, Part]:
    """The training and test images below `source`."""
    del config
    paths = {split: _locate(source, split) for split in _FILES}
    return {split: array_part(read_idx_images(path), path.name) for split, path in paths.items()}


def _stacked_part(images: Pixels, count: int, seed: int, name: str) -> Part:
    """`count` colour images whose channels are three images drawn at random (with replacement)."""

    def items() -> Iterator[Item]:
        for start in range(0, count, _CHUNK):
            index = torch.arange(3 * start, 3 * min(start + _CHUNK, count))
            keys = image_keys(index, seed=seed, epoch=0, stream=STREAM_CONTENT)
            triples = (keys.numpy().view(np.uint64) % len(images)).reshape(-1, 3)
            for i, triple in enumerate(triples, start):
                image = np.ascontiguousarray(images[triple, :, :, 0].transpose(1, 2, 0))
                yield Item(f"{name} stack {i}", constant(image))

    return Part(count, items)


def read_stacked_idx(source: Path, config: DataConfig) -> dict[str, Part]:
    """Stacked MNIST: three random digits as red, green and blue; 1000 modes.

    Training and validation stacks are made of training digits, test stacks of test digits. The
    config says how many, and `split_seed` which.
    """
    if config.train_size is None or config.test_size is None:
        raise DataError("stacked images need data.train_size and data.test_size")
    counts = {TRAIN: config.train_size + (config.valid_size or 0), TEST: config.test_size}
    return {
        split: _stacked_part(
            read_idx_images(_locate(source, split)), count, config.split_seed, split
        )
        for split, count in counts.items()
        if count
    }
