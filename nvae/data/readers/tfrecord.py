"""TFRecords of tf.Example messages with `shape` and `data`, read without TensorFlow.

The record framing is that of TensorFlow's `record_writer.h`; the message is protocol buffers' wire
format, of which an Example needs three kinds: Features, a map entry, and a list. Own reader and
checksum: TensorFlow would be a heavy thing to install for one kind of file.
"""

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nvae.data.config import DataError
from nvae.data.decoding import LARGEST_PICTURE
from nvae.data.labels import Labeled
from nvae.data.pixels import BadImageError, Pixels
from nvae.data.readers import (
    TFRECORD_SUFFIXES,
    Item,
    MissingSourceError,
    Part,
    Reader,
    open_source,
    read_pieces,
    tfrecord_files,
)
from nvae.data.readers.splits import group_by_split
from nvae.settings import height_width

_LENGTH_BYTES, _CRC_BYTES = 8, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_SIDES = 8
_RESOLUTION = re.compile(r"-r(\d\d)[-.]")


def _read_header(file: BinaryIO, path: Path, number: int) -> int | None:
    """Length of the next record, None at the end of the file."""
    header = file.read(_LENGTH_BYTES + _CRC_BYTES)
    if not header:
        return None
    length = header[:_LENGTH_BYTES]
    if len(header) < _LENGTH_BYTES + _CRC_BYTES:
        raise DataError(f"{path} is cut short in record {number}")
    if masked_crc32c(length) != int.from_bytes(header[_LENGTH_BYTES:], "little"):
        raise DataError(f"{path} is damaged at record {number}: the length's checksum is wrong")
    return int.from_bytes(length, "little")


def count_records(path: Path) -> int:
    """Number of records, by their headers.

    Raises:
        DataError: The file is damaged or cut short.
    """
    number = 0
    with open_source(path) as file:
        size = os.fstat(file.fileno()).st_size
        while (length := _read_header(file, path, number)) is not None:
            if length > size or file.seek(length + _CRC_BYTES, 1) > size:
                raise DataError(f"{path} is cut short in record {number}")
            if length > LARGEST_PICTURE:
                raise DataError(f"{path} is refused: its record {number} has {length} bytes")
            number += 1
    return number


def read_records(path: Path) -> Iterator[tuple[bytes, int]]:
    """Every record with its stored (masked) checksum, which is left to the caller."""
    number = 0
    with open_source(path) as file:
        while (length := _read_header(file, path, number)) is not None:
            data, crc = read_pieces(file, min(length, LARGEST_PICTURE)), file.read(_CRC_BYTES)
            if len(data) < length or len(crc) < _CRC_BYTES:
                raise DataError(f"{path} is cut short in record {number}")
            yield data, int.from_bytes(crc, "little")
            number += 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise BadImageError("its tf.Example is malformed")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise BadImageError("its tf.Example is malformed")
        if at + length > len(data):
            raise BadImageError("its tf.Example is cut short")
        yield key >> 3, data[at : at + length]
        at += length


def _messages(data: bytes, number: int) -> Iterator[bytes]:
    for field, value in _fields(data):
        if field == number and isinstance(value, bytes):
            yield value


def _int64_list(data: bytes) -> list[int]:
    """Int64List, packed or not, as far as it can be the sides of a picture."""
    values: list[int] = []
    for _, value in _fields(data):
        if len(values) > _MOST_SIDES:
            break
        if isinstance(value, int):
            values.append(value)
            continue
        at = 0
        while at < len(value) and len(values) <= _MOST_SIDES:
            number, at = _varint(value, at)
            values.append(number)
    return values


def decode_example(record: bytes) -> Pixels:
    """The image of a tf.Example: `data` holds `shape` pixels, channels first or last.

    Returns:
        (H, W, C) uint8.

    Raises:
        BadImageError: Not a tf.Example, or features are missing or do not fit each other.
    """
    shape: list[int] = []
    data = b""
    for entry in (e for body in _messages(record, 1) for e in _messages(body, 1)):
        name = b"".join(_messages(entry, 1))
        # Feature: 1 = BytesList, 2 = FloatList (not used by pictures), 3 = Int64List.
        for feature in _messages(entry, 2):
            if name == b"data":
                for values in _messages(feature, 1):
                    data = next(_messages(values, 1), b"")
            elif name == b"shape":
                for values in _messages(feature, 3):
                    shape = _int64_list(values)
    if not shape or not data:
        raise BadImageError("its tf.Example lacks 'shape' or 'data'")
    if len(shape) != 3 or prod(shape) != len(data):
        raise BadImageError(f"its data has {len(data)} bytes, its shape is {shape}")
    pixels = np.frombuffer(data, np.uint8).reshape(shape)
    if shape[2] in (1, 3):
        return pixels
    if shape[0] in (1, 3):
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))
    raise BadImageError(f"its shape {shape} has neither 1 nor 3 channels")


