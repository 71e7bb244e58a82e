"""CIFAR-10's Python pickles, read without letting them run code."""

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from nvae.data.config import DataConfig
from nvae.data.manifest import DataError
from nvae.data.readers.source import MissingSourceError, Part, Pixels, array_part, find_files
from nvae.data.tables import TEST, TRAIN

_ARCHIVE = "cifar-10-python.tar.gz"
_BATCHES = {TRAIN: [f"data_batch_{i}" for i in range(1, 6)], TEST: ["test_batch"]}
_SIDE = 32

# All that a pickled dict of arrays, bytes and numbers needs. Nothing here opens, imports or runs.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"it asks for {module}.{name}, which no data file needs")
        return super().find_class(module, name)


def unpickle_arrays(data: bytes, name: str) -> Any:
    """Load a pickle of arrays, bytes and numbers; anything else is refused before it runs.

    Raises:
        DataError: Damaged, or it asks for code.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{name} is refused: {error}") from error
    # A damaged pickle can raise anything.
    except Exception as error:
        raise DataError(f"{name} is damaged: {type(error).__name__} {error}") from error


def _images(data: bytes, name: str) -> Pixels:
    batch = unpickle_arrays(data, name)
    planes = batch.get(b"data") if isinstance(batch, dict) else None
    if (
        not isinstance(planes, np.ndarray)
        or planes.dtype != np.uint8
        or planes.ndim != 2
        or planes.shape[1] != 3 * _SIDE * _SIDE
    ):
        raise DataError(f"{name} is not a CIFAR batch (data must be (N, {3 * _SIDE**2}) uint8)")
    return planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)


def _from_archive(path: Path) -> dict[str, bytes]:
    """The batches in the archive, by file name; nothing is extracted to disk."""
    wanted = {name for names in _BATCHES.values() for name in names}
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                file = archive.extractfile(member) if member.isfile() and name in wanted else None
                if file is not None:
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    missing = sorted(wanted - set(found))
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}")
    return found


def read_cifar(source: Path, config: DataConfig) -> dict[str, Part]:
    """Training and test images, from the archive as distributed or from its unpacked files."""
    del config
    try:
        files = {
            name: find_files(source, (name,)).read_bytes()
            for names in _BATCHES.values()
            for name in names
        }
    except MissingSourceError:
        files = _from_archive(find_files(source, (_ARCHIVE,)))
    return {
        split: array_part(np.concatenate([_images(files[name], name) for name in names]), split)
        for split, names in _BATCHES.items()
    }
