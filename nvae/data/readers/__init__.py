"""Readers of source files: what each gives, what they share, and how one is found.

A reader is a function of the source (folder or file) and the `DataConfig` that returns the parts of
the source by split. It raises `MissingSourceError` where its files are not there and `DataError`
where they are bad. `READERS` in `nvae.data.config` lists ours.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import IO, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nvae.data.config import READERS, DataConfig, DataError
from nvae.data.splits import TEST, TRAIN, VALID
from nvae.data.transforms import BadImageError
from nvae.files import open_regular, read_bytes
from nvae.registry import Registry

Pixels = NDArray[np.uint8]

LARGEST_PICTURE = 1 << 28
"""Bytes of one picture, encoded or not."""
PIECE = 1 << 20
"""Bytes that are read at a time where the size is not to be believed."""
TFRECORD_SUFFIXES = (".tfrecord", ".tfrecords", ".tfr")
REFERENCE_LMDBS = {TRAIN: "train.lmdb", VALID: "validation.lmdb"}

_LEAST_UNPACKED = 1 << 26
_HIGHEST_RATIO = 100


class MissingSourceError(DataError):
    """The source files are not there (as against: there, but bad)."""


@dataclass(frozen=True)
class Item:
    """One picture of the source.

    Attributes:
        name: for error messages.
        load: its encoded bytes, or its pixels (H, W, C) uint8; called in any thread, once. It
            raises a `BadImageError` where the picture, and nothing else, is bad.
    """

    name: str
    load: Callable[[], bytes | Pixels]


@dataclass(frozen=True)
class Part:
    """One split of the source, or all of it.

    Attributes:
        count: pictures.
        items: a fresh iteration over them, always in the same order.
    """

    count: int
    items: Callable[[], Iterator[Item]]


Reader = Callable[[Path, DataConfig], dict[str, Part]]


def read_source(source: Path, format_: str, config: DataConfig) -> dict[str, Part]:
    """The parts of a source.

    Args:
        source: folder or file.
        format_: one of `READERS`, or a `package.module:function`, which is imported: it must come
            from what the user composed, never from a file.
        config: where a format needs more (sizes of stacked sets, resolution of a pyramid).

    Raises:
        MissingSourceError: The files are not there.
        DataError: They are, but bad; or there is no such reader.
    """
    registry: Registry[Reader] = Registry("data.format", FunctionType, {})
    try:
        reader = registry[READERS.get(format_, format_)]
    except ValueError as error:
        raise DataError(error) from error
    return reader(source, config)


def detect_format(source: Path) -> str:
    """What a source of unstated format holds: LMDB, TFRecords, npz batches, or pictures."""
    if (source / REFERENCE_LMDBS[TRAIN]).exists():
        return "lmdb"
    if source.is_dir() and tfrecord_files(source):
        return "tfrecord"
    if source.is_dir() and any(source.rglob("train_data_batch_*.npz")):
        return "npz"
    return "folder"


def tfrecord_files(source: Path) -> list[Path]:
    """All record files below a folder, sorted."""
    return sorted(path for path in source.rglob("*") if path.suffix.lower() in TFRECORD_SUFFIXES)


def unpacked_limit(packed: int) -> int:
    """Bytes that `packed` ones may unpack to: more is a bomb and no data set."""
    return max(_LEAST_UNPACKED, _HIGHEST_RATIO * packed)


def open_source(path: Path) -> BinaryIO:
    """A source file, opened; never waits for a pipe.

    Raises:
        DataError: It is not there, not a file, or cannot be read.
    """
    try:
        return open_regular(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(error) from error


def read_whole(path: Path, largest: int) -> bytes:
    """A source file's content; a DataError as `open_source`, or where it is larger."""
    try:
        return read_bytes(path, largest)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_pieces(file: IO[bytes], size: int) -> bytes:
    """At most `size` bytes, piece by piece: a promise of too many costs no memory."""
    pieces: list[bytes] = []
    while size and (piece := file.read(min(size, PIECE))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def file_item(name: str, path: Path) -> Item:
    """A picture's file."""

    def load() -> bytes:
        try:
            return read_bytes(path, LARGEST_PICTURE)
        except OSError as error:
            raise BadImageError(f"it cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise BadImageError(error) from error

    return Item(name, load)


def loaded_item(name: str, value: bytes | Pixels) -> Item:
    """A picture that is already read."""
    return Item(name, lambda: value)


def list_part(items: list[Item]) -> Part:
    """A part of items that are already listed."""
    return Part(len(items), lambda: iter(items))


def array_part(images: Pixels, name: str) -> Part:
    """A part whose pictures are the rows of one array, (N, H, W, C) uint8."""

    def items() -> Iterator[Item]:
        for i, image in enumerate(images):
            yield loaded_item(f"{name} number {i}", image)

    return Part(len(images), items)


def find_files(source: Path, names: tuple[str, ...]) -> Path:
    """The first file below `source` that has one of the names; earlier names are preferred.

    Raises:
        MissingSourceError: There is none.
    """
    for name in names:
        if source.name == name and source.exists():
            return source
        found = sorted(source.rglob(name)) if source.is_dir() else []
        if found:
            return found[0]
    raise MissingSourceError(f"{' or '.join(names)} not found in {source}")


def split_of_word(word: str) -> str | None:
    """The split that a folder's or file's name starts with: train_32x32 is training, trainer is
    not; None if it names none."""
    match = re.match(r"(train|val|valid|validation|test)(?![a-z])", word, re.IGNORECASE)
    return {"train": TRAIN, "test": TEST}.get(match[1].lower(), VALID) if match else None


def group_by_split(names: list[str]) -> dict[str, list[int]]:
    """Assign relative paths to splits by the first folder that names one.

    Only where every path says its split does the source have splits; a class folder that happens
    to be called "test" beside others changes nothing.

    Returns:
        Positions in `names` by split; all under `train` where the source has no splits.
    """
    groups: dict[str | None, list[int]] = {}
    for position, name in enumerate(names):
        words = map(split_of_word, name.split("/")[:-1])
        groups.setdefault(next(filter(None, words), None), []).append(position)
    if None in groups or TRAIN not in groups:
        return {TRAIN: list(range(len(names)))}
    return {split: rows for split, rows in groups.items() if split is not None}
