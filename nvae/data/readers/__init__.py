"""Readers of source files: what each gives, and one door to them all."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nvae.data.config import READERS, SPLITS, TRAIN, VALID, DataConfig, DataError
from nvae.data.decoding import LARGEST_PICTURE
from nvae.data.labels import Label, Labeled, label_of
from nvae.data.pixels import BadImageError, Pixels
from nvae.data.readers.splits import split_of_word
from nvae.files import open_regular, read_bytes
from nvae.settings import Registry, did_you_mean

IMAGE_KEYS = ("image", "images", "img", "x", "data", "pixels")
LABEL_KEYS = ("label", "labels", "y", "target", "targets", "class")
"""What images and labels are called where a source names its things."""
ARRAY_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5", ".zarr")
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
        load: the picture and its label; called once, in any thread. It raises a `BadImageError`
            where the picture, and nothing else, is bad.
    """

    name: str
    load: Callable[[], Labeled]


@dataclass(frozen=True)
class Part:
    """One split of the source, or all of it.

    Attributes:
        count: pictures.
        items: a fresh iteration over them, always in the same order.
        classes: names of the classes, where labels are their numbers.
    """

    count: int
    items: Callable[[], Iterator[Item]]
    classes: Sequence[str] | None = None


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
        (N, H, W, C) or a torch `Dataset`; see `entry_of` for what its entries may be.

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
        split: part if isinstance(part, Part) else indexed_part(part, split, config)
        for split, part in parts.items()
    }


def indexed_part(images: Any, name: str, config: DataConfig) -> Part:
    """A part of what has a length and is indexed by numbers, such as a torch `Dataset`."""

    def items() -> Iterator[Item]:
        for i in range(len(images)):
            yield Item(f"{name} number {i}", partial(entry_of, images, i, config))

    classes = getattr(images, "classes", None)
    is_named = isinstance(classes, list | tuple) and all(isinstance(each, str) for each in classes)
    return Part(len(images), items, classes if is_named else None)


def entry_of(images: Any, index: int, config: DataConfig) -> Labeled:
    """An entry: a picture, (picture, label), or a mapping that names them.

    A picture may be a PIL image, encoded bytes, an array (H, W) or (H, W, C) or a tensor (H, W) or
    (C, H, W) of numbers; see `DataConfig.value_range` for what they mean.

    Raises:
        BadImageError: It is something else.
    """
    entry, label = images[index], None
    if isinstance(entry, Mapping):
        label_key = key_among(entry, config.label_key, LABEL_KEYS, "label_key")
        label = None if label_key is None else entry[label_key]
        image_key = key_among(entry, config.image_key, IMAGE_KEYS, "image_key")
        if image_key is None:
            raise BadImageError(
                f"it holds {', '.join(map(str, entry))}: name the images with data.image_key"
            )
        entry = entry[image_key]
    elif isinstance(entry, tuple | list) and entry:
        entry, label = entry[0], entry[1] if len(entry) > 1 else None
    return Labeled(_picture_of(entry), label_of(label))


def key_among(
    names: Iterable[str], given: str | None, usual: tuple[str, ...], setting: str
) -> str | None:
    """The name that the config gives, else the first of the usual ones that is there.

    Raises:
        DataError: What the config gives is not there.
    """
    there = [name for name in names if isinstance(name, str)]
    if given is not None:
        if given in there:
            return given
        hint = did_you_mean(given, there)
        raise DataError(f"data.{setting}={given} is not there{hint}; there are {', '.join(there)}")
    return next((name for name in usual if name in there), None)


def _picture_of(entry: Any) -> bytes | Pixels | Image.Image:
    if isinstance(entry, Tensor):
        entry = entry.movedim(0, 2) if entry.ndim == 3 else entry
        entry = (entry.float() if entry.is_floating_point() else entry).cpu().numpy()
    if isinstance(entry, np.ndarray):
        pixels = entry[:, :, None] if entry.ndim == 2 else entry
        if pixels.dtype.kind not in "biuf" or pixels.ndim != 3 or not pixels.size:
            raise BadImageError(f"it is an array {entry.shape} of {entry.dtype}")
        return np.ascontiguousarray(pixels)
    if isinstance(entry, bytes | Image.Image):
        return entry
    raise BadImageError(f"it is no picture, but of type {type(entry).__name__}")


def detect_format(source: Path) -> str:
    """What a source of unstated format holds; pictures if nothing else is recognized."""
    if (source / REFERENCE_LMDBS[TRAIN]).exists():
        return "lmdb"
    if is_array_file(source) or _holds_arrays(source):
        return "arrays"
    if (source / "dataset_dict.json").exists() or (source / "dataset_info.json").exists():
        return "huggingface"
    if source.is_dir() and tfrecord_files(source):
        return "tfrecord"
    if source.is_dir() and any(source.rglob("train_data_batch_*.npz")):
        return "npz"
    return "folder"


def is_array_file(path: Path) -> bool:
    """Whether a file, or a Zarr store, is named as arrays are."""
    return path.suffix.lower() in ARRAY_SUFFIXES


def _holds_arrays(source: Path) -> bool:
    """Whether a folder has arrays that are named train, valid or test, or one array alone."""
    if not source.is_dir():
        return False
    paths = [path for path in source.iterdir() if not path.name.startswith(".")]
    arrays = [path for path in paths if is_array_file(path)]
    is_batch = any(path.name.startswith("train_data_batch_") for path in arrays)
    is_named = any(split_of_word(path.name) == TRAIN for path in arrays)
    return not is_batch and (is_named or len(arrays) == len(paths) == 1)


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


def walk(folder: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` without hidden folders; links to folders are not followed.

    Raises:
        DataError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror or error}") from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        # The second is found where a disk is mounted, for its administrator alone.
        folders[:] = [name for name in folders if not name.startswith(".") and name != "lost+found"]
        yield place, folders, files


def linked_folder(folder: str | Path) -> Path | None:
    """The first link to a folder that :func:`walk` meets; None where there is none."""
    links = (
        Path(place, name)
        for place, folders, _ in walk(folder)
        for name in folders
        if os.path.islink(os.path.join(place, name))
    )
    return next(links, None)


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

    def load() -> Labeled:
        try:
            return Labeled(read_bytes(path, LARGEST_PICTURE))
        except OSError as error:
            raise BadImageError(f"it cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise BadImageError(error) from error

    return Item(name, load)


def loaded_item(name: str, value: bytes | Pixels, label: Label | None = None) -> Item:
    """A picture that is already read."""
    return Item(name, lambda: Labeled(value, label))


def labeled_item(item: Item, label: Label | None) -> Item:
    """The same picture with a label that is known before it is read."""
    return Item(item.name, lambda: Labeled(item.load().picture, label))


def array_part(images: Pixels, labels: Sequence[Any] | NDArray[Any] | None, name: str) -> Part:
    """A part of images in memory, (N, H, W, C), with a label for each where there are labels."""

    def items() -> Iterator[Item]:
        for i, image in enumerate(images):
            label = None if labels is None else label_of(labels[i])
            yield loaded_item(f"{name} number {i}", image, label)

    return Part(len(images), items)


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
