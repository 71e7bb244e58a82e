"""LMDB databases: LSUN as distributed, and the layout that other NVAE code uses.

Own reader of pages, every position checked: the C library takes what a page says for granted, so
that a damaged file ends the process, or never ends. The layout is that of LMDB 0.9 on 64-bit
little-endian machines: pages of equal size, each with a header of 16 bytes; two meta pages, of
which the one of the later transaction counts; a B+ tree of branch and leaf pages whose nodes are
found through 16-bit offsets; long values on pages of their own.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvae.data.config import TRAIN, VALID, DataError
from nvae.data.decoding import LARGEST_PICTURE
from nvae.data.labels import Labeled
from nvae.data.pixels import BadImageError, Pixels
from nvae.data.readers import (
    REFERENCE_LMDBS,
    Item,
    MissingSourceError,
    Part,
    Reader,
    open_source,
)

_ENCODED = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")


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
    def load(node: int) -> Labeled:
        return Labeled(decode_raw(file.value(node)))

    def items() -> Iterator[Item]:
        # LMDB sorts keys as text, 10 before 2. No number has a longer key, and a damaged page could
        # hold many that are very long.
        nodes = {key: node for key, node in file.items() if len(key) < 20}
        for i in range(len(file)):
            node = nodes.get(str(i).encode())
            if node is None:
                raise DataError(
                    f"{path} has {len(file)} entries but no key {str(i)!r}: keys must be "
                    f"'0' to '{len(file) - 1}'"
                )
            yield Item(f"{path.name} key {i}", partial(load, node))

    return Part(len(file), items)


class ReferenceLmdb(Reader):
    """`train.lmdb` and `validation.lmdb` with keys "0", "1", ... and raw RGB or encoded values."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        paths = {split: self.source / name for split, name in REFERENCE_LMDBS.items()}
        if not _data_file(paths[TRAIN]).exists():
            raise MissingSourceError(f"{REFERENCE_LMDBS[TRAIN]} not found in {self.source}")
        there = {split: path for split, path in paths.items() if _data_file(path).exists()}
        return {split: _reference_part(path) for split, path in there.items()}


def _lsun_part(path: Path) -> Part:
    file = LmdbFile(_data_file(path))

    def load(node: int) -> Labeled:
        return Labeled(file.value(node))

    def items() -> Iterator[Item]:
        for key, node in file.items():
            name = key.decode("ascii", "replace")
            yield Item(f"{path.name} key {name}", partial(load, node))

    return Part(len(file), items)