def _part(paths: list[Path]) -> Part:
    def item(path: Path, number: int, data: bytes, crc: int) -> Item:
        def load() -> Labeled:
            if masked_crc32c(data) != crc:
                raise BadImageError("its checksum is wrong")
            return Labeled(decode_example(data))

        return Item(f"{path.name} record {number}", load)

    def items() -> Iterator[Item]:
        for path in paths:
            for number, (data, crc) in enumerate(read_records(path)):
                yield item(path, number, data, crc)

    return Part(sum(count_records(path) for path in paths), items)


def _at_resolution(paths: list[Path], size: int) -> list[Path]:
    """Of a pyramid of files (`-r08-` holds sides of 2^8), the wanted size or else the largest."""
    levels = {path: _RESOLUTION.search(path.name) for path in paths}
    if not all(levels.values()):
        return paths
    exponents = {path: int(match[1]) for path, match in levels.items() if match}
    wanted = size.bit_length() - 1
    chosen = wanted if wanted in exponents.values() else max(exponents.values())
    return [path for path in paths if exponents[path] == chosen]


class TFRecord(Reader):
    """All records below `source`; folders train and validation are the splits."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        source = self.source
        paths = tfrecord_files(source) if source.is_dir() else [source]
        paths = _at_resolution(paths, max(height_width(self.config.stored_size))) if paths else []
        if not paths or not paths[0].exists():
            raise MissingSourceError(f"no {' or '.join(TFRECORD_SUFFIXES)} files found in {source}")
        root = source if source.is_dir() else source.parent
        groups = group_by_split([path.relative_to(root).as_posix() for path in paths])
        return {split: _part([paths[i] for i in rows]) for split, rows in groups.items()}


# CRC-32C (Castagnoli, RFC 3720) in numpy. Where it starts at zero the checksum is linear over GF(2)
# in the message, so a message is cut into equal rows, the rows are summed in parallel, and the sums
# are folded in pairs: crc(a b) = shift(crc(a), |b|) xor crc(b).
_POLYNOMIAL = 0x82F63B78  # bit-reversed
_ROW_BYTES = 32
_MASK_DELTA = 0xA282EAD8

Words = NDArray[np.uint32]


@cache
def _byte_table() -> Words:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ _POLYNOMIAL, table >> 1).astype(np.uint32)
    return table


def _apply(tables: Words, crc: Words) -> Words:
    """Apply a linear map given as four tables of 256, one for each byte of the argument."""
    out: Words = tables[0][crc & 255]
    for byte in (1, 2, 3):
        out = out ^ tables[byte][(crc >> (8 * byte)) & 255]
    return out


@cache
def _shift_tables(zeros: int) -> Words:
    """Tables of the map "append `zeros` zero bytes"; `zeros` is `_ROW_BYTES` times a power of 2."""
    values = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    if zeros == _ROW_BYTES:
        out = values
        for _ in range(zeros):
            out = _byte_table()[out & 255] ^ (out >> 8)
        return out
    half = _shift_tables(zeros // 2)
    return _apply(half, half.ravel()).reshape(4, 256)


def crc32c(data: bytes) -> int:
    """The checksum of `data`."""
    table = _byte_table()
    if len(data) < 4:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = int(table[(crc ^ byte) & 255]) ^ (crc >> 8)
        return crc ^ 0xFFFFFFFF
    rows = 1 << ((len(data) - 1) // _ROW_BYTES).bit_length()
    padded = np.zeros(rows * _ROW_BYTES, dtype=np.uint8)
    # Zeros in front change nothing once the start value is folded into the message.
    head = len(padded) - len(data)
    padded[head:] = np.frombuffer(data, dtype=np.uint8)
    padded[head : head + 4] ^= 0xFF
    columns = np.ascontiguousarray(padded.reshape(rows, _ROW_BYTES).T)
    sums = np.zeros(rows, dtype=np.uint32)
    for column in columns:
        sums = table[(sums ^ column) & 255] ^ (sums >> 8)
    width = _ROW_BYTES
    while len(sums) > 1:
        sums = _apply(_shift_tables(width), sums[0::2]) ^ sums[1::2]
        width *= 2
    return int(sums[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The rotated form that TFRecords store."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF
