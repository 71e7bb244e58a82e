"""The classic small sets in their own formats: MNIST's IDX files, CIFAR-10's pickles, Omniglot's
MATLAB file.

Own readers, because torchvision's run what a pickle says, read whole files before they look at
them, want their own folders, and know Omniglot at another size only.
"""

import gzip
import io
import os
import pickle
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import torch

from nvae.counter_rng import STREAM_CONTENT, image_keys
from nvae.data.config import DataConfig, DataError
from nvae.data.readers import (
    Item,
    MissingSourceError,
    Part,
    Pixels,
    array_part,
    find_files,
    loaded_item,
    open_source,
    read_pieces,
    read_whole,
    unpacked_limit,
)
from nvae.data.readers.pictures import tar_members
from nvae.data.splits import TEST, TRAIN
from nvae.data.transforms import BadImageError, check_sides

_IDX_FILES = {TRAIN: "train-images-idx3-ubyte", TEST: "t10k-images-idx3-ubyte"}
_IDX_MAGIC = b"\x00\x00\x08\x03"
_IDX_HEADER_BYTES = 16


def read_idx(source: Path, config: DataConfig) -> dict[str, Part]:
    """The training and test images of MNIST and Fashion-MNIST, plain or gzipped."""
    del config
    paths = {split: _locate_idx(source, split) for split in _IDX_FILES}
    return {split: array_part(read_idx_images(path), path.name) for split, path in paths.items()}


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
            read_idx_images(_locate_idx(source, split)), count, config.split_seed, split
        )
        for split, count in counts.items()
        if count
    }


def _stacked_part(images: Pixels, count: int, seed: int, name: str, chunk: int = 4096) -> Part:
    """`count` color images whose channels are three images drawn at random (with replacement)."""

    def items() -> Iterator[Item]:
        for start in range(0, count, chunk):
            index = torch.arange(3 * start, 3 * min(start + chunk, count))
            keys = image_keys(index, seed=seed, epoch=0, stream=STREAM_CONTENT)
            triples = (keys.numpy().view(np.uint64) % len(images)).reshape(-1, 3)
            for i, triple in enumerate(triples, start):
                image = np.ascontiguousarray(images[triple, :, :, 0].transpose(1, 2, 0))
                yield loaded_item(f"{name} stack {i}", image)

    return Part(count, items)


def _locate_idx(source: Path, split: str) -> Path:
    name = _IDX_FILES[split]
    dotted = name.replace("-idx", ".idx")
    return find_files(source, (name, f"{name}.gz", dotted, f"{dotted}.gz"))


def read_idx_images(path: Path) -> Pixels:
    """Images of an IDX file, (N, H, W, 1) uint8: mapped, or unpacked in memory.

    Raises:
        DataError: Wrong magic, cut short, longer than its header says, or claiming what no file of
            its size can hold.
    """
    try:
        with open_source(path) as raw:
            size = os.fstat(raw.fileno()).st_size
            if path.suffix == ".gz":
                with gzip.open(raw) as file:
                    return _unpack_idx(cast(IO[bytes], file), path, size)
            shape = _read_idx_header(raw, path)
            _check_idx_size(size - _IDX_HEADER_BYTES, shape, path)
            return np.memmap(raw, np.uint8, "r", _IDX_HEADER_BYTES, shape)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _unpack_idx(file: IO[bytes], path: Path, packed: int) -> Pixels:
    shape = _read_idx_header(file, path)
    if prod(shape) > unpacked_limit(packed):
        raise DataError(
            f"{path} is refused: {_claim(shape)}, of {packed} packed ones; if that is right, "
            "unpack it first"
        )
    # One byte more than the header promises shows a file that is too long.
    data = read_pieces(file, prod(shape) + 1)
    _check_idx_size(len(data), shape, path)
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _check_idx_size(have: int, shape: tuple[int, ...], path: Path) -> None:
    if have != prod(shape):
        amount = "more" if have > prod(shape) else have
        raise DataError(f"{path} is damaged: {_claim(shape)}, it has {amount}")


def _claim(shape: tuple[int, ...]) -> str:
    count, height, width = shape[:3]
    return f"its header says {count} images of {height}x{width} = {prod(shape)} bytes"


