"""LMDB databases: LSUN as distributed, and the layout that users of the reference have."""

from collections.abc import Callable, Iterator
from functools import partial
from math import isqrt
from pathlib import Path

import numpy as np

from nvae.data.config import DataConfig
from nvae.data.images import BadImageError
from nvae.data.manifest import DataError
from nvae.data.readers.lmdb_pages import LmdbFile
from nvae.data.readers.source import Item, MissingSourceError, Part, Pixels
from nvae.data.tables import TRAIN, VALID

_ENCODED = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")
REFERENCE_NAMES = {TRAIN: "train.lmdb", VALID: "validation.lmdb"}


def _data_file(path: Path) -> Path:
    return path / "data.mdb" if path.is_dir() else path


def decode_raw(value: bytes) -> Pixels | bytes:
    """A value of the reference's layout: an encoded picture as it is, or square raw RGB pixels.

    Raises:
        BadImageError: Neither.
    """
    if value.startswith(_ENCODED):
        return value
    side = isqrt(len(value) // 3)
    if not value or side * side * 3 != len(value):
        raise BadImageError(f"its {len(value)} bytes are neither a picture nor a square of RGB")
    return np.frombuffer(value, dtype=np.uint8).reshape(side, side, 3)


def _reference_part(path: Path) -> Part:
    file = LmdbFile(_data_file(path))

    # Values are read when they are decoded: many entries may point to one large value.
    def loader(node: int) -> Callable[[], Pixels | bytes]:
        return lambda: decode_raw(file.value(node))

    def items() -> Iterator[Item]:
        for i in range(len(file)):
            node = file.find(str(i).encode())
            if node is None:
                raise DataError(
                    f"{path} has {len(file)} entries but no key {str(i)!r}: keys must be "
                    f"'0' to '{len(file) - 1}'"
                )
            yield Item(f"{path.name} key {i}", loader(node))

    return Part(len(file), items)


def read_reference_lmdb(source: Path, config: DataConfig) -> dict[str, Part]:
    """`train.lmdb` and `validation.lmdb` with keys "0", "1", ... and raw RGB or encoded values."""
    del config
    paths = {split: source / name for split, name in REFERENCE_NAMES.items()}
    if not _data_file(paths[TRAIN]).exists():
        raise MissingSourceError(f"{REFERENCE_NAMES[TRAIN]} not found in {source}")
    return {
        split: _reference_part(path) for split, path in paths.items() if _data_file(path).exists()
    }


def _lsun_part(path: Path) -> Part:
    file = LmdbFile(_data_file(path))

    def items() -> Iterator[Item]:
        for key, node in file.items():
            name = key.decode("ascii", "replace")
            yield Item(f"{path.name} key {name}", partial(file.value, node))

    return Part(len(file), items)


def read_lsun(source: Path, config: DataConfig) -> dict[str, Part]:
    """`CATEGORY_train_lmdb` and `CATEGORY_val_lmdb` of one category, in the order of their keys."""
    del config
    found = {
        split: sorted(path for path in source.glob(pattern) if _data_file(path).exists())
        for split, pattern in ((TRAIN, "*_train_lmdb"), (VALID, "*_val_lmdb"))
    }
    if not found[TRAIN]:
        raise MissingSourceError(f"CATEGORY_train_lmdb not found in {source}")
    if len(found[TRAIN]) > 1 or len(found[VALID]) > 1:
        names = ", ".join(path.name for path in found[TRAIN])
        raise DataError(f"{source} holds several categories ({names}): keep one in a folder")
    return {split: _lsun_part(paths[0]) for split, paths in found.items() if paths}
