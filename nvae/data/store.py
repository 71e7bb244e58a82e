"""Opening a prepared data set: arrays mapped from disk, shared by all processes of a machine."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvae.data.manifest import LARGEST_SIDE, ArrayFile, DataError, Manifest, read_manifest
from nvae.data.npy import map_array, read_header
from nvae.data.tables import DenseTable, ImageTable, RaggedTable
from nvae.files import open_regular, read_json, write_json

_STAMPS_NAME = "verified.json"
_CHUNK = 1 << 22


def open_store(folder: Path, *, keep_stamps: bool = True) -> dict[str, ImageTable]:
    """Open every split of a prepared folder, after checking that nothing was cut or changed.

    Args:
        folder: of the prepared form.
        keep_stamps: note which files were found whole; False writes nothing.

    Raises:
        DataError: The folder is not prepared, or damaged.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest, keep_stamps=keep_stamps)
    tables: dict[str, ImageTable] = {}
    for name, split in manifest.splits.items():
        path = folder / split.pixels.file
        pixels = _map(path, "|u1")
        if split.layout is None:
            if pixels.shape != (split.count, *split.shape):
                count, *shape = pixels.shape or (0,)
                raise DataError(
                    f"{path} holds {count} images of {tuple(shape)}, its manifest says "
                    f"{split.count} images of {split.shape}: prepare it again"
                )
            tables[name] = DenseTable(pixels, split.pixels.sha256)
        else:
            layout = _map(folder / split.layout.file, "<i8")
            size, width, channels = split.shape
            if layout.shape != (split.count, 3) or pixels.ndim != 1 or size != width:
                raise DataError(
                    f"{path} does not hold {split.count} images of {split.shape}, as its manifest "
                    "says: prepare it again"
                )
            _check_layout(folder, layout, pixels, size, channels)
            sha256 = f"{split.pixels.sha256}-{split.layout.sha256}"
            tables[name] = RaggedTable(pixels, layout, size, channels, sha256)
    return tables


def _map(path: Path, dtype: str) -> Tensor:
    # Copy-on-write, because torch wants memory it may write to; nothing ever does.
    try:
        return torch.from_numpy(map_array(path, dtype))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not an array: {error}: prepare it again") from error


def _check_layout(folder: Path, layout: Tensor, pixels: Tensor, size: int, channels: int) -> None:
    """Offsets come from a file: none may lead out of the pixels."""
    offsets, sides = layout[:, 0], layout[:, 1:]
    # Bounds first, so that the products cannot overflow.
    fits = ((sides >= size) & (sides <= LARGEST_SIDE)).all() and (
        (offsets >= 0) & (offsets <= pixels.numel() - sides.prod(1) * channels)
    ).all()
    if not fits:
        raise DataError(f"{folder} has image positions outside its pixels: prepare it again")


def checksum(path: Path) -> str:
    """SHA-256 of an array file after its header."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        file.seek(read_header(file, ("|u1", "<i8")).offset)
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


def _read_stamps(folder: Path) -> dict[str, Any]:
    try:
        stamps = read_json(folder / _STAMPS_NAME)
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def verify(folder: Path, manifest: Manifest, *, keep_stamps: bool = True) -> None:
    """Check sizes always, and checksums of files that changed since they were last checked.

    Raises:
        DataError: A file is missing, cut short or altered.
    """
    stamps = _read_stamps(folder)
    stale = False
    for array in manifest.files():
        path = folder / array.file
        _check_size(path, array)
        if stamps.get(array.file) != [*_stamp(path), array.sha256]:
            stale = True
            _check_sum(path, array)
    if stale and keep_stamps:
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
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not an array: {error}: prepare it again") from error
    if found != array.sha256:
        raise DataError(f"{path} was altered (its checksum differs): prepare it again")
