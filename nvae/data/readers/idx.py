"""IDX files, as MNIST and Fashion-MNIST are distributed, plain or gzipped."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from nvae.counter_rng import STREAM_CONTENT, image_keys
from nvae.data.config import DataConfig
from nvae.data.manifest import DataError
from nvae.data.readers.source import Item, Part, Pixels, array_part, constant, find_files
from nvae.data.tables import TEST, TRAIN

_FILES = {TRAIN: "train-images-idx3-ubyte", TEST: "t10k-images-idx3-ubyte"}
_MAGIC = b"\x00\x00\x08\x03"
_HEADER_BYTES = 16
_PIECE_BYTES = 1 << 24


def _read_at_most(file: BinaryIO | gzip.GzipFile, size: int) -> bytes:
    """Read piece by piece: a header that promises too much must cost no memory."""
    pieces: list[bytes] = []
    while size and (piece := file.read(min(size, _PIECE_BYTES))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def read_idx_images(path: Path) -> Pixels:
    """Images of an IDX file, (N, H, W, 1) uint8.

    Raises:
        DataError: Wrong magic, cut short, or longer than its header says.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
            if header[:4] != _MAGIC or len(header) < _HEADER_BYTES:
                raise DataError(
                    f"{path} is not an IDX file of uint8 images (it starts with "
                    f"{header[:4].hex(' ') or 'nothing'}, not {_MAGIC.hex(' ')})"
                )
            count, height, width = (int.from_bytes(header[i : i + 4]) for i in (4, 8, 12))
            size = count * height * width
            # One byte more than the header promises shows a file that is too long.
            data = _read_at_most(file, size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if len(data) != size:
        have = "more" if len(data) > size else str(len(data))
        raise DataError(
            f"{path} is damaged: its header says {count} images of {height}x{width} = {size} "
            f"bytes, it has {have}"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(count, height, width, 1)


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
    keys = image_keys(torch.arange(3 * count), seed=seed, epoch=0, stream=STREAM_CONTENT)
    rows = (keys.numpy().view(np.uint64) % len(images)).reshape(count, 3)

    def items() -> Iterator[Item]:
        for i, triple in enumerate(rows):
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
