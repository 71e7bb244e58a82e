"""Readers of source files: what each gives, one door to them all, and how splits are drawn."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nvae.data.config import READERS, SPLITS, TEST, TRAIN, VALID, DataConfig, DataError
from nvae.data.transforms import BadImageError
from nvae.files import open_regular, read_bytes
from nvae.random import STREAM_SPLIT, permutation
from nvae.registry import Registry

Pixels = NDArray[np.uint8]

TOO_FEW = "it takes at least two: one to train on, one to hold out"

LARGEST_PICTURE = 1 << 28
"""Bytes of one picture, encoded or not."""
PIECE = 1 << 20
"""Bytes that are read at a time where a stated size cannot be trusted."""
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
        load: its encoded bytes, its pixels (H, W, C) uint8, or a PIL image; called once, in any
            thread. It raises a `BadImageError` where the picture, and nothing else, is bad.
    """

    name: str
    load: Callable[[], bytes | Pixels | Image.Image]


@dataclass(frozen=True)
class Part:
    """One split of the source, or all of it.

    Attributes:
        count: pictures.
        items: a fresh iteration over them, always in the same order.
    """

    count: int
    items: Callable[[], Iterator[Item]]


class Reader(ABC):
    """A kind of source files; `READERS` in `nvae.data.config` lists ours.

    Args:
        source: folder or file.
        config: where a format needs more (sizes of stacked sets, resolution of a pyramid).
    """

    def __init__(self, source: Path, config: DataConfig) -> None:
        self.source, self.config = source, config

    @abstractmethod
    def parts(self) -> Mapping[str, Any]:
        """The pictures by split: `train`, and `valid` and `test` where the source has them.

        Each is a `Part`, or anything that has a length and is indexed by numbers, such as an array
        (N, H, W, C) uint8 or a torch `Dataset`; see `picture_of` for what its entries may be.

        Raises:
            MissingSourceError: The files are not there.
            DataError: They are, but bad.
        """


def read_source(source: Path, format_: str, config: DataConfig) -> dict[str, Part]:
    """The parts of a source.

    Args:
        source: folder or file.
        format_: one of `READERS`, or a `package.module:Class`, which is imported: it must come
            from what the user composed, never from a file.
        config: see `Reader`.

    Raises:
        MissingSourceError: The files are not there.
        DataError: They are, but bad; or there is no such reader.
    """
    registry: Registry[type[Reader]] = Registry("data.format", Reader, {})
    try:
        reader = registry[READERS.get(format_, format_)]
    except ValueError as error:
        raise DataError(error) from error
    parts = reader(source, config).parts()
    if unknown := set(parts) - set(SPLITS):
        given = ", ".join(sorted(map(str, unknown)))
        raise DataError(f"{format_} gives {given}; splits are {', '.join(SPLITS)}")
    return {
        split: part if isinstance(part, Part) else indexed_part(part, split)
        for split, part in parts.items()
    }


def indexed_part(images: Any, name: str) -> Part:
    """A part of what has a length and is indexed by numbers, such as a torch `Dataset`."""

    def items() -> Iterator[Item]:
        for i in range(len(images)):
            yield Item(f"{name} number {i}", partial(picture_of, images, i))

    return Part(len(images), items)


def picture_of(images: Any, index: int) -> bytes | Pixels | Image.Image:
    """An entry as a picture; of (picture, label) the first.

    It may be a PIL image, encoded bytes, an array (H, W) or (H, W, C) uint8, or a tensor (C, H, W),
    uint8 or floating-point in [0, 1].

    Raises:
        BadImageError: It is something else.
    """
    entry = images[index]
    if isinstance(entry, tuple | list) and entry:
        entry = entry[0]
    if isinstance(entry, Tensor) and entry.ndim == 3:
        if entry.is_floating_point():
            if not ((entry >= 0) & (entry <= 1)).all():
                raise BadImageError("it has values that are not between 0 and 1")
            entry = (entry * 255).round().byte()
        entry = np.ascontiguousarray(entry.movedim(0, 2).cpu().numpy())
    if isinstance(entry, np.ndarray):
        pixels = entry[:, :, None] if entry.ndim == 2 else entry
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
            raise BadImageError(f"it is an array {entry.shape} of {entry.dtype}")
        return pixels
    if isinstance(entry, bytes | Image.Image):
        return entry
    raise BadImageError(f"it is no picture, but of type {type(entry).__name__}")


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
    """Bytes that so many packed bytes may unpack to; more is an attack and no data set."""
    return max(_LEAST_UNPACKED, _HIGHEST_RATIO * packed)


