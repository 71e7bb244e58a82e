"""Opening a prepared data set: arrays mapped from disk, shared by all processes of a machine."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvae.data.manifest import ArrayFile, DataError, Manifest, read_manifest, write_json
from nvae.data.tables import DenseTable, ImageTable, RaggedTable

_STAMPS_NAME = "verified.json"
_CHUNK = 1 << 22


def open_store(folder: Path) -> dict[str, ImageTable]:
    """Open every split of a prepared folder, after checking that nothing was cut or changed.

    Raises:
        DataError: The folder is not prepared, or damaged.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest)
    tables: dict[str, ImageTable] = {}
    for name, split in manifest.splits.items():
        pixels = _map(folder / split.pixels.file)
        if split.layout is None:
            table: ImageTable = DenseTable(pixels, split.pixels.sha256)
        else:
            layout = torch.from_numpy(_load(folder / split.layout.file))
            size, _, channels = split.shape
            _check_layout(folder, layout, pixels, size, channels)
            sha256 = f"{split.pixels.sha256}-{split.layout.sha256}"
            table = RaggedTable(pixels, layout, size, channels, sha256)
        if len(table) != split.count or table.shape != split.shape:
            raise DataError(
                f"{folder / split.pixels.file} holds {len(table)} images of {table.shape}, its "
                f"manifest says {split.count} of {split.shape}: prepare it again"
            )
        tables[name] = table
    return tables


def _map(path: Path) -> Tensor:
    # Copy-on-write, because torch wants memory it may write to; nothing ever does.
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not an array: {error}: prepare it again") from error


def _load(path: Path) -> NDArray[np.int64]:
    array: NDArray[np.int64] = np.load(path, allow_pickle=False)
    return array


def _check_layout(folder: Path, layout: Tensor, pixels: Tensor, size: int, channels: int) -> None:
    """Offsets come from a file: none may lead out of the pixels."""
    ends = layout[:, 0] + layout[:, 1] * layout[:, 2] * channels
    fits = (layout[:, 0] >= 0) & (layout[:, 1:] >= size).all(1) & (ends <= pixels.numel())
    if not fits.all():
        raise DataError(f"{folder} has image positions outside its pixels: prepare it again")


def checksum(path: Path) -> str:
    """SHA-256 of an array file after its header."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            np.lib.format.read_array_header_1_0(file)
        else:
            np.lib.format.read_array_header_2_0(file)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def write_stamps(folder: Path, manifest: Manifest) -> None:
    """Note size, time and inode of files known to be whole, so that they are not read again."""
    stamps = {
        array.file: [*_stamp(folder / array.file), array.sha256] for array in manifest.files()
    }
    write_json(folder / _STAMPS_NAME, stamps)


def verify(folder: Path, manifest: Manifest) -> None:
    """Check sizes always, and checksums of files that changed since they were last checked.

    Raises:
        DataError: A file is missing, cut short or altered.
    """
    try:
        stamps = json.loads((folder / _STAMPS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stamps = {}
    stale = False
    for array in manifest.files():
        path = folder / array.file
        _check_size(path, array)
        if stamps.get(array.file) != [*_stamp(path), array.sha256]:
            stale = True
            _check_sum(path, array)
    if stale:
        try:
            write_stamps(folder, manifest)
        except OSError:
            # A read-only folder is read in full at every start; that is slow, not wrong.
            return


def _check_size(path: Path, array: ArrayFile) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}: prepare it again") from error
    if size != array.bytes:
        raise DataError(f"{path} has {size} bytes instead of {array.bytes}: prepare it again")


def _check_sum(path: Path, array: ArrayFile) -> None:
    try:
        found = checksum(path)
    except ValueError as error:
        raise DataError(f"{path} is not an array: {error}: prepare it again") from error
    if found != array.sha256:
        raise DataError(f"{path} was altered (its checksum differs): prepare it again")
