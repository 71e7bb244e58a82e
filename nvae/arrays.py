"""Arrays in an npz file, read with a bound on what they may cost.

NumPy's own reader believes the sizes that a file states: a few bytes can ask for terabytes.
"""

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

LARGEST = 1 << 34
"""Bytes of all arrays of a file; features of a million images have 8 GiB."""

_DAMAGED = (
    *(ValueError, KeyError, EOFError, OverflowError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


def read_arrays(path: str | Path, largest: int = LARGEST) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file by name: numbers and text, never objects; checksums are checked.

    Raises:
        ValueError: no regular file, no npz file, damaged, or more than ``largest`` bytes, inflated.
        OSError: it cannot be read.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > largest:
                raise ValueError(f"it holds more than {largest} bytes")
            return {
                member.filename.removesuffix(".npy"): _read(archive, member)
                for member in archive.infolist()
            }
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged or no npz file: {error}") from None


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        shape, order, dtype = _header(file)
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{member.filename} is not as large as it says")
        array: NDArray[Any] = np.empty(shape, dtype, order)
        flat: Any = array.reshape(-1, order="A")
        content = flat.view(np.uint8) if array.size else bytearray()
        read = cast(io.BufferedIOBase, file).readinto(content)
        # one byte more than there is: the checksum is compared at the end of the file only
        if read != len(content) or file.read(1):
            raise ValueError(f"{member.filename} is cut short")
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], Any, np.dtype[Any]]:
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array has another format than 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"an array holds {dtype}")
    return shape, "F" if fortran else "C", dtype
