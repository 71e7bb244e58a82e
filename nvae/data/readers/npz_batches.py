"""The npz batches of the newer downsampled ImageNet (Chrabaszcz, Loshchilov and Hutter, 2017).

Own reader: numpy's would hold a batch of up to 1.6 GB in memory, whatever it claims.
"""

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import IO, Any

import numpy as np

from nvae.data.config import LARGEST_SIDE, TRAIN
from nvae.data.labels import label_of
from nvae.data.pixels import Pixels
from nvae.data.readers import (
    PIECE,
    Item,
    MissingSourceError,
    Part,
    Reader,
    damage_named,
    loaded_item,
    open_source,
    read_pieces,
)
from nvae.data.readers.pictures import open_member
from nvae.data.readers.splits import split_of_word
from nvae.data.store import read_header

_MOST_ROWS = 1024
_NPZ_MEMBER, _NPZ_LABELS = "data.npy", "labels.npy"


class Npz(Reader):
    """`train_data_batch_*.npz` and `val_data.npz` below `source`, in the order of their numbers,
    with their labels."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        groups: dict[str, list[Path]] = {}
        for path in sorted(self.source.rglob("*.npz"), key=_natural):
            split = split_of_word(path.name)
            if split is not None:
                groups.setdefault(split, []).append(path)
        if TRAIN not in groups:
            raise MissingSourceError(f"train_data_batch_*.npz not found in {self.source}")
        return {split: _npz_part(paths) for split, paths in groups.items()}


def _natural(path: Path) -> tuple[int, str]:
    """Batch 10 comes after batch 9."""
    digits = path.stem.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else 0, path.name)


def _npz_part(paths: list[Path]) -> Part:
    def items() -> Iterator[Item]:
        for path in paths:
            labels = _npz_labels(path)
            for i, image in enumerate(_npz_images(path)):
                label = label_of(labels[i]) if i < len(labels) else None
                yield loaded_item(f"{path.name} number {i}", image, label)

    count = 0
    for path in paths:
        with _open_npz(path) as (_, rows, _):
            count += rows
    return Part(count, items)


def _npz_images(path: Path) -> Iterator[Pixels]:
    """One after another, (side, side, 3)."""
    with _open_npz(path) as (file, count, side):
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
def _open_npz(path: Path) -> Iterator[tuple[IO[bytes], int, int]]:
    """The rows of `data` in a batch, as a file to be read in pieces, their number and side.

    The header is held against the size that the archive states, and that against what is there.

    Raises:
        DataError: Damaged, or not a batch.
    """
    with damage_named(path), open_source(path) as raw, zipfile.ZipFile(raw) as archive:
        member = archive.getinfo(_NPZ_MEMBER)
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


def _npz_labels(path: Path) -> Pixels:
    """`labels` of a batch, (N,); empty where it has none that fit."""
    with damage_named(path), open_source(path) as raw, zipfile.ZipFile(raw) as archive:
        if _NPZ_LABELS not in archive.namelist():
            return np.empty(0, np.int64)
        member = archive.getinfo(_NPZ_LABELS)
        with open_member(archive, member) as file:
            data = read_pieces(file, member.file_size)
        header = read_header(io.BytesIO(data))
        if len(header.shape) != 1 or header.bytes != len(data):
            return np.empty(0, np.int64)
        return np.frombuffer(data, header.dtype, offset=header.offset)
