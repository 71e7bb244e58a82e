"""From a config to open tables, whatever the source; preparing what is not yet prepared."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvae.data.catalog import prepare_command
from nvae.data.config import IN_MEMORY_FORMATS, DataConfig
from nvae.data.conversion import Progress, check_space, convert, plan_splits
from nvae.data.download import by_hand, download
from nvae.data.listing import listing_digest
from nvae.data.manifest import MANIFEST_NAME, DataError, Manifest, read_manifest
from nvae.data.memory import open_in_memory
from nvae.data.places import (
    can_be_fetched,
    is_among_pictures,
    is_current,
    prepared_folder,
    source_folder,
    target_folder,
)
from nvae.data.readers import MissingSourceError, Part, detect_format, read_source
from nvae.data.splits import TOO_FEW
from nvae.data.store import open_store
from nvae.data.store_writer import StoreWriter, exclusive
from nvae.data.tables import SPLITS, TEST, TRAIN, VALID, ImageTable


def geometry(config: DataConfig) -> dict[str, Any]:
    """How pictures become squares: what the prepared pixels depend on beside their shape."""
    box = None if config.crop_box is None else list(config.crop_box)
    return {"crop_box": box, "crop": config.crop, "resize": config.resize}


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
        skip_bad: leave unreadable pictures out (counted in the manifest) instead of stopping.
        workers: decoding threads.
        progress: told how far it is.

    Raises:
        DataError: The source is missing or bad; the message says what to do.
        OSError: The disk is full or the folder cannot be written to.
    """
    if config.format in IN_MEMORY_FORMATS:
        raise DataError(f"{config.name} is made in memory: there is nothing to prepare")
    with _locked(config) as folder:
        return _prepare(config, folder, skip_bad=skip_bad, workers=workers, progress=progress)


@contextmanager
def _locked(config: DataConfig) -> Iterator[Path]:
    """The prepared folder, for this process alone; a full or read-only disk is one clear line."""
    source, folder = source_folder(config), target_folder(config)
    if not source.exists() and not can_be_fetched(config):
        raise MissingSourceError(f"{source} does not exist")
    try:
        with exclusive(folder):
            yield folder
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error


def _prepare(
    config: DataConfig,
    folder: Path,
    *,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    source = source_folder(config)
    kind, parts = _read_or_download(config, source)
    # Before the pictures are read: what changes meanwhile is seen at the next start.
    digest = listing_digest(source, kind)
    plan = plan_splits(parts, config)
    with StoreWriter(folder) as writer:
        check_space(folder, plan.counts, config)
        skipped = convert(
            parts,
            plan,
            writer,
            config,
            skip_bad=skip_bad,
            workers=workers,
            progress=progress,
        )
        manifest = Manifest(
            name=config.name,
            format=kind,
            source=str(source.absolute()),
            source_digest=digest,
            geometry=geometry(config),
            split_rule=plan.rule,
            splits=writer.finish(),
            skipped_names=skipped,
            licence=config.licence,
            citation=config.citation,
        )
        writer.commit(manifest)
    return manifest


def prepare_if_missing(config: DataConfig, progress: Progress | None = None) -> None:
    """Make the prepared form of a data set unless it is there, or is made in memory.

    Raises:
        DataError: As `prepare`.
    """
    if config.format in IN_MEMORY_FORMATS:
        return
    if is_current(config):
        return
    with _locked(config) as folder:
        # Another process may have done it while this one waited.
        if not is_current(config):
            _prepare(config, folder, progress=progress)


def open_tables(config: DataConfig) -> dict[str, ImageTable]:
    """Open the splits that a data set has; an empty split is left out.

    Raises:
        ValueError: It is not prepared, damaged, or not what the config describes.
    """
    if config.format in IN_MEMORY_FORMATS:
        tables, skipped = open_in_memory(config), {}
    else:
        folder = prepared_folder(config)
        if not (folder / MANIFEST_NAME).exists():
            raise DataError(
                f"{config.name} is not prepared ({folder} is not there); run: "
                f"{prepare_command(config)}"
            )
        tables = open_store(folder, keep_stamps=not is_among_pictures(folder, config))
        manifest = read_manifest(folder)
        skipped = {split: files.skipped for split, files in manifest.splits.items()}
        found = manifest.geometry
        if found != geometry(config):
            raise DataError(
                f"{folder} was prepared with {_words(found)}, the config says "
                f"{_words(geometry(config))}: prepare it again or change the config"
            )
    _check(config, tables, skipped)
    return tables


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _check(config: DataConfig, tables: dict[str, ImageTable], skipped: dict[str, int]) -> None:
    """Hold the open splits against the config: shape and sizes."""
    size = config.stored_size
    wanted = (size, size, config.channels)
    for split, table in tables.items():
        if table.shape != wanted:
            raise DataError(
                f"the prepared {split} images of {config.name} are "
                f"{'x'.join(map(str, table.shape))}, the config wants "
                f"{'x'.join(map(str, wanted))}: prepare them again or change data.image_size, "
                "data.pad or data.channels"
            )
    for split in SPLITS:
        asked = getattr(config, f"{split}_size")
        have = len(tables.get(split, ()))
        if asked is not None and asked != have + skipped.get(split, 0):
            raise DataError(
                f"{config.name} has {have} {split} images, the config says "
                f"data.{split}_size={asked}: prepare it again or change the config"
            )
    if TRAIN not in tables:
        raise DataError(f"{config.name} has no training images")
    if VALID not in tables and TEST not in tables:
        if config.format not in IN_MEMORY_FORMATS and len(tables[TRAIN]) == 1:
            raise DataError(f"{config.name} has one picture; {TOO_FEW}")
        raise DataError(
            f"{config.name} has neither validation nor test images: set data.valid_size"
        )
