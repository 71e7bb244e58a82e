"""From a config to open tables, whatever the source; preparing what is not yet prepared."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvae.data.config import IN_MEMORY_FORMATS, DataConfig
from nvae.data.conversion import Progress, check_space, convert, plan_splits
from nvae.data.download import by_hand, download
from nvae.data.manifest import MANIFEST_NAME, DataError, Manifest, read_manifest
from nvae.data.memory import open_in_memory
from nvae.data.readers import MissingSourceError, Part, detect_format, read_source
from nvae.data.readers.folder import listing_digest
from nvae.data.store import open_store
from nvae.data.store_writer import StoreWriter, exclusive
from nvae.data.tables import SPLITS, TEST, TRAIN, VALID, ImageTable


def geometry(config: DataConfig) -> dict[str, Any]:
    """How pictures become squares: what the prepared pixels depend on beside their shape."""
    box = None if config.crop_box is None else list(config.crop_box)
    return {"crop_box": box, "crop": config.crop, "resize": config.resize}


def prepared_folder(config: DataConfig) -> Path:
    """Where the prepared form is or will be: `root` itself if it is one, else inside it."""
    root = Path(config.root)
    if (root / MANIFEST_NAME).exists():
        return root
    size = config.stored_size
    suffix = "" if config.crop == "center" else f"-{config.crop}"
    return root / f"nvae-{size}x{size}x{config.channels}{suffix}"


def _can_be_fetched(config: DataConfig) -> bool:
    """Whether we know where the files come from, by download or by hand."""
    return bool(config.torchvision or config.urls or config.files)


def source_folder(config: DataConfig) -> Path:
    """Where the source files are: named, or `root/source`, or a folder of pictures itself."""
    if config.source is not None:
        return Path(config.source)
    inside = Path(config.root) / "source"
    is_plain_folder = config.format in ("auto", "folder") and not inside.exists()
    return Path(config.root) if is_plain_folder and not _can_be_fetched(config) else inside


def _read_or_download(config: DataConfig, source: Path) -> tuple[str, dict[str, Part]]:
    try:
        kind = detect_format(source) if config.format == "auto" else config.format
        return kind, read_source(source, kind, config)
    except MissingSourceError as error:
        if not _can_be_fetched(config):
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
    source, folder = source_folder(config), prepared_folder(config)
    if not source.exists() and not _can_be_fetched(config):
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
        digest = listing_digest(source) if kind == "folder" and source.is_dir() else ""
        manifest = Manifest(
            name=config.name,
            format=kind,
            source=str(source),
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


def _is_current(config: DataConfig) -> bool:
    """Prepared, and not outdated: a folder of pictures that is its own source may have grown."""
    root, folder = Path(config.root), prepared_folder(config)
    if not (folder / MANIFEST_NAME).exists():
        return False
    if folder == root or source_folder(config) != root:
        return True
    return read_manifest(folder).source_digest in ("", listing_digest(root))


def prepare_if_missing(config: DataConfig, progress: Progress | None = None) -> None:
    """Make the prepared form of a data set unless it is there, or is made in memory.

    Raises:
        DataError: As `prepare`.
    """
    if config.format in IN_MEMORY_FORMATS:
        return
    if _is_current(config):
        return
    with _locked(config) as folder:
        # Another process may have done it while this one waited.
        if not _is_current(config):
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
        tables = open_store(folder)
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
        raise DataError(
            f"{config.name} has neither validation nor test images: set data.valid_size"
        )