def _read_idx_header(file: IO[bytes], path: Path) -> tuple[int, int, int, int]:
    """(N, H, W, 1)."""
    header = file.read(_IDX_HEADER_BYTES)
    if header[:4] != _IDX_MAGIC or len(header) < _IDX_HEADER_BYTES:
        raise DataError(
            f"{path} is not an IDX file of uint8 images (it starts with "
            f"{header[:4].hex(' ') or 'nothing'}, not {_IDX_MAGIC.hex(' ')})"
        )
    count, height, width = (int.from_bytes(header[i : i + 4]) for i in (4, 8, 12))
    try:
        check_sides(width, height)
    except BadImageError as error:
        raise DataError(f"{path} is damaged: a picture in it is no picture: {error}") from error
    if not count:
        raise DataError(f"{path} is damaged: it holds no images")
    return count, height, width, 1


_CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR_BATCHES = {TRAIN: [f"data_batch_{i}" for i in range(1, 6)], TEST: ["test_batch"]}
_CIFAR_SIDE = 32
_LARGEST_BATCH = 1 << 26
"""Bytes; each has 31 million."""


def read_cifar(source: Path, config: DataConfig) -> dict[str, Part]:
    """Training and test images, from the archive as distributed or from its unpacked files."""
    del config
    wanted = [name for names in _CIFAR_BATCHES.values() for name in names]
    try:
        paths = {name: find_files(source, (name,)) for name in wanted}
        files = {name: read_whole(path, _LARGEST_BATCH) for name, path in paths.items()}
    except MissingSourceError:
        archive = find_files(source, (_CIFAR_ARCHIVE,))
        members = ((Path(member).name, read) for member, read in tar_members(archive))
        files = {name: read() for name, read in members if name in wanted}
        if missing := sorted(set(wanted) - set(files)):
            raise DataError(f"{archive} lacks {', '.join(missing)}") from None
    return {
        split: array_part(
            np.concatenate([_cifar_images(files[name], name) for name in names]), split
        )
        for split, names in _CIFAR_BATCHES.items()
    }


def _cifar_images(data: bytes, name: str) -> Pixels:
    batch = unpickle_arrays(data, name)
    planes = batch.get(b"data") if isinstance(batch, dict) else None
    try:
        if not isinstance(planes, _Noted):
            raise ValueError("no array")
        shape = (-1, 3, _CIFAR_SIDE, _CIFAR_SIDE)
        return planes.array().reshape(shape).transpose(0, 2, 3, 1)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{name} is not a CIFAR batch (data must be (N, {3 * _CIFAR_SIDE**2}) uint8): {error}"
        ) from error


# All that a pickled dict of arrays, bytes and numbers needs.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Noted:
    """Stands for one of these names, for what it is called with and for the state it is given:
    a note of what the pickle asks, by which nothing is imported, run, or made but bytes.

    Args:
        name: see `_ALLOWED`.
        encoded: texts that were encoded already, by identity, with their bytes: a text asked for
            a million times takes no more memory than once.
    """

    __slots__ = ("arguments", "encoded", "name", "state")

    def __init__(self, name: str, encoded: dict[int, tuple[str, bytes]]) -> None:
        self.name, self.encoded = name, encoded
        self.arguments: tuple[Any, ...] = ()
        self.state: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if self.name != "encode":
            made = _Noted(self.name, self.encoded)
            made.arguments = arguments
            return made
        text, encoding = arguments
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise DataError("it asks for another encoding than that of bytes")
        if id(text) not in self.encoded:
            self.encoded[id(text)] = text, text.encode("latin1")
        return self.encoded[id(text)][1]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> Pixels:
        """The array of bytes that the note describes; a ValueError where it is another."""
        if self.name != "_reconstruct" or not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("no array")
        _, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, _Noted) or dtype.arguments[:1] not in (("u1",), (b"u1",)):
            raise ValueError("no array of bytes")
        if is_fortran or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise ValueError("no array in C order")
        return np.frombuffer(data, np.uint8).reshape(shape)