@contextmanager
def damage_named(name: object) -> Iterator[None]:
    """Make a DataError of whatever the block raises: decoders raise anything on damaged files."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name} is damaged: {str(error) or type(error).__name__}") from error


def open_source(path: Path) -> BinaryIO:
    """Open a source file; a pipe is refused and never waited for.

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
    """The content of a source file; a DataError where it cannot be read or is larger."""
    try:
        return read_bytes(path, largest)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_pieces(file: IO[bytes], size: int) -> bytes:
    """At most `size` bytes, read in pieces, so that a false size takes no memory."""
    pieces: list[bytes] = []
    while size and (piece := file.read(min(size, PIECE))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def file_item(name: str, path: Path) -> Item:
    """A picture in a file of its own."""

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


class Plan(NamedTuple):
    """Which picture of which part of a source goes to which split.

    Attributes:
        counts: pictures by split, before unreadable ones are left out.
        destination: for each part, the number in `SPLITS` of every picture, -1 for none.
        rule: the same in words.
    """

    counts: dict[str, int]
    destination: dict[str, NDArray[np.int8]]
    rule: str


def plan_splits(available: dict[str, int], config: DataConfig) -> Plan:
    """Decide the splits, given how many pictures each part of the source has.

    A split that the source lacks is drawn from its training part; every split keeps the order of
    the source.

    Raises:
        DataError: The source cannot give the sizes that the config asks for.
    """
    counts = split_counts(available, {split: getattr(config, f"{split}_size") for split in SPLITS})
    drawn = {split: 0 if split in available else counts[split] for split in (VALID, TEST)}
    destination = {
        split: np.full(count, SPLITS.index(split) if counts[split] else -1, dtype=np.int8)
        for split, count in available.items()
    }
    if not any(drawn.values()):
        return Plan(counts, destination, "as in the source")
    order = permutation(available[TRAIN], seed=config.split_seed, epoch=0, stream=STREAM_SPLIT)
    valid, test = drawn.values()
    rows = order[len(order) - valid - test :].numpy()
    destination[TRAIN][rows[:valid]] = SPLITS.index(VALID)
    destination[TRAIN][rows[valid:]] = SPLITS.index(TEST)
    names = " and ".join(split for split, count in drawn.items() if count)
    rule = f"{names} drawn from the source's training part (draw_splits, version 1, seed "
    return Plan(counts, destination, f"{rule}{config.split_seed})")


def split_counts(available: dict[str, int], wanted: dict[str, int | None]) -> dict[str, int]:
    """Sizes of the three splits, given what the source has and what the config asks for.

    Where the source has nothing but a training part and the config names no size, a tenth goes to
    validation, at least one.

    Args:
        available: images in each split of the source.
        wanted: `train_size`, `valid_size`, `test_size` of the config, None = no wish.

    Raises:
        DataError: The source cannot give what is asked for.
    """
    have = {split: available.get(split, 0) for split in SPLITS}
    if sum(have.values()) == 1:
        raise DataError(f"the source has one picture; {TOO_FEW}")
    counts = dict(have)
    if all(wanted[split] is None for split in SPLITS) and not have[VALID] and not have[TEST]:
        counts[VALID] = max(have[TRAIN] // 10, 1)
    else:
        counts |= {split: wanted[split] or 0 for split in (VALID, TEST) if not have[split]}
    counts[TRAIN] = sum(have.values()) - counts[VALID] - counts[TEST]
    for split in SPLITS:
        asked = wanted[split]
        # A source's own validation or test images may be left unused, never cut short.
        if asked == 0 and split != TRAIN:
            counts[split] = 0
        elif asked is not None and asked != counts[split]:
            images = ", ".join(f"{count} {name}" for name, count in have.items())
            raise DataError(
                f"data.{split}_size is {asked}, but the source gives {counts[split]} (it has "
                f"{images} images)"
            )
    if counts[TRAIN] < 1:
        raise DataError(
            f"no training images are left: the source has {have[TRAIN]}, and "
            f"{have[TRAIN] - counts[TRAIN]} are asked for validation and test"
        )
    return counts
