"""The prepared form of a data set: a manifest and one `.npy` file a split, mapped when opened.

All processes of a machine share the mapped pages. What the files say is checked before it is used:
numpy reads the headers, but its `load` would believe the sizes that they state.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import numpy.lib.format as npy
import torch
from torch import Tensor

from nvae.data.config import LARGEST_SIDE, SPLITS, DataError
from nvae.data.loader import DenseSplit, RaggedSplit, Split
from nvae.files import open_regular, read_json, write_json
from nvae.settings import check_choice, check_fields

VERSION = 1
MANIFEST_NAME = "manifest.json"
PARTIAL = ".partial"
"""Suffix of arrays that are being written."""

_STAMPS_NAME = "verified.json"
_ARRAY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.npy")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OWN = re.compile(rf"({'|'.join(SPLITS)})(-layout|-labels)?(-[0-9a-f]{{12}}\.npy|\{PARTIAL})")
_SMALLEST_ARRAY = 64
"""Bytes of an empty array's file: numpy pads its headers to this."""
_LONGEST_HEADER = 1 << 14
_CHUNK = 1 << 22
PIXEL_TYPES = ("|u1", "<u2", "<f4")
"""What pixels may be stored as, by numpy's names."""

T = TypeVar("T")


@dataclass(frozen=True)
class ArrayFile:
    """One array on disk.

    Attributes:
        file: name inside the folder.
        bytes: size of the whole file.
        sha256: of everything after the array's header.
    """

    file: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_fields(self, bytes=(_SMALLEST_ARRAY, None))
        if not _ARRAY_NAME.fullmatch(self.file):
            raise ValueError(f"the file name {self.file!r} leads out of the folder or is no .npy")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256={self.sha256!r} is no checksum")