# Python's own unpickler and not C's, which reserves as much memory as a pickle asks it to.
class _ArrayUnpickler(pickle._Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._encoded: dict[int, tuple[str, bytes]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"it asks for {module}.{name}, which no data file needs")
        return _Noted(name, self._encoded)

    # The one opcode by which Python's reserves what it has not read; no batch uses it.
    dispatch = {  # noqa: RUF012
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }


def unpickle_arrays(data: bytes, name: str) -> Any:
    """Load a pickle of arrays, bytes and numbers; anything else is refused before it runs.

    Returns:
        What it holds, arrays as notes that `array()` makes into arrays.

    Raises:
        DataError: Damaged, or it asks for code.
    """
    try:
        return _ArrayUnpickler(data).load()
    except DataError as error:
        raise DataError(f"{name} is refused: {error}") from error
    # A damaged pickle can raise anything.
    except Exception as error:
        raise DataError(f"{name} is damaged: {type(error).__name__} {error}") from error


_OMNIGLOT_SIDE = 28
_OMNIGLOT_KEYS = {TRAIN: "data", TEST: "testdata"}
_LARGEST_MAT = 1 << 28


def read_omniglot(source: Path, config: DataConfig) -> dict[str, Part]:
    """Training and test characters of `chardata.mat`, 28x28, as Burda et al. (2016) made it."""
    del config
    path = find_files(source, ("chardata.mat",))
    try:
        content = _load_mat(path)
    except DataError:
        raise
    # scipy raises anything on damaged files.
    except Exception as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}") from error
    return {
        split: array_part(_omniglot_images(content, key, path), key)
        for split, key in _OMNIGLOT_KEYS.items()
    }


def _load_mat(path: Path) -> dict[str, object]:
    """The variables, after it is known that they are plain matrices: scipy follows nested cells
    until the stack is used up."""
    from scipy.io import loadmat, whosmat  # takes a second

    content = _unpack_mat(read_whole(path, _LARGEST_MAT), path)
    keys = list(_OMNIGLOT_KEYS.values())
    for name, shape, kind in whosmat(io.BytesIO(content)):
        is_matrix = kind in ("double", "single", "uint8", "logical") and len(shape) == 2
        if name in keys and (not is_matrix or prod(shape) > len(content)):
            raise DataError(f"{path}: {name!r} must hold intensities, one column an image")
    loaded: dict[str, object] = loadmat(io.BytesIO(content), variable_names=keys)
    return loaded


def _unpack_mat(data: bytes, path: Path) -> bytes:
    """A MATLAB 5 file with its compressed elements unpacked, bounded; others as they are."""
    if data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        return data
    order: Literal["little", "big"] = "little" if data[126:128] == b"IM" else "big"
    header_bytes, tag_bytes, compressed = 128, 8, 15
    pieces, at, left = [data[:header_bytes]], header_bytes, unpacked_limit(len(data))
    while at < len(data):
        body = at + tag_bytes
        kind, size = (int.from_bytes(data[i : i + 4], order) for i in (at, at + 4))
        if kind != compressed:
            pieces.append(data[at : body + size])
        else:
            stream, packed = zlib.decompressobj(), data[body : body + size]
            while packed and not stream.eof:
                pieces.append(stream.decompress(packed, 1 << 24))
                packed = stream.unconsumed_tail
                left -= len(pieces[-1])
                if left < 0:
                    raise DataError(f"{path} is refused: it unpacks to a hundred times its size")
            if not stream.eof:
                raise DataError(f"{path} is damaged: an element is cut short")
        at = body + size
    return b"".join(pieces)


def _omniglot_images(content: dict[str, object], key: str, path: Path, chunk: int = 4096) -> Pixels:
    side, values = _OMNIGLOT_SIDE, content.get(key)
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.shape[0] != side**2:
        raise DataError(f"{path} has no {key!r} of {side**2} rows, one column an image")
    wrong = DataError(f"{path}: {key!r} must hold intensities between 0 and 1")
    if values.dtype.kind not in "fbu":
        raise wrong
    out = np.empty((values.shape[1], side, side, 1), np.uint8)
    for start in range(0, len(out), chunk):
        columns = values[:, start : start + chunk]
        if not (np.all(columns >= 0) and np.all(columns <= 1)):
            raise wrong
        # A column holds the picture column by column (MATLAB's order).
        images = np.rint(columns.T * 255.0).astype(np.uint8).reshape(-1, side, side)
        out[start : start + chunk, ..., 0] = images.transpose(0, 2, 1)
    return out
