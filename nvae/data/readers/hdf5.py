"""Arrays in HDF5 files and Zarr stores, by the optional packages `h5py` and `zarr`.

Their libraries unpack chunk by chunk. What a file says of shapes, chunks and where its numbers lie
is checked first: nothing outside of the file is read, and no codec runs that could run code.
"""

import importlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvae.data.config import DataError
from nvae.data.decoding import LARGEST_PICTURE
from nvae.data.readers import damage_named, open_source, unpacked_limit
from nvae.data.readers.rows import Rows

_MOST_ARRAYS = 1000
_ZARR_CODECS = (
    *("BytesCodec", "TransposeCodec", "GzipCodec", "ZstdCodec", "BloscCodec", "Crc32cCodec"),
    *("Zlib", "GZip", "BZ2", "LZMA", "Zstd", "Blosc", "LZ4", "Delta", "Shuffle", "CRC32"),
    *("Adler32", "BitRound", "FixedScaleOffset"),
)
"""Classes that turn bytes into numbers; `pickle` and what else is registered is refused."""


def hdf5_arrays(path: Path) -> dict[str, Rows]:
    """The arrays of an HDF5 file, by their paths in it."""
    h5py = _needed("h5py", path)
    with open_source(path):  # a pipe would be waited for
        pass
    found: dict[str, Rows] = {}
    with damage_named(path), h5py.File(path, "r") as file:
        names: list[str] = []

        def note(name: str) -> None:
            names.append(name)
            if len(names) > _MOST_ARRAYS:
                raise ValueError(f"it holds more than {_MOST_ARRAYS} things")

        file.visit(note)  # which follows no links, that could lead into other files
        for name in names:
            array = file[name]
            if isinstance(array, h5py.Dataset) and array.shape:
                found[name] = _hdf5_rows(h5py, path, name, array)
    return found


def _hdf5_rows(h5py: ModuleType, path: Path, name: str, array: Any) -> Rows:
    label = f"{path.name}/{name}"
    is_text = h5py.check_string_dtype(array.dtype) is not None
    if array.external or array.is_virtual:
        raise DataError(f"{label} is refused: its numbers lie outside of the file")
    stored = array.id.get_storage_size()
    _check(label, array.shape, array.dtype, array.chunks, stored)

    def blocks() -> Iterator[NDArray[Any]]:
        with damage_named(label), h5py.File(path, "r") as file:
            here = file[name].asstr() if is_text else file[name]
            for start in range(0, rows.shape[0], rows.step):
                yield np.asarray(here[start : start + rows.step])

    rows = Rows(label, array.shape, np.dtype(object) if is_text else array.dtype, blocks)
    return rows


def zarr_arrays(path: Path) -> dict[str, Rows]:
    """The arrays of a Zarr store, a folder, by their paths in it."""
    zarr = _needed("zarr", path)
    if not path.is_dir():
        raise DataError(f"{path} is no Zarr store, which is a folder")
    with damage_named(path):
        opened = zarr.open(str(path), mode="r")
        if isinstance(opened, zarr.Array):
            return {"": _zarr_rows(path, "", opened)}
        members = dict(opened.members(max_depth=8))
        arrays = {name: each for name, each in members.items() if isinstance(each, zarr.Array)}
        return {name: _zarr_rows(path, name, each) for name, each in arrays.items() if each.shape}


def _zarr_rows(path: Path, name: str, array: Any) -> Rows:
    label = f"{path.name}/{name}".removesuffix("/")
    codecs = _codecs(array.metadata)
    if unknown := sorted({type(codec).__name__ for codec in codecs} - set(_ZARR_CODECS)):
        raise DataError(f"{label} is refused: it is packed by {', '.join(unknown)}")
    stored = array.nbytes_stored
    stored = stored() if callable(stored) else stored
    _check(label, array.shape, array.dtype, array.chunks, stored)

    def blocks() -> Iterator[NDArray[Any]]:
        with damage_named(label):
            for start in range(0, rows.shape[0], rows.step):
                yield np.asarray(array[start : start + rows.step])

    rows = Rows(label, array.shape, np.dtype(array.dtype), blocks)
    return rows


def _codecs(metadata: Any) -> list[Any]:
    if metadata.zarr_format == 2:
        given = (metadata.compressor, *(metadata.filters or ()))
        return [codec for codec in given if codec is not None]
    found, pending = [], list(metadata.codecs)
    while pending:
        codec = pending.pop()
        if type(codec).__name__ == "ShardingCodec":
            pending += [*codec.codecs, *codec.index_codecs]
        else:
            found.append(codec)
    return found


def _check(
    name: str, shape: tuple[int, ...], dtype: Any, chunks: tuple[int, ...] | None, stored: int
) -> None:
    """Raise a DataError where an array claims more than is there, or has chunks too large."""
    size = np.dtype(dtype).itemsize
    if prod(shape) * size > unpacked_limit(stored):
        raise DataError(f"{name} is refused: it claims {shape}, and {stored} bytes are there")
    if chunks is not None and prod(chunks) * size > LARGEST_PICTURE:
        raise DataError(f"{name} is refused: its chunks of {chunks} are too large")


def _needed(package: str, path: Path) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise DataError(f"{path.name} needs {package}: pip install 'nvae[formats]'") from None