@dataclass(frozen=True)
class SplitFiles:
    """One split.

    Attributes:
        count: images.
        shape: (H, W, C) of each image; for images that differ in size, that of the window cut
            from them.
        pixels: (N, H, W, C) of type `dtype`, or flat where images differ in size.
        layout: (N, 3) int64 offset, height, width where images differ in size, else None.
        skipped: unreadable images left out.
        dtype: one of `PIXEL_TYPES`.
        labels: (N,) int64 class numbers, None where there are none.
    """

    count: int
    shape: tuple[int, int, int]
    pixels: ArrayFile
    layout: ArrayFile | None = None
    skipped: int = 0
    dtype: str = "|u1"
    labels: ArrayFile | None = None

    def __post_init__(self) -> None:
        check_fields(self, count=(1, None), shape=(1, LARGEST_SIDE), skipped=(0, None))
        check_choice("dtype", self.dtype, PIXEL_TYPES)
        if len(self.shape) != 3:
            raise ValueError(f"shape={list(self.shape)} is not height, width and channels")


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds and how it came about.

    Attributes:
        name: of the data set.
        format: kind of source files.
        source: where they were.
        source_digest: of the source's listing (`nvae.data.places`).
        geometry: crop_box, crop and resize, as in `DataConfig`.
        split_rule: how images were assigned to splits.
        splits: by name.
        classes: names of the classes in the order of their numbers; empty where there are none.
        skipped_names: the first of the unreadable images that were left out, with the reason.
        licence, citation: as in `DataConfig`.
        version: of this layout.
    """

    name: str
    format: str
    source: str
    source_digest: str
    geometry: dict[str, Any]
    split_rule: str
    splits: dict[str, SplitFiles]
    classes: list[str] = field(default_factory=list)
    skipped_names: list[str] = field(default_factory=list)
    licence: str = ""
    citation: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        check_fields(self)

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest in one step; this is what commits a preparation."""
        write_json(folder / MANIFEST_NAME, asdict(self))

    def files(self) -> list[ArrayFile]:
        """All arrays."""
        splits = self.splits.values()
        arrays = [file for each in splits for file in (each.pixels, each.layout, each.labels)]
        return [array for array in arrays if array is not None]


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`; every value is of the type and within the bounds it must be.

    Raises:
        DataError: It is not there, not JSON, of another version, or lacks something.
    """
    path = folder / MANIFEST_NAME
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} holds no prepared data set ({MANIFEST_NAME} missing)") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is not int or version != VERSION:
        raise DataError(
            f"{path} has version {version}, this program reads {VERSION}: prepare again"
        )
    try:
        named = _object(content.get("splits"), "splits")
        splits = {name: _split(value, f"splits.{name}") for name, value in named.items()}
        return _made(Manifest, {**content, "splits": splits}, "it")
    except ValueError as error:
        raise DataError(f"{path} is not valid: {error}") from error


def _split(value: object, where: str) -> SplitFiles:
    content = dict(_object(value, where))
    if isinstance(content.get("shape"), list):
        content["shape"] = tuple(content["shape"])
    for name in ("pixels", "layout", "labels"):
        if content.get(name) is not None:
            content[name] = _made(ArrayFile, content[name], f"{where}.{name}")
    return _made(SplitFiles, content, where)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    return value


def _made(cls: type[T], value: object, where: str) -> T:
    """A dataclass of the values of a JSON object, which must have its fields and no others."""
    content = _object(value, where)
    known = {each.name: each for each in fields(cls)}  # type: ignore[arg-type]
    needed = {
        name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING
    }
    for names, fault in ((needed - content.keys(), "lacks"), (content.keys() - known, "has also")):
        if names:
            raise ValueError(f"{where} {fault} {', '.join(sorted(names))}")
    try:
        return cls(**content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def own_files(folder: Path, suffix: str = "") -> set[Path]:
    """What preparations wrote into a folder: arrays and their unfinished forms, nothing else."""
    found = [path for path in folder.iterdir() if _OWN.fullmatch(path.name)]
    return {path for path in found if path.name.endswith(suffix)}


class Header(NamedTuple):
    """What an array file says of itself.

    Attributes:
        shape: of the array.
        dtype: numpy's name of its type, such as ``|u1``.
        offset: of the first element, in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def bytes(self) -> int:
        """Size that the file must have, header included."""
        return self.offset + prod(self.shape) * np.dtype(self.dtype).itemsize


def read_header(file: IO[bytes], allowed: tuple[str, ...] | None = None) -> Header:
    """The header of an array in C order; the file is left somewhere behind it.

    Args:
        file: an `.npy` file.
        allowed: types that the array may have; None: numbers and text. Never objects.

    Raises:
        ValueError: no header, a very long one, or of another type or order.
    """
    # Not from the file itself: numpy would take memory for whatever length a header claims.
    start = io.BytesIO(file.read(_LONGEST_HEADER))
    try:
        is_first = npy.read_magic(start) == (1, 0)
        read = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
        with warnings.catch_warnings(action="ignore"):  # one line on a bad file is enough
            shape, is_fortran, dtype = read(start)
    except Exception as error:  # numpy raises nearly anything on damaged headers
        raise ValueError(f"its header cannot be read: {error}") from None
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"the shape in its header is {shape}")
    is_allowed = dtype.kind in "biufSU" if allowed is None else dtype.str in allowed
    if not is_allowed or is_fortran:
        wanted = " or ".join(allowed or ("numbers",))
        raise ValueError(f"it holds {dtype.str}, not {wanted}, or not in C order")
    return Header(shape, dtype.str, start.tell())


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be read: {reason}: prepare it again") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}: prepare it again") from error


def map_array(path: Path, dtype: str) -> Tensor:
    """An array file mapped from disk, once its size is what its header says.

    Raises:
        DataError: it is not such an array, or cannot be read.
    """
    with _damage_named(path), open_regular(path) as file:
        header = read_header(file, (dtype,))
        size = file.seek(0, 2)
        if size != header.bytes:
            raise ValueError(f"its header says {header.bytes} bytes, it has {size}")
        if not prod(header.shape):
            return torch.from_numpy(np.zeros(header.shape, header.dtype))
        # Copy-on-write, because torch wants memory it may write to; nothing ever does.
        return torch.from_numpy(np.memmap(file, dtype, "c", header.offset, header.shape))


def open_store(folder: Path) -> dict[str, Split]:
    """Open every split of a prepared folder, after checking that nothing was cut or changed.

    Raises:
        DataError: The folder is not prepared, or damaged.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest)
    classes = len(manifest.classes)
    return {name: _open_split(folder, split, classes) for name, split in manifest.splits.items()}


def _open_split(folder: Path, split: SplitFiles, classes: int) -> Split:
    path = folder / split.pixels.file
    pixels = map_array(path, split.dtype)
    layout = None if split.layout is None else map_array(folder / split.layout.file, "<i8")
    labels = None if split.labels is None else _open_labels(folder, split, classes)
    height, width, channels = split.shape
    with _damage_named(path):
        if split.layout is None or layout is None:
            if pixels.shape != (split.count, *split.shape):
                count, *shape = pixels.shape or (0,)
                raise ValueError(
                    f"it holds {count} images of {tuple(shape)}, its manifest says "
                    f"{split.count} images of {split.shape}"
                )
            return DenseSplit(pixels, split.pixels.sha256, labels)
        if layout.shape != (split.count, 3) or pixels.ndim != 1:
            raise ValueError(f"it does not hold {split.count} images of {split.shape}")
        # Offsets come from a file: none may lead out of the pixels. Bounds of the sides first, so
        # that the products cannot overflow.
        offsets, sides = layout[:, 0], layout[:, 1:]
        if not (
            ((sides >= torch.tensor((height, width))) & (sides <= LARGEST_SIDE)).all()
            and ((offsets >= 0) & (offsets <= pixels.numel() - sides.prod(1) * channels)).all()
        ):
            raise ValueError("it has image positions outside its pixels")
    sha256 = f"{split.pixels.sha256}-{split.layout.sha256}"
    return RaggedSplit(pixels, layout, (height, width), channels, sha256, labels)


def _open_labels(folder: Path, split: SplitFiles, classes: int) -> Tensor:
    assert split.labels is not None
    path = folder / split.labels.file
    labels = map_array(path, "<i8")
    with _damage_named(path):
        if labels.shape != (split.count,) or not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(f"it does not hold {split.count} numbers of {classes} classes")
    return labels


def checksum(path: Path) -> str:
    """SHA-256 of an array file after its header."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        file.seek(read_header(file).offset)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _stamp(folder: Path, array: ArrayFile) -> list[Any]:
    status = (folder / array.file).stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino, array.sha256]


def write_stamps(folder: Path, manifest: Manifest) -> None:
    """Note size, time and inode of files known to be whole, so that they are not read again."""
    stamps = {array.file: _stamp(folder, array) for array in manifest.files()}
    write_json(folder / _STAMPS_NAME, stamps)


def verify(folder: Path, manifest: Manifest) -> None:
    """Check sizes always, and checksums of files that changed since they were last checked.

    Raises:
        DataError: A file is missing, cut short or altered.
    """
    try:
        stamps = read_json(folder / _STAMPS_NAME)
    except (OSError, ValueError):
        stamps = {}
    stale = False
    for array in manifest.files():
        path = folder / array.file
        with _damage_named(path):
            stamp = _stamp(folder, array)
            if stamp[0] != array.bytes:
                raise ValueError(f"it has {stamp[0]} bytes instead of {array.bytes}")
            if not isinstance(stamps, dict) or stamps.get(array.file) != stamp:
                stale = True
                if checksum(path) != array.sha256:
                    raise ValueError("it was altered (its checksum differs)")
    if stale:
        # A read-only folder is read in full at every start; that is slow, not wrong.
        with suppress(OSError):
            write_stamps(folder, manifest)
