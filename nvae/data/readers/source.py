"""What every reader gives: named pictures in a fixed order, loaded one at a time."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nvae.data.images import BadImageError
from nvae.data.manifest import DataError
from nvae.data.tables import TEST, TRAIN, VALID
from nvae.files import open_regular, read_bytes

Pixels = NDArray[np.uint8]

LARGEST_PICTURE = 1 << 28
"""Bytes of one picture, encoded or not."""

PIECE = 1 << 20
"""Bytes that are read at a time where the size is not to be believed."""

_LEAST_UNPACKED = 1 << 26
_HIGHEST_RATIO = 100


def unpacked_limit(packed: int) -> int:
    """Bytes that `packed` ones may unpack to: more is a bomb and no data set."""
    return max(_LEAST_UNPACKED, _HIGHEST_RATIO * packed)


class MissingSourceError(DataError):
    """The source files are not there (as against: there, but bad)."""


@dataclass(frozen=True)
class Item:
    """One picture of the source.

    Attributes:
        name: for error messages.
        load: its encoded bytes, or its pixels (H, W, C) uint8; called in any thread, once.
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


def read_file(path: Path) -> Callable[[], bytes]:
    """A loader of a picture's file."""

    def load() -> bytes:
        try:
            return read_bytes(path, LARGEST_PICTURE)
        except OSError as error:
            raise BadImageError(f"it cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise BadImageError(error) from error

    return load


def read_pieces(file: IO[bytes], size: int) -> bytes:
    """At most `size` bytes, piece by piece: a promise of too many costs no memory."""
    pieces: list[bytes] = []
    while size and (piece := file.read(min(size, PIECE))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def constant(value: bytes | Pixels) -> Callable[[], bytes | Pixels]:
    """A loader of something already read."""
    return lambda: value


def array_part(images: Pixels, name: str) -> Part:
    """A part whose pictures are the rows of one array, (N, H, W, C) uint8."""

    def items() -> Iterator[Item]:
        for i, image in enumerate(images):
            yield Item(f"{name} number {i}", constant(image))

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


_SPLIT_WORD = re.compile(r"(train|val|valid|validation|test)(?![a-z])", re.IGNORECASE)
_SPLIT_OF = {"train": TRAIN, "test": TEST}


def split_of_word(word: str) -> str | None:
    """The split that a folder's or file's name starts with: train_32x32 is training, trainer is
    not; None if it names none."""
    match = _SPLIT_WORD.match(word)
    return None if match is None else _SPLIT_OF.get(match.group(1).lower(), VALID)


def group_by_split(names: list[str]) -> dict[str, list[int]]:
    """Assign relative paths to splits by the first folder that names one.

    Only where every path says its split does the source have splits; a class folder that happens
    to be called "test" beside others changes nothing.

    Returns:
        Positions in `names` by split; all under `train` where the source has no splits.
    """
    groups: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        words = (split_of_word(part) for part in name.split("/")[:-1])
        split = next((word for word in words if word is not None), None)
        if split is None:
            return {TRAIN: list(range(len(names)))}
        groups.setdefault(split, []).append(position)
    if TRAIN not in groups:
        return {TRAIN: list(range(len(names)))}
    return groups
