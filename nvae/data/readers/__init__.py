"""Readers of source files: one function for each `format` of a `DataConfig`."""

from collections.abc import Callable
from pathlib import Path

from nvae.data.config import DataConfig
from nvae.data.readers.celeba import read_celeba
from nvae.data.readers.cifar import read_cifar
from nvae.data.readers.folder import read_folder
from nvae.data.readers.idx import read_idx, read_stacked_idx
from nvae.data.readers.lmdbs import REFERENCE_NAMES, read_lsun, read_reference_lmdb
from nvae.data.readers.npz import read_npz
from nvae.data.readers.omniglot import read_omniglot
from nvae.data.readers.source import MissingSourceError, Part
from nvae.data.readers.tfrecord import read_tfrecord, tfrecord_files
from nvae.data.tables import TRAIN

__all__ = ["MissingSourceError", "Part", "detect_format", "read_source"]

_READERS: dict[str, Callable[[Path, DataConfig], dict[str, Part]]] = {
    "idx": read_idx,
    "stacked_idx": read_stacked_idx,
    "cifar": read_cifar,
    "omniglot": read_omniglot,
    "celeba": read_celeba,
    "npz": read_npz,
    "folder": read_folder,
    "tfrecord": read_tfrecord,
    "lmdb": read_reference_lmdb,
    "lsun": read_lsun,
}


def detect_format(source: Path) -> str:
    """What a source of unstated format holds: LMDB, TFRecords, npz batches, or pictures."""
    if (source / REFERENCE_NAMES[TRAIN]).exists():
        return "lmdb"
    if source.is_dir() and tfrecord_files(source):
        return "tfrecord"
    if source.is_dir() and any(source.rglob("train_data_batch_*.npz")):
        return "npz"
    return "folder"


def read_source(source: Path, format_: str, config: DataConfig) -> dict[str, Part]:
    """The parts of a source.

    Args:
        source: folder or file.
        format_: one of `SOURCE_FORMATS` but `auto`.
        config: where a format needs more (sizes of stacked sets, resolution of a pyramid).

    Raises:
        MissingSourceError: The files are not there.
        DataError: They are, but bad.
    """
    return _READERS[format_](source, config)
