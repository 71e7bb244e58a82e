"""The small JSON file beside the arrays of a prepared data set."""

import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from nvae.command_line import brief
from nvae.files import read_json, write_json
from nvae.settings import check_fields

VERSION = 1
MANIFEST_NAME = "manifest.json"
LARGEST_SIDE = 65_536
"""Pixels along one side of any picture."""

_ARRAY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.npy")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SMALLEST_ARRAY = 64
"""Bytes of an empty array's file: numpy pads its headers to this."""

T = TypeVar("T")


class DataError(ValueError):
    """Source files or a prepared data set are missing or bad; the message is one clear line."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message))


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
        pixels: uint8, (N, H, W, C), or flat where images differ in size.
        layout: (N, 3) int64 offset, height, width where images differ in size, else None.
        skipped: unreadable images left out.
    """

    count: int
    shape: tuple[int, int, int]
    pixels: ArrayFile
    layout: ArrayFile | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        check_fields(self, count=(1, None), shape=(1, LARGEST_SIDE), skipped=(0, None))
        if len(self.shape) != 3:
            raise ValueError(f"shape={list(self.shape)} is not height, width and channels")


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds and how it came about.

    Attributes:
        name: of the data set.
        format: kind of source files.
        source: where they were.
        source_digest: of the source's listing (`nvae.data.listing`); empty where it is not known.
        geometry: crop_box, crop and resize, as in `DataConfig`.
        split_rule: how images were assigned to splits.
        splits: by name.
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
        arrays = [(split.pixels, split.layout) for split in self.splits.values()]
        return [array for pair in arrays for array in pair if array is not None]


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
        splits = {
            name: _split(value, f"splits.{name}")
            for name, value in _object(content["splits"], "splits").items()
        }
        return _made(Manifest, {**content, "splits": splits}, "it")
    except KeyError:
        raise DataError(f"{path} is not valid: it lacks splits") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid: {error}") from error


def _split(value: object, where: str) -> SplitFiles:
    content = _object(value, where)
    if isinstance(content.get("shape"), list):
        content = {**content, "shape": tuple(content["shape"])}
    for name in ("pixels", "layout"):
        if content.get(name) is not None:
            content = {**content, name: _made(ArrayFile, content[name], f"{where}.{name}")}
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
        name
        for name, each in known.items()
        if each.default is MISSING and each.default_factory is MISSING
    }
    for names, fault in ((needed - content.keys(), "lacks"), (content.keys() - known, "has also")):
        if names:
            raise ValueError(f"{where} {fault} {', '.join(sorted(names))}")
    try:
        return cls(**content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
