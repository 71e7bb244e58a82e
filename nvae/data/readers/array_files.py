"""Arrays of images in files: NPY and NPZ, and by `hdf5.py` HDF5 and Zarr.

Each file, or thing in a file, has a name: `train.npy`, `x_train` in an npz, `train/images` in HDF5.
A word of the name says the split, another whether it holds labels. Images are (N, H, W) or
(N, H, W, C); (N, C, H, W) where that alone fits the channels wanted. Nothing is unpickled.
"""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvae.data.config import TRAIN, DataConfig, DataError
from nvae.data.readers import (
    ARRAY_SUFFIXES,
    LABEL_KEYS,
    MissingSourceError,
    Part,
    Reader,
    damage_named,
    is_array_file,
    key_among,
    open_source,
    read_pieces,
)
from nvae.data.readers.hdf5 import hdf5_arrays, zarr_arrays
from nvae.data.readers.pictures import open_member
from nvae.data.readers.rows import Rows, part_of
from nvae.data.readers.splits import split_of_word
from nvae.data.store import Header, read_header


class Arrays(Reader):
    """Every array in `source`: a file, or a folder of files."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        source = self.source
        if is_array_file(source) and source.exists():
            named = dict(_arrays_of(source, ""))
        elif source.is_dir():
            named = {}
            for path in sorted(path for path in source.iterdir() if is_array_file(path)):
                named |= _arrays_of(path, path.name[: -len(path.suffix)])
        else:
            named = {}
        if not named:
            raise MissingSourceError(f"no {' or '.join(ARRAY_SUFFIXES)} files found in {source}")
        return _by_split(named, self.config)


def _by_split(named: dict[str, Rows], config: DataConfig) -> dict[str, Part]:
    images: dict[str, dict[str, Rows]] = {}
    labels: dict[str, dict[str, Rows]] = {}
    for name, rows in named.items():
        words = re.split(r"[^A-Za-z0-9]+", name)
        split = next(filter(None, map(split_of_word, words)), None)
        what = "_".join(word for word in words if split_of_word(word) is None)
        of_labels = {config.label_key} if config.label_key else set(LABEL_KEYS)
        is_label = bool({name, what, *words} & of_labels)
        (labels if is_label else images).setdefault(split or "", {})[what] = rows
    if "" in images and len(images) > 1 and config.image_key is None:
        images.pop("")  # beside those that say their split, such as a mean
    if TRAIN not in images:
        images = {TRAIN: images.get("", {})} if list(images) == [""] else {}
        labels = {TRAIN: labels.get("", labels.get(TRAIN, {}))}
    if TRAIN not in images:
        raise DataError(f"none of {', '.join(named)} is named as training images are: train")
    return {
        split: part_of(_images(found, config, split), _labels(labels.get(split, {}), split), config)
        for split, found in images.items()
        if split
    }


def _images(found: dict[str, Rows], config: DataConfig, split: str) -> Rows:
    """The images among the arrays of a split."""
    if config.image_key is not None:
        key = key_among(found, config.image_key, (), "image_key")
        return found[str(key)]
    fitting = {name: rows for name, rows in found.items() if len(rows.shape) in (3, 4)}
    if len(fitting) != 1:
        names = ", ".join(f"{name} {rows.shape}" for name, rows in found.items()) or "nothing"
        raise DataError(
            f"the {split} images must be one array (N, H, W) or (N, H, W, C), and there is "
            f"{names}: name it with data.image_key"
        )
    return next(iter(fitting.values()))


def _labels(found: dict[str, Rows], split: str) -> Rows | None:
    if len(found) > 1:
        raise DataError(
            f"the {split} labels may be {' or '.join(found)}: name them with data.label_key"
        )
    return next(iter(found.values()), None)


def _arrays_of(path: Path, stem: str) -> Iterator[tuple[str, Rows]]:
    """The arrays of one file by name, its own name first where it is one of several."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        yield stem, _npy(path)
        return
    if suffix == ".npz":
        found = _npz(path)
    else:
        found = zarr_arrays(path) if suffix == ".zarr" else hdf5_arrays(path)
    for name, rows in found.items():
        yield f"{stem}/{name}" if stem else name, rows


def _npy(path: Path) -> Rows:
    with damage_named(path), open_source(path) as file:
        header = read_header(file)
        size = file.seek(0, 2)
        if size != header.bytes:
            raise ValueError(f"its header says {header.bytes} bytes, it has {size}")

    def blocks() -> Iterator[NDArray[Any]]:
        with damage_named(path), open_source(path) as file:
            if read_header(file) != header:
                raise ValueError("it changed meanwhile")
            if prod(header.shape):
                mapped = np.memmap(file, header.dtype, "r", header.offset, header.shape)
                for start in range(0, header.shape[0], rows.step):
                    yield mapped[start : start + rows.step]

    rows = _rows(path.name, header, blocks)
    return rows


def _npz(path: Path) -> dict[str, Rows]:
    with damage_named(path), open_source(path) as raw, zipfile.ZipFile(raw) as archive:
        members = [each for each in archive.infolist() if each.filename.endswith(".npy")]
        return {m.filename.removesuffix(".npy"): _npz_member(path, archive, m) for m in members}


def _npz_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Rows:
    name = f"{path.name}/{member.filename.removesuffix('.npy')}"
    with damage_named(name), open_member(archive, member) as file:
        header = read_header(file)
        if header.bytes != member.file_size:
            raise ValueError(
                f"its header says {header.bytes} bytes, the archive {member.file_size}"
            )

    def blocks() -> Iterator[NDArray[Any]]:
        with _opened_member(path, member.filename, name) as file:
            read_pieces(file, header.offset)
            width = prod(header.shape[1:]) * np.dtype(header.dtype).itemsize
            for start in range(0, header.shape[0], rows.step):
                count = min(rows.step, header.shape[0] - start)
                data = read_pieces(file, count * width)
                if len(data) != count * width:
                    raise ValueError("it is cut short")
                yield np.frombuffer(data, header.dtype).reshape(count, *header.shape[1:])
            file.read(1)  # the checksum is compared at the end

    rows = _rows(name, header, blocks)
    return rows


@contextmanager
def _opened_member(path: Path, member: str, name: str) -> Iterator[Any]:
    with (
        damage_named(name),
        open_source(path) as raw,
        zipfile.ZipFile(raw) as archive,
        open_member(archive, archive.getinfo(member)) as file,
    ):
        yield file


def _rows(name: str, header: Header, blocks: Callable[[], Iterator[NDArray[Any]]]) -> Rows:
    if not header.shape:
        header = header._replace(shape=(0,))  # a number alone, such as a version
    return Rows(name, header.shape, np.dtype(header.dtype), blocks)
