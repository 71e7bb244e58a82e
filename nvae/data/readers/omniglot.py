"""Omniglot at 28x28 in the `chardata.mat` layout of Burda, Grosse and Salakhutdinov (2016)."""

import io
import zlib
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.io import loadmat, whosmat

from nvae.data.config import DataConfig
from nvae.data.manifest import DataError
from nvae.data.readers.source import Part, Pixels, array_part, find_files, unpacked_limit
from nvae.data.tables import TEST, TRAIN
from nvae.files import read_bytes

_SIDE = 28
_KEYS = {TRAIN: "data", TEST: "testdata"}
_CLASSES = ("double", "single", "uint8", "logical")
_LARGEST = 1 << 28
_HEADER_BYTES, _TAG_BYTES, _COMPRESSED = 128, 8, 15
_COLUMNS = 4096
_PIECE = 1 << 24


def _unpack(data: bytes, path: Path) -> bytes:
    """A MATLAB 5 file with its compressed elements unpacked, bounded; others as they are."""
    if data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        return data
    order: Literal["little", "big"] = "little" if data[126:128] == b"IM" else "big"
    pieces, at, left = [data[:_HEADER_BYTES]], _HEADER_BYTES, unpacked_limit(len(data))
    while at < len(data):
        body = at + _TAG_BYTES
        kind, size = (int.from_bytes(data[i : i + 4], order) for i in (at, at + 4))
        if kind != _COMPRESSED:
            pieces.append(data[at : body + size])
        else:
            stream, packed = zlib.decompressobj(), data[body : body + size]
            while packed and not stream.eof:
                pieces.append(stream.decompress(packed, _PIECE))
                packed = stream.unconsumed_tail
                left -= len(pieces[-1])
                if left < 0:
                    raise DataError(f"{path} is refused: it unpacks to a hundred times its size")
            if not stream.eof:
                raise DataError(f"{path} is damaged: an element is cut short")
        at = body + size
    return b"".join(pieces)


def _load(path: Path) -> dict[str, object]:
    """The variables, after it is known that they are plain matrices: scipy follows nested cells
    until the stack is used up."""
    content = _unpack(read_bytes(path, _LARGEST), path)
    for name, shape, kind in whosmat(io.BytesIO(content)):
        if name in _KEYS.values() and (
            kind not in _CLASSES or len(shape) != 2 or prod(shape) > len(content)
        ):
            raise DataError(f"{path}: {name!r} must hold intensities, one column an image")
    loaded: dict[str, object] = loadmat(io.BytesIO(content), variable_names=list(_KEYS.values()))
    return loaded


def _images(content: dict[str, object], key: str, path: Path) -> Pixels:
    values = content.get(key)
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.shape[0] != _SIDE**2:
        raise DataError(f"{path} has no {key!r} of {_SIDE**2} rows, one column an image")
    if values.dtype.kind not in "fbu":
        raise DataError(f"{path}: {key!r} must hold intensities between 0 and 1")
    out = np.empty((values.shape[1], _SIDE, _SIDE, 1), np.uint8)
    for start in range(0, len(out), _COLUMNS):
        columns = values[:, start : start + _COLUMNS]
        if not (np.all(columns >= 0) and np.all(columns <= 1)):
            raise DataError(f"{path}: {key!r} must hold intensities between 0 and 1")
        # A column holds the picture column by column (MATLAB's order).
        images = np.rint(columns.T * 255.0).astype(np.uint8).reshape(-1, _SIDE, _SIDE)
        out[start : start + _COLUMNS, ..., 0] = images.transpose(0, 2, 1)
    return out


def read_omniglot(source: Path, config: DataConfig) -> dict[str, Part]:
    """Training and test characters of `chardata.mat`."""
    del config
    path = find_files(source, ("chardata.mat",))
    try:
        content = _load(path)
    except DataError:
        raise
    # scipy raises anything on damaged files.
    except Exception as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}") from error
    return {split: array_part(_images(content, key, path), key) for split, key in _KEYS.items()}
