"""Where the files of a data set lie: its source, and its prepared form."""

import hashlib
import os
from pathlib import Path

from nvae.data.config import DataConfig
from nvae.data.listing import is_unchanged
from nvae.data.manifest import MANIFEST_NAME, DataError, read_manifest
from nvae.data.store_writer import own_files

_LONGEST_NAME = 100


def can_be_fetched(config: DataConfig) -> bool:
    """Whether we know where the files come from, by download or by hand."""
    return bool(config.torchvision or config.urls or config.files)


def source_folder(config: DataConfig) -> Path:
    """Where the source files are: named, or `root/source`, or `root` itself, which then is a
    folder or an archive of pictures."""
    if config.source is not None:
        return Path(config.source)
    inside = Path(config.root) / "source"
    is_plain_folder = config.format in ("auto", "folder") and not inside.exists()
    return Path(config.root) if is_plain_folder and not can_be_fetched(config) else inside


def target_folder(config: DataConfig) -> Path:
    """Where a preparation writes: `root` itself if it is a prepared form, else a folder inside,
    or the cache where `root` is nothing but the user's pictures.

    Raises:
        DataError: There is no home for a cache.
    """
    root = Path(config.root)
    if _is_prepared(root):
        return root
    return (_cache_folder(config) if _is_source(root, config) else root) / _shape_name(config)


def prepared_folder(config: DataConfig) -> Path:
    """Where the prepared form is or will be: as `target_folder`, or where earlier versions put
    it, among the user's pictures, unless it was made from these and they changed since."""
    target = target_folder(config)
    root = Path(config.root)
    inside = root / _shape_name(config)
    if target in (root, inside) or (target / MANIFEST_NAME).exists():
        return target
    try:
        manifest = read_manifest(inside)
        kept = is_unchanged(root, manifest.format, manifest.source_digest) or (
            not _same(Path(manifest.source), root) and Path(manifest.source).name == "source"
        )
    except DataError:
        kept = False
    return inside if kept else target


def is_among_pictures(folder: Path, config: DataConfig) -> bool:
    """Whether a prepared form lies in the user's folder, where nothing may be written."""
    root = Path(config.root)
    return folder != root and folder.parent == root and _is_source(root, config)


def is_current(config: DataConfig) -> bool:
    """Whether a data set is prepared, and from the source as it is now.

    A source that is not there any more leaves the prepared form as it is; so does another one than
    it was made from, unless the config names it.

    Raises:
        DataError: The prepared form's manifest is bad.
    """
    folder, source = prepared_folder(config), source_folder(config)
    if not (folder / MANIFEST_NAME).exists():
        return False
    if folder == Path(config.root) or not source.exists():
        return True
    manifest = read_manifest(folder)
    if config.source is None and not _same(Path(manifest.source), source):
        return True
    return is_unchanged(source, manifest.format, manifest.source_digest)


def _shape_name(config: DataConfig) -> str:
    size = config.stored_size
    suffix = "" if config.crop == "center" else f"-{config.crop}"
    return f"nvae-{size}x{size}x{config.channels}{suffix}"


def _is_prepared(folder: Path) -> bool:
    """Whether a folder is a prepared form; a `manifest.json` alone may be anybody's."""
    if not (folder / MANIFEST_NAME).exists():
        return False
    try:
        read_manifest(folder)
    except DataError:
        return bool(own_files(folder, ".npy"))  # ours, but damaged
    return True


def _is_source(root: Path, config: DataConfig) -> bool:
    return _same(source_folder(config), root)


def _same(one: Path, other: Path) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _cache_folder(config: DataConfig) -> Path:
    """The cache's folder for one source, named after it and its place."""
    place = os.path.realpath(config.root)
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:12]
    return _cache(config) / f"{os.path.basename(place)[:_LONGEST_NAME]}-{digest}"


def _cache(config: DataConfig) -> Path:
    if config.cache is not None:
        return Path(config.cache)
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(given) if given else Path("~/.cache").expanduser()
    except RuntimeError:
        raise DataError(
            "there is no home folder for the prepared form: set data.cache=FOLDER"
        ) from None
    return base / "nvae" / "data"
