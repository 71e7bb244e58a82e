"""Headers of numpy's array files, read without believing them."""

import ast
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvae.files import open_regular

LONGEST_HEADER = 1 << 14
"""Bytes; numpy itself reads up to 4 GiB before it looks at them."""

_MAGIC = b"\x93NUMPY"


class Header(NamedTuple):
    """What an array file says of itself.

    Attributes:
        shape: of the array.
        dtype: numpy's name of its type, such as ``|u1``.
        offset: of the first element, in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def bytes(self) -> int:
        """Size that the file must have, header included."""
        return self.offset + prod(self.shape) * np.dtype(self.dtype).itemsize


def parse_header(start: bytes, allowed: tuple[str, ...]) -> Header:
    """The header of an array in C order.

    Args:
        start: the file's first bytes, up to `LONGEST_HEADER`.
        allowed: types that the array may have; objects are never among them.

    Raises:
        ValueError: no header, longer than `LONGEST_HEADER`, or of another type or order.
    """
    if start[:6] != _MAGIC or len(start) < 12 or start[6] not in (1, 2, 3):
        raise ValueError("it is no .npy file")
    begin = 10 if start[6] == 1 else 12
    end = begin + int.from_bytes(start[8:begin], "little")
    if end > len(start):
        raise ValueError("its header is cut short or too long")
    try:
        content = ast.literal_eval(start[begin:end].decode("latin1").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise ValueError("its header cannot be read") from None
    if not isinstance(content, dict) or content.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header cannot be read")
    shape, dtype = content["shape"], content["descr"]
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("the shape in its header is none")
    if dtype not in allowed or content["fortran_order"] is not False:
        raise ValueError(f"it holds {dtype!r}, not {' or '.join(allowed)}, or not in C order")
    return Header(shape, dtype, end)


def read_header(file: BinaryIO, allowed: tuple[str, ...]) -> Header:
    """As :func:`parse_header`, from an open file, which is left somewhere behind it."""
    return parse_header(file.read(LONGEST_HEADER), allowed)


def map_array(path: Path, dtype: str) -> NDArray[np.generic]:
    """An array file mapped from disk, copy-on-write, once its size is what its header says.

    Raises:
        ValueError: it is not such an array.
        OSError: it is not there or cannot be read.
    """
    with open_regular(path) as file:
        header = read_header(file, (dtype,))
        size = file.seek(0, 2)
        if size != header.bytes:
            raise ValueError(f"its header says {header.bytes} bytes, it has {size}")
        if not prod(header.shape):
            return np.zeros(header.shape, header.dtype)
        return np.memmap(file, header.dtype, "c", header.offset, header.shape)