class Lsun(Reader):
    """`CATEGORY_train_lmdb` and `CATEGORY_val_lmdb` of one category, in the order of their keys."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        source = self.source
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


_MAGIC, _VERSION = 0xBEEFC0DE, 1
_PAGE = struct.Struct("<QHHHH")  # number, padding, kind, lower, upper
_META = struct.Struct("<IIQQ")  # magic, version, address, map size
_TREE = struct.Struct("<IHHQQQQQ")  # page size, flags, depth, pages of three kinds, entries, root
_ENDS = struct.Struct("<QQ")  # last page, transaction
_NODE = struct.Struct("<HHHH")  # low and high word of a size or page, flags, length of the key
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_LONG_VALUE = 1
_EMPTY = (1 << 64) - 1
_DEEPEST = 32
_SMALLEST_ENTRY = 10


class _Meta(NamedTuple):
    page_size: int
    entries: int
    root: int
    last_page: int
    transaction: int


class LmdbFile:
    """An LMDB's main tree, mapped for reading; without locks, for it may be on a read-only disk.

    Args:
        path: of the data file.

    Raises:
        DataError: It is no LMDB, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_source(path) as file:
            try:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (ValueError, OSError) as error:
                raise DataError(f"{path} cannot be opened as LMDB: {error}") from error
        first = self._meta(0)
        if first is None:
            raise DataError(f"{path} cannot be opened as LMDB: it does not start as one")
        metas = [meta for meta in (first, self._meta(first.page_size)) if meta is not None]
        self._now = max(metas, key=lambda meta: meta.transaction)
        wanted = (self._now.last_page + 1) * self._now.page_size
        if len(self._data) < wanted:
            raise DataError(
                f"{path} is cut short: it has {len(self._data)} bytes instead of {wanted}"
            )
        if self._now.entries * _SMALLEST_ENTRY > len(self._data):
            raise self._damage(f"it claims {self._now.entries} entries")

    def __len__(self) -> int:
        return self._now.entries

    def _damage(self, what: str) -> DataError:
        return DataError(f"{self._path} is damaged: {what}")

    def _meta(self, start: int) -> _Meta | None:
        at = start + _PAGE.size
        if len(self._data) < at + _META.size + 2 * _TREE.size + _ENDS.size:
            return None
        magic, version, _, _ = _META.unpack_from(self._data, at)
        at += _META.size
        page_size = _TREE.unpack_from(self._data, at)[0]
        *_, entries, root = _TREE.unpack_from(self._data, at + _TREE.size)
        last, transaction = _ENDS.unpack_from(self._data, at + 2 * _TREE.size)
        sizes = [1 << bits for bits in range(9, 17)]
        if (magic, version) != (_MAGIC, _VERSION) or page_size not in sizes:
            return None
        return _Meta(page_size, entries, root, last, transaction)

    def _start(self, number: int) -> tuple[int, int, int]:
        """(position, kind, lower) of a page."""
        if number > self._now.last_page:
            raise self._damage(f"it names page {number}, which is not there")
        start = number * self._now.page_size
        found, _, kind, lower, upper = _PAGE.unpack_from(self._data, start)
        if found != number:
            raise self._damage(f"page {number} is another")
        return start, kind, lower if kind != _OVERFLOW else lower | upper << 16

    def _nodes(self, number: int) -> tuple[int, list[int]]:
        """(kind, positions of the nodes) of a branch or leaf page."""
        start, kind, lower = self._start(number)
        count, size = (lower - _PAGE.size) // 2, self._now.page_size
        if kind not in (_BRANCH, _LEAF) or not 0 <= count <= (size - _PAGE.size) // 2:
            raise self._damage(f"page {number} holds no entries that can be read")
        offsets = struct.unpack_from(f"<{count}H", self._data, start + _PAGE.size)
        if any(offset > size - _NODE.size for offset in offsets):
            raise self._damage(f"page {number} holds no entries that can be read")
        return kind, [start + offset for offset in offsets]

    def _key(self, node: int) -> bytes:
        length = _NODE.unpack_from(self._data, node)[3]
        return self._data[node + _NODE.size : node + _NODE.size + length]

    def _child(self, node: int) -> int:
        low, high, top, _ = _NODE.unpack_from(self._data, node)
        return int(low | high << 16 | top << 32)

    def value(self, node: int) -> bytes:
        """The value at a node's position.

        Raises:
            DataError: It is damaged.
        """
        low, high, flags, length = _NODE.unpack_from(self._data, node)
        size, at = low | high << 16, node + _NODE.size + length
        if flags == _LONG_VALUE:
            if at + 8 > len(self._data):
                raise self._damage("a value is cut short")
            start, kind, pages = self._start(int.from_bytes(self._data[at : at + 8], "little"))
            if kind != _OVERFLOW or size > pages * self._now.page_size - _PAGE.size:
                raise self._damage("a value is cut short")
            at = start + _PAGE.size
        elif flags:
            raise self._damage("a value is of a kind that picture data does not have")
        if size > LARGEST_PICTURE or at + size > len(self._data):
            raise self._damage("a value is cut short")
        return self._data[at : at + size]

    def items(self) -> Iterator[tuple[bytes, int]]:
        """All keys with the positions of their nodes, in the order of the keys.

        Raises:
            DataError: It is damaged.
        """
        given = 0
        pending = [] if self._now.root == _EMPTY else [(self._now.root, 1)]
        while pending:
            number, depth = pending.pop()
            kind, nodes = self._nodes(number)
            if kind == _BRANCH:
                if depth == _DEEPEST:
                    raise self._damage("its pages lead round in a circle")
                pending += [(self._child(node), depth + 1) for node in reversed(nodes)]
                continue
            given += len(nodes)
            if given > len(self):
                raise self._damage(f"it holds more than the {len(self)} entries that it claims")
            for node in nodes:
                yield self._key(node), node
        if given < len(self):
            raise self._damage(f"it holds {given} entries instead of {len(self)}")
