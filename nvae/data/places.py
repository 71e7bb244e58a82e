"""Where the files of a data set lie: its source, how it is fetched, and its prepared form."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from nvae.data.config import DataConfig, DataError
from nvae.data.readers import walk
from nvae.data.readers.folder_labels import LABEL_FILES
from nvae.data.readers.pictures import ARCHIVE_SUFFIXES, is_picture
from nvae.data.store import MANIFEST_NAME, own_files, read_manifest
from nvae.files import user_cache

_PREPARED = re.compile(r"nvae-\d+x\d+x\d+(-\d+bit|-float)?(-[a-z]+)?")
_OF_ONES_OWN = ("auto", "folder", "arrays", "huggingface")
"""Formats whose files may lie in `root` itself."""
_NO_SOURCE = ("lock.mdb",)
"""Files that other programs may change when they read a source."""


def can_be_fetched(config: DataConfig) -> bool:
    """Whether we know where the files come from, by download or by hand."""
    return bool(config.torchvision or config.urls or config.files)


def source_folder(config: DataConfig) -> Path:
    """Where the source files are: named, or `root/source`, or `root` itself, which then is a
    folder or an archive of pictures, or a file or folder of arrays."""
    if config.source is not None:
        return Path(config.source)
    inside = Path(config.root) / "source"
    is_plain_folder = config.format in _OF_ONES_OWN and not inside.exists()
    return Path(config.root) if is_plain_folder and not can_be_fetched(config) else inside


def prepared_folder(config: DataConfig) -> Path:
    """Where the prepared form is or will be: `root` itself if it is one, else a folder inside, or
    the cache where `root` is nothing but the user's pictures.

    Raises:
        DataError: There is no home for a cache.
    """
    root = Path(config.root)
    if _is_prepared(root):
        return root
    depth = "-float" if config.floats else f"-{config.bits}bit" if config.bits > 8 else ""
    crop = "" if config.crop == "center" else f"-{config.crop}"
    name = f"nvae-{'x'.join(map(str, config.stored_shape))}{depth}{crop}"
    if not _same(source_folder(config), root) or _source_is_gone(root / name):
        return root / name
    return _cache_folder(config) / name


def is_current(config: DataConfig) -> bool:
    """Whether a data set is prepared, and from the source as it is now.

    A source that is not there any more leaves the prepared form as it is; so does another one than
    it was made from, unless the config names it. One without labels is not what is asked for where
    they are needed.

    Raises:
        DataError: The prepared form's manifest is bad.
    """
    folder, source = prepared_folder(config), source_folder(config)
    if not (folder / MANIFEST_NAME).exists():
        return False
    if folder == Path(config.root) or not (source.exists() or config.dataset):
        return True
    manifest = read_manifest(folder)
    if config.labels is True and not manifest.classes:
        return False
    if config.source is None and not _same(Path(manifest.source), source):
        return True
    return manifest.source_digest == source_digest(config, manifest.format)


def _is_prepared(folder: Path) -> bool:
    """Whether a folder is a prepared form; a `manifest.json` alone may be anybody's."""
    if not (folder / MANIFEST_NAME).exists():
        return False
    try:
        read_manifest(folder)
    except DataError:
        return bool(own_files(folder, ".npy"))  # ours, but damaged
    return True


def _source_is_gone(folder: Path) -> bool:
    """Whether a prepared form was made from the folder `source` beside it, which is not there."""
    try:
        source = Path(read_manifest(folder).source)
    except DataError:
        return False
    return source.name == "source" and not os.path.exists(source)


def _same(one: Path, other: Path) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _cache_folder(config: DataConfig) -> Path:
    """The cache's folder for one source, named after it and its place."""
    place = os.path.realpath(config.root)
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:12]
    name = f"{os.path.basename(place)[:100]}-{digest}"
    if config.cache is not None:
        return Path(config.cache) / name
    try:
        base = user_cache()
    except OSError:
        raise DataError(
            "there is no home folder for the prepared form: set data.cache=FOLDER"
        ) from None
    return Path(base, "nvae", "data", name)


