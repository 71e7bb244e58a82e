"""The npz batches of the newer downsampled ImageNet (Chrabaszcz, Loshchilov and Hutter, 2017).

Own reader of rows: numpy's would hold a batch of up to 1.6 GB in memory, whatever it claims.
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import IO

import numpy as np

from nvae.data.config import LARGEST_SIDE, DataConfig, DataError
from nvae.data.readers import (
    PIECE,
    Item,
    MissingSourceError,
    Part,
    Pixels,
    loaded_item,
    open_source,
    read_pieces,
    split_of_word,
)
from nvae.data.readers.pictures import open_member
from nvae.data.splits import TRAIN
from nvae.data.store import read_header

_MOST_ROWS = 1024
_MEMBER = "data.npy"


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


def _natural(path: Path) -> tuple[int, str]:
    """Batch 10 comes after batch 9."""
    digits = path.stem.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else 0, path.name)


def _part(paths: list[Path]) -> Part:
    def items() -> Iterator[Item]:
        for path in paths:
            for i, image in enumerate(_images(path)):
                yield loaded_item(f"{path.name} number {i}", image)

    count = 0
    for path in paths:
        with _opened(path) as (_, rows, _):
            count += rows
    return Part(count, items)


def _images(path: Path) -> Iterator[Pixels]:
    """One after another, (side, side, 3)."""
    with _opened(path) as (file, count, side):
        width = 3 * side * side
        rows = max(1, min(_MOST_ROWS, PIECE // width))
        for start in range(0, count, rows):
            wanted = min(rows, count - start)
            data = read_pieces(file, wanted * width)
            if len(data) != wanted * width:
                raise ValueError("it is cut short")
            planes = np.frombuffer(data, np.uint8).reshape(wanted, 3, side, side)
            yield from planes.transpose(0, 2, 3, 1)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int, int]]:
    """The rows of `data` in a batch, as a file to be read in pieces, their number and side.

    The header is held against the size that the archive states, and that against what is there.

    Raises:
        DataError: Damaged, or not a batch.
    """
    try:
        with open_source(path) as raw, zipfile.ZipFile(raw) as archive:
            member = archive.getinfo(_MEMBER)
            with open_member(archive, member) as file:
                header = read_header(file, ("|u1",))
            width = header.shape[1] if len(header.shape) == 2 else 0
            side = isqrt(width // 3)
            if not side or side * side * 3 != width or side > LARGEST_SIDE:
                raise ValueError(f"data must be (N, 3 * side * side) uint8, not {header.shape}")
            if header.bytes != member.file_size:
                raise ValueError(
                    f"its header says {header.bytes} bytes, the archive {member.file_size}"
                )
            with open_member(archive, member) as file:
                read_pieces(file, header.offset)
                yield file, header.shape[0], side
    except DataError:
        raise
    # zipfile and zlib raise nearly anything on damaged files.
    except Exception as error:
        raise DataError(f"{path} is damaged: {error}") from error
