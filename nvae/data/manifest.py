"""The small JSON file beside the arrays of a prepared data set."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
MANIFEST_NAME = "manifest.json"


class DataError(ValueError):
    """Source files or a prepared data set are missing or bad; the message is one clear line."""


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


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds and how it came about.

    Attributes:
        name: of the data set.
        format: kind of source files.
        source: where they were.
        source_digest: of the source's listing, where it is a folder of images; else empty.
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

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest in one step; this is what commits a preparation."""
        write_json(folder / MANIFEST_NAME, asdict(self))

    def files(self) -> list[ArrayFile]:
        """All arrays."""
        arrays = [(split.pixels, split.layout) for split in self.splits.values()]
        return [array for pair in arrays for array in pair if array is not None]


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: the old file stays until the new one is on disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _array(value: dict[str, Any] | None) -> ArrayFile | None:
    if value is None:
        return None
    array = ArrayFile(**value)
    if Path(array.file).name != array.file:
        raise DataError(f"the file name {array.file!r} leads out of the folder")
    return array


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        DataError: It is not there, not JSON, of another version, or lacks something.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no prepared data set ({MANIFEST_NAME} missing)") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise DataError(
            f"{path} has version {version}, this program reads {VERSION}: prepare again"
        )
    try:
        splits = {}
        for name, split in content.pop("splits").items():
            pixels = _array(split["pixels"])
            assert pixels is not None
            height, width, channels = split["shape"]
            shape = (int(height), int(width), int(channels))
            layout = _array(split["layout"])
            splits[name] = SplitFiles(split["count"], shape, pixels, layout, split["skipped"])
        return Manifest(splits=splits, **content)
    except DataError as error:
        raise DataError(f"{path} is not valid: {error}") from error
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not valid: {type(error).__name__} {error}") from error
