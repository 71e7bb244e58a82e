"""Published sets that are arrays in files: MNIST's IDX, CIFAR-10's pickles, Omniglot's MATLAB file.

Own readers: torchvision's run what a pickle says, read whole files before they look at them, want
their own folders, and know Omniglot at another size only.
"""

import gzip
import io
import os
import pickletools
import struct
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nvae.data.config import TEST, TRAIN, DataError
from nvae.data.pixels import Pixels, check_sides
from nvae.data.readers import (
    PIECE,
    Item,
    MissingSourceError,
    Part,
    Reader,
    array_part,
    damage_named,
    find_files,
    loaded_item,
    open_source,
    read_pieces,
    read_whole,
    unpacked_limit,
)
from nvae.data.readers.pictures import tar_members
from nvae.random import STREAM_CONTENT, image_keys

_IDX_FILES = {TRAIN: "train-images-idx3-ubyte", TEST: "t10k-images-idx3-ubyte"}
_IDX_MAGIC = b"\x00\x00\x08\x03"
_IDX_LABELS_MAGIC = b"\x00\x00\x08\x01"
_IDX_HEADER_BYTES = 16


class Idx(Reader):
    """The training and test images of MNIST and Fashion-MNIST, plain or gzipped, with their
    labels where those files are there."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        images = {split: self.images(split) for split in _IDX_FILES}
        return {
            split: array_part(each, self._labels(split, len(each)), split)
            for split, each in images.items()
        }

    def images(self, split: str) -> Pixels:
        """The images of `train` or `test`, (N, H, W, 1)."""
        return read_idx(self._file(_IDX_FILES[split]))

    def _labels(self, split: str, count: int) -> Pixels | None:
        name = _IDX_FILES[split].replace("images-idx3", "labels-idx1")
        try:
            path = self._file(name)
        except MissingSourceError:
            return None
        return None if self.config.labels is False else read_idx_labels(path, count)

    def _file(self, name: str) -> Path:
        dotted = name.replace("-idx", ".idx")
        return find_files(self.source, (name, f"{name}.gz", dotted, f"{dotted}.gz"))


class StackedIdx(Idx):
    """Stacked MNIST: three random digits as red, green and blue; 1000 modes.

    Training and validation stacks are made of training digits, test stacks of test digits. The
    config says how many, and `split_seed` which.
    """

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        config = self.config
        if config.train_size is None or config.test_size is None:
            raise DataError("stacked images need data.train_size and data.test_size")
        counts = {TRAIN: config.train_size + (config.valid_size or 0), TEST: config.test_size}
        return {
            split: _stacked_part(self.images(split), count, config.split_seed, split)
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


def read_idx(path: Path) -> Pixels:
    """The images of an IDX file, plain or gzipped, (N, H, W, 1) uint8.

    Raises:
        DataError: Wrong magic, cut short, longer than its header says, or claiming what no file of
            its size can hold.
    """
    with damage_named(path), open_source(path) as raw:
        size = os.fstat(raw.fileno()).st_size
        is_packed = path.suffix == ".gz"
        file: Any = gzip.GzipFile(fileobj=raw) if is_packed else raw
        shape = _idx_shape(file.read(_IDX_HEADER_BYTES), path)
        count, height, width, _ = shape
        claim = f"its header says {count} images of {height}x{width} = {prod(shape)} bytes"
        if is_packed and prod(shape) > unpacked_limit(size):
            raise DataError(f"{path} is refused: {claim}; if that is right, unpack it first")
        # One byte more than the header promises shows a file that is too long.
        data = read_pieces(file, prod(shape) + 1)
        if len(data) != prod(shape):
            amount = "more" if len(data) > prod(shape) else len(data)
            raise ValueError(f"{claim}, it has {amount}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_idx_labels(path: Path, count: int) -> Pixels:
    """The labels of an IDX file, plain or gzipped, (N,) uint8.

    Raises:
        DataError: Damaged, or not of so many labels.
    """
    header = _IDX_LABELS_MAGIC + struct.pack(">I", count)
    with damage_named(path), open_source(path) as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        data = read_pieces(file, len(header) + count + 1)
        if not data.startswith(header) or len(data) != len(header) + count:
            raise ValueError(f"it is not an IDX file of {count} labels")
    return np.frombuffer(data, np.uint8, offset=len(header))


def _idx_shape(header: bytes, path: Path) -> tuple[int, int, int, int]:
    """(N, H, W, 1)."""
    if header[:4] != _IDX_MAGIC or len(header) < _IDX_HEADER_BYTES:
        raise DataError(
            f"{path} is not an IDX file of uint8 images (it starts with "
            f"{header[:4].hex(' ') or 'nothing'}, not {_IDX_MAGIC.hex(' ')})"
        )
    count, height, width = struct.unpack(">III", header[4:])
    check_sides(width, height)
    if not count:
        raise ValueError("it holds no images")
    return count, height, width, 1


_CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR_BATCHES = {TRAIN: [f"data_batch_{i}" for i in range(1, 6)], TEST: ["test_batch"]}
_CIFAR_BYTES = 3 * 32 * 32
_LARGEST_BATCH = 1 << 26
"""Bytes; each has 31 million."""
_NAMES_IN_BATCHES = ("_reconstruct", "ndarray", "dtype", "encode")
"""All that a pickled dictionary of one array and lists of numbers and text asks for."""


class Cifar(Reader):
    """Training and test images, from the archive as distributed or from its unpacked files."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        wanted = [name for names in _CIFAR_BATCHES.values() for name in names]
        try:
            paths = {name: find_files(self.source, (name,)) for name in wanted}
            files = {name: read_whole(path, _LARGEST_BATCH) for name, path in paths.items()}
        except MissingSourceError:
            archive = find_files(self.source, (_CIFAR_ARCHIVE,))
            members = ((Path(member).name, read) for member, read in tar_members(archive))
            files = {name: read() for name, read in members if name in wanted}
            if missing := sorted(set(wanted) - set(files)):
                raise DataError(f"{archive} lacks {', '.join(missing)}") from None
        parts = {}
        for split, names in _CIFAR_BATCHES.items():
            images = np.concatenate([cifar_images(files[name], name) for name in names])
            labels = [label for name in names for label in cifar_labels(files[name], name)]
            parts[split] = array_part(images, labels if len(labels) == len(images) else None, split)
        return parts


