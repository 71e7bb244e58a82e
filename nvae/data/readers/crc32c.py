"""CRC-32C (Castagnoli), the checksum of TFRecords, in numpy.

The checksum is linear over GF(2) in the message when it starts at zero, so a message is cut into
equal rows, the rows are summed in parallel, and the sums are folded in pairs: crc(a b) =
shift(crc(a), |b|) xor crc(b).
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # RFC 3720, bit-reversed
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
    message = np.frombuffer(data, dtype=np.uint8)
    # Zeros in front change nothing once the start value is folded into the message.
    start = np.full(4, 0xFF, dtype=np.uint8)
    rows = 1
    while rows * _ROW_BYTES < max(len(message), 4):
        rows *= 2
    padded = np.zeros(rows * _ROW_BYTES, dtype=np.uint8)
    padded[len(padded) - len(message) :] = message
    if len(message) < 4:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = int(_byte_table()[(crc ^ byte) & 255]) ^ (crc >> 8)
        return crc ^ 0xFFFFFFFF
    head = len(padded) - len(message)
    padded[head : head + 4] ^= start
    columns = np.ascontiguousarray(padded.reshape(rows, _ROW_BYTES).T)
    table = _byte_table()
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
