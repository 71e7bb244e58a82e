"""Source files -> the prepared form: decoded in threads, written in order, committed at once."""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvae.command_line import brief
from nvae.data.config import IN_MEMORY_FORMATS, SPLITS, DataConfig, DataError
from nvae.data.decoding import decode, decode_deep
from nvae.data.labels import Label, LabelTable
from nvae.data.loader import read_ahead
from nvae.data.pixels import BadImageError, Pixels, fit, fit_array, fit_picture, keeps_depth
from nvae.data.places import (
    by_hand,
    can_be_fetched,
    download,
    is_current,
    prepared_folder,
    source_digest,
    source_folder,
)
from nvae.data.readers import (
    Item,
    MissingSourceError,
    Part,
    detect_format,
    read_source,
)
from nvae.data.readers.splits import Plan, plan_splits
from nvae.data.store import Manifest, read_manifest
from nvae.data.writing import StoreWriter, exclusive

_CHUNK = 32
_NAMES_KEPT = 100

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""

Result = tuple[int, Item, tuple[Pixels, Label | None] | BadImageError]
"""Number of the split, the picture, and its pixels and label or what is wrong with it."""


def _with_split(part: Part, destination: NDArray[np.int8]) -> Iterator[tuple[int, Item]]:
    """The pictures that go to a split, each with its number."""
    items = part.items()
    for split in destination:
        item = next(items, None)
        if item is None:
            raise DataError("the source holds fewer pictures than it says, or changed meanwhile")
        if split >= 0:
            yield int(split), item
    if next(items, None) is not None:
        raise DataError("the source holds more pictures than it says, or changed meanwhile")


def _to_array(item: Item, config: DataConfig) -> tuple[Pixels, Label | None] | BadImageError:
    try:
        picture, label = item.load()
        return _fitted(picture, config), label
    except BadImageError as error:
        return error
    except OSError as error:
        return BadImageError(f"it cannot be read: {error.strerror or error}")


def _fitted(picture: bytes | Pixels | Image.Image, config: DataConfig) -> Pixels:
    if isinstance(picture, bytes):
        if not keeps_depth(config):
            return fit(decode(picture, config.channels), config)
        picture = decode_deep(picture)
    if isinstance(picture, np.ndarray):
        return fit_array(picture, config)
    return fit_picture(picture, config)


def _read_all(
    items: Iterator[tuple[int, Item]], config: DataConfig, workers: int
) -> Iterator[Result]:
    """Decode chunks of pictures in threads (PIL holds no interpreter lock); results in order."""

    def read(chunk: list[tuple[int, Item]]) -> list[Result]:
        return [(split, item, _to_array(item, config)) for split, item in chunk]

    chunks = iter(lambda: list(islice(items, _CHUNK)), [])
    # PIL's warnings about damaged pictures are several lines each; set for all threads at once.
    with warnings.catch_warnings(action="ignore"):
        for results in read_ahead(read, chunks, workers, "nvae-prepare"):
            yield from results


def _check_space(folder: Path, images: int, config: DataConfig) -> None:
    """Stop before the work if the disk cannot hold the result."""
    needed = images * prod(config.stored_shape) * np.dtype(config.stored_type).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} needs {needed / 1e9:.1f} GB for {images} images, only "
            f"{free / 1e9:.1f} GB are free: choose another data.root"
        )


def _convert(
    parts: dict[str, Part],
    plan: Plan,
    writer: StoreWriter,
    table: LabelTable,
    config: DataConfig,
    *,
    skip_bad: bool,
    workers: int,
    progress: Progress | None,
) -> list[str]:
    """Write every picture of the source to its split, and its label to the table.

    Returns:
        The first pictures that were left out, with the reason.

    Raises:
        DataError: An unreadable picture, or nothing is left of a split.
    """
    writers = {
        SPLITS.index(split): writer.split(
            split, config.stored_shape, ragged=config.crop == "random", dtype=config.stored_type
        )
        for split, count in plan.counts.items()
        if count
    }
    skipped: list[str] = []
    total, done = sum(plan.counts.values()), 0
    for name, part in parts.items():
        items = _with_split(part, plan.destination[name])
        for split, item, result in _read_all(items, config, workers):
            if isinstance(result, BadImageError):
                if not skip_bad:
                    raise DataError(f"{item.name} cannot be used: {result}") from result
                writers[split].skipped += 1
                if len(skipped) < _NAMES_KEPT:
                    skipped.append(f"{item.name}: {result}")
            else:
                pixels, label = result
                writers[split].add(pixels)
                table.add(SPLITS[split], label, item.name)
            done += 1
            if progress is not None and (done % _CHUNK == 0 or done == total):
                progress(done, total)
    for number, made in writers.items():
        if not made.count:
            first = f"; the first that cannot is {skipped[0]}" if skipped else ""
            raise DataError(
                f"none of the {made.skipped} {SPLITS[number]} pictures can be read{first}"
            )
    return skipped