def cifar_images(data: bytes, name: str) -> Pixels:
    """The images of a pickled batch, (N, 32, 32, 3), of which nothing is unpickled.

    The instructions of the pickle are listed, not followed: its longest text is the pixels, and
    what stands before it must describe an array of bytes, (N, 3072).

    Raises:
        DataError: Damaged, no such batch, or it asks for something to be imported or run.
    """
    pixels: str | bytes = b""
    texts: list[Any] = ["", ""]
    is_uint8, flag, is_fortran = False, None, None
    rows: Any = 0
    before: Any = 0
    with damage_named(name):
        for code, value, _ in pickletools.genops(data):
            if code.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                asked = str(value).split(" ") if value else texts
                if asked[-1] not in _NAMES_IN_BATCHES:
                    wanted = ".".join(map(str, asked))
                    raise DataError(f"{name} is refused: it asks for {wanted}, which is no data")
            elif code.name in ("NEWTRUE", "NEWFALSE") or isinstance(value, bool):
                flag = code.name == "NEWTRUE" or value is True
            elif isinstance(value, str | bytes):
                texts = [texts[-1], value]
                is_uint8 |= value in ("u1", b"u1")
                if len(value) > len(pixels):
                    pixels, is_fortran = value, flag
            elif "PUT" in code.name or "GET" in code.name:
                continue  # a place in the pickle's memory
            elif value == _CIFAR_BYTES:
                rows = before
            before = value
        content = pixels.encode("latin1") if isinstance(pixels, str) else pixels
    planes = np.frombuffer(content, np.uint8)
    if not is_uint8 or is_fortran is not False or rows != len(planes) / _CIFAR_BYTES:
        raise DataError(f"{name} is not a CIFAR batch: data must be (N, {_CIFAR_BYTES}) uint8")
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def cifar_labels(data: bytes, name: str) -> list[int]:
    """The labels of a pickled batch: the whole numbers of the list that follows the word `labels`.

    As in :func:`cifar_images` nothing is unpickled.

    Raises:
        DataError: It is damaged.
    """
    labels: list[int] = []
    is_list = False
    with damage_named(name):
        for code, value, _ in pickletools.genops(data):
            if value in ("labels", b"labels"):
                is_list = True
            elif is_list and isinstance(value, int) and code.name.startswith(("BININT", "INT")):
                labels.append(value)
            elif isinstance(value, str | bytes) or code.name in ("SETITEM", "SETITEMS", "DICT"):
                is_list = False
    return labels


_OMNIGLOT_SIDE = 28
_OMNIGLOT_KEYS = {TRAIN: "data", TEST: "testdata"}
_LARGEST_MAT = 1 << 28


class Omniglot(Reader):
    """Training and test characters of `chardata.mat`, 28x28, as Burda et al. (2016) made it."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        path = find_files(self.source, ("chardata.mat",))
        with damage_named(path):
            content = _load_mat(path)
        return {
            split: _omniglot_images(content.get(key), key, path)
            for split, key in _OMNIGLOT_KEYS.items()
        }


def _load_mat(path: Path) -> dict[str, Any]:
    """The variables, after it is known that they are plain matrices: scipy follows nested cells
    until the stack is used up."""
    from scipy.io import loadmat, whosmat  # takes a second

    content = _unpack_mat(read_whole(path, _LARGEST_MAT), path)
    keys = list(_OMNIGLOT_KEYS.values())
    for name, shape, kind in whosmat(io.BytesIO(content)):
        is_matrix = kind in ("double", "single", "uint8", "logical") and len(shape) == 2
        if name in keys and (not is_matrix or prod(shape) > len(content)):
            raise DataError(f"{path}: {name!r} must hold intensities, one column an image")
    loaded: dict[str, Any] = loadmat(io.BytesIO(content), variable_names=keys)
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
                pieces.append(stream.decompress(packed, PIECE))
                packed = stream.unconsumed_tail
                left -= len(pieces[-1])
                if left < 0:
                    raise DataError(f"{path} is refused: it unpacks to a hundred times its size")
            if not stream.eof:
                raise DataError(f"{path} is damaged: an element is cut short")
        at = body + size
    return b"".join(pieces)


def _omniglot_images(columns: Any, key: str, path: Path) -> Pixels:
    side = _OMNIGLOT_SIDE
    if not isinstance(columns, np.ndarray) or columns.ndim != 2 or len(columns) != side**2:
        raise DataError(f"{path} has no {key!r} of {side**2} rows, one column an image")
    if columns.dtype.kind not in "fbu" or not np.all((columns >= 0) & (columns <= 1)):
        raise DataError(f"{path}: {key!r} must hold intensities between 0 and 1")
    images = np.rint(columns.T * 255.0).astype(np.uint8).reshape(-1, side, side, 1)
    return images.transpose(0, 2, 1, 3)  # MATLAB's order is column by column