def source_digest(config: DataConfig, kind: str) -> str:
    """What a prepared form notes of its source, so that a change is seen: of a data set that is an
    object its settings, of files :func:`listing_digest`."""
    if config.dataset:
        settings = json.dumps(config.dataset, sort_keys=True, default=str)
        return f"settings:{hashlib.sha256(settings.encode()).hexdigest()}"
    return listing_digest(source_folder(config), kind)


def listing_digest(source: Path, kind: str) -> str:
    """A digest of the names, sizes and times of a source's files.

    Pictures exchanged under the same names and sizes have other times. In a folder of pictures
    only pictures, archives and lists of labels count. Hidden files and prepared forms never do.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_files(source)):
        is_wanted = is_picture(name) or name.lower().endswith((*ARCHIVE_SUFFIXES, *LABEL_FILES))
        if kind == "folder" and not is_wanted:
            continue
        try:
            status = os.stat(path)
            line = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError:  # a dangling link, or one that leads round in a circle
            line = f"{name}\0none\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return f"times:{digest.hexdigest()}"  # of names, sizes and times


# Strings and not Path objects: a data set may have millions of files.
def _files(source: Path) -> Iterator[tuple[str, str]]:
    """(path below the source with slashes, path) of all files that are not hidden."""
    if not source.is_dir():
        yield source.name, str(source)
        return
    for place, folders, files in walk(source):
        if MANIFEST_NAME in files and _PREPARED.fullmatch(os.path.basename(place)):
            folders.clear()
            continue
        below = "" if place == str(source) else f"{os.path.relpath(place, source)}/"
        for name in files:
            if not name.startswith(".") and name not in _NO_SOURCE:
                yield f"{below}{name}", os.path.join(place, name)


def by_hand(config: DataConfig, folder: Path) -> str:
    """What to put where, in one line."""
    files = ", ".join(config.files) or "the source files"
    where = f" (from {config.homepage})" if config.homepage else ""
    return f"put {files}{where} into {folder.absolute()}"


def download(config: DataConfig, folder: Path) -> None:
    """Fetch the source files of a data set into `folder`, checked against known checksums.

    Raises:
        DataError: No public address, no network, or a wrong checksum; the message says which
            files to put where by hand.
    """
    if not config.torchvision and not config.urls:
        raise DataError(f"{config.name} cannot be downloaded: {by_hand(config, folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    from torchvision.datasets.utils import download_url  # takes seconds

    try:
        if config.torchvision:
            _from_torchvision(config.torchvision, folder)
        for url in config.urls:
            name = url.rpartition("/")[2]
            partial = folder / f"{name}.partial"
            # Without a known checksum a half-fetched file would pass for a whole one, also with
            # torchvision, which fetches nothing where there is a file.
            partial.unlink(missing_ok=True)
            download_url(url, str(folder), partial.name)
            partial.replace(folder / name)
    # torchvision reports a wrong checksum, a missing gdown and a full quota as RuntimeError.
    except (OSError, HTTPException, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{config.name} could not be downloaded ({reason}): {by_hand(config, folder)}"
        ) from error


def _from_torchvision(name: str, folder: Path) -> None:
    from torchvision import datasets
    from torchvision.datasets import utils

    data_set: Any = getattr(datasets, name)
    if hasattr(data_set, "resources"):  # MNIST and its kin: several files, each on several mirrors
        for file, md5 in data_set.resources:
            for last, mirror in enumerate(data_set.mirrors, 1 - len(data_set.mirrors)):
                try:
                    utils.download_url(f"{mirror}{file}", str(folder), file, md5)
                    break
                except (OSError, HTTPException):
                    if last == 0:
                        raise
    elif hasattr(data_set, "tgz_md5"):
        utils.download_url(data_set.url, str(folder), data_set.filename, data_set.tgz_md5)
    else:
        for identity, md5, file in data_set.file_list:
            utils.download_file_from_google_drive(identity, str(folder), file, md5)
