"""CIFAR-10's Python pickles, read without letting them run code."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from nvae.data.config import DataConfig
from nvae.data.manifest import DataError
from nvae.data.readers.archives import tar_members
from nvae.data.readers.source import MissingSourceError, Part, Pixels, array_part, find_files
from nvae.data.tables import TEST, TRAIN
from nvae.files import read_bytes

_ARCHIVE = "cifar-10-python.tar.gz"
_BATCHES = {TRAIN: [f"data_batch_{i}" for i in range(1, 6)], TEST: ["test_batch"]}
_SIDE = 32

_LARGEST = 1 << 26
"""Bytes of one batch; each has 31 million."""

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


def _images(data: bytes, name: str) -> Pixels:
    batch = unpickle_arrays(data, name)
    planes = batch.get(b"data") if isinstance(batch, dict) else None
    try:
        if not isinstance(planes, _Noted):
            raise ValueError("no array")
        return planes.array().reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{name} is not a CIFAR batch (data must be (N, {3 * _SIDE**2}) uint8): {error}"
        ) from error


def _from_archive(path: Path) -> dict[str, bytes]:
    """The batches in the archive, by file name; nothing is extracted to disk."""
    wanted = {name for names in _BATCHES.values() for name in names}
    found = {}
    for member, read in tar_members(path):
        name = Path(member).name
        if name in wanted:
            found[name] = read()
    missing = sorted(wanted - set(found))
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}")
    return found


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _LARGEST)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_cifar(source: Path, config: DataConfig) -> dict[str, Part]:
    """Training and test images, from the archive as distributed or from its unpacked files."""
    del config
    try:
        files = {
            name: _read(find_files(source, (name,)))
            for names in _BATCHES.values()
            for name in names
        }
    except MissingSourceError:
        files = _from_archive(find_files(source, (_ARCHIVE,)))
    return {
        split: array_part(np.concatenate([_images(files[name], name) for name in names]), split)
        for split, names in _BATCHES.items()
    }