def geometry(config: DataConfig) -> dict[str, Any]:
    """How pictures become what is stored: all that it depends on beside its shape and type."""
    box = None if config.crop_box is None else list(config.crop_box)
    further = {name: getattr(config, name) for name in ("value_range", "image_key", "label_key")}
    return {
        **{"crop_box": box, "crop": config.crop, "resize": config.resize},
        **{name: value for name, value in further.items() if value is not None},
    }


def prepare(
    config: DataConfig,
    *,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Turn source files into the prepared form, replacing an older one only when done.

    Args:
        config: the data set.
        skip_bad: leave unreadable pictures out (counted in the manifest) instead of stopping at
            the first.
        workers: decoding threads; None for one a core, eight at most.
        progress: told how far it is.

    Raises:
        DataError: The source is missing or bad, or the folder cannot be written to; the message
            says what to do.
    """
    if config.format in IN_MEMORY_FORMATS:
        raise DataError(f"{config.name} is made in memory: there is nothing to prepare")
    with _locked(config) as folder:
        return _prepare(config, folder, skip_bad, workers, progress)


def prepare_if_missing(config: DataConfig) -> None:
    """Make the prepared form of a data set unless it is there, or is made in memory.

    Raises:
        DataError: As `prepare`.
    """
    if config.format in IN_MEMORY_FORMATS or is_current(config):
        return
    with _locked(config) as folder:
        # Another process may have done it while this one waited.
        if not is_current(config):
            _prepare(config, folder)


@contextmanager
def _locked(config: DataConfig) -> Iterator[Path]:
    """The prepared folder, for this process alone; a full or read-only disk is one clear line."""
    source, folder = source_folder(config), prepared_folder(config)
    if not source.exists() and not can_be_fetched(config) and not config.dataset:
        raise MissingSourceError(f"{source} does not exist")
    try:
        with exclusive(folder):
            yield folder
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error


def _prepare(
    config: DataConfig,
    folder: Path,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    source = source_folder(config)
    kind, parts = _read_or_download(config, source)
    # Before the pictures are read: what changes meanwhile is seen at the next start.
    digest = source_digest(config, kind)
    plan = plan_splits({split: part.count for split, part in parts.items()}, config)
    workers = workers or min(8, os.cpu_count() or 1)
    table = LabelTable(config.labels, [part.classes for part in parts.values()])
    with StoreWriter(folder) as writer:
        _check_space(folder, sum(plan.counts.values()), config)
        skipped = _convert(
            parts,
            plan,
            writer,
            table,
            config,
            skip_bad=skip_bad,
            workers=workers,
            progress=progress,
        )
        if table.why_lost:
            print(f"note: labels are not kept: {brief(table.why_lost)}", file=sys.stderr)
        classes, labels = table.finish()
        manifest = Manifest(
            name=config.name,
            format=kind,
            source=str(source.absolute()),
            source_digest=digest,
            geometry=geometry(config),
            split_rule=plan.rule,
            splits=writer.finish(labels),
            classes=classes,
            skipped_names=skipped,
            licence=config.licence,
            citation=config.citation,
        )
        writer.commit(manifest)
    return manifest


def picture_names(config: DataConfig, split: str) -> list[str] | None:
    """Paths of a split's pictures below the source, in the order of their indices.

    Args:
        config: a data set that is prepared.
        split: one that it has itself.

    Returns:
        None where the source is no folder or archive of pictures, is not the one that the set was
        prepared from, as it was then, or where pictures were left out.
    """
    if config.format in IN_MEMORY_FORMATS:
        return None
    source, manifest = source_folder(config), read_manifest(prepared_folder(config))
    if manifest.format != "folder" or not source.exists():
        return None
    if manifest.source_digest != source_digest(config, manifest.format):
        return None
    parts = read_source(source, manifest.format, config)
    plan = plan_splits({name: part.count for name, part in parts.items()}, config)
    number = SPLITS.index(split)
    names = [
        item.name
        for name, part in parts.items()
        for place, item in _with_split(part, plan.destination[name])
        if place == number
    ]
    return names if len(names) == manifest.splits[split].count else None


def _read_or_download(config: DataConfig, source: Path) -> tuple[str, dict[str, Part]]:
    try:
        kind = detect_format(source) if config.format == "auto" else config.format
        return kind, read_source(source, kind, config)
    except MissingSourceError as error:
        if not can_be_fetched(config):
            raise
        if not config.download:
            raise DataError(f"{error}: {by_hand(config, source)}") from error
        download(config, source)
        return config.format, read_source(source, config.format, config)
