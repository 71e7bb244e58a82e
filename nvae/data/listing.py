"""What files a source consists of, by name, size and time: whether it changed since it was read."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nvae.data.manifest import MANIFEST_NAME
from nvae.data.readers.archives import is_archive
from nvae.data.readers.folder import is_picture

_WITH_TIMES = "times:"
_PREPARED = re.compile(r"nvae-\d+x\d+x\d(-[a-z]+)?")
_NO_SOURCE = ("lock.mdb",)
"""Files that reading a source with other programs may touch."""


def listing_digest(source: Path, kind: str, *, times: bool = True) -> str:
    """A digest of the names, sizes and times of a source's files.

    Pictures exchanged under the same names and sizes have other times. In a folder of pictures
    only pictures and archives count. Hidden files and prepared forms never do.

    Args:
        source: folder or file.
        kind: its format.
        times: False is how digests were made before: of names and sizes alone.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_files(source)):
        if kind == "folder" and not is_picture(path.name) and not is_archive(path):
            continue
        try:
            status = path.stat()
        except OSError:  # a dangling link, or one that leads round in a circle
            digest.update(f"{name}\0none\n".encode("utf-8", "surrogateescape"))
            continue
        line = f"{name}\0{status.st_size}" + (f"\0{status.st_mtime_ns}" if times else "")
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return (_WITH_TIMES if times else "") + digest.hexdigest()


def is_unchanged(source: Path, kind: str, digest: str) -> bool:
    """Whether a source is what it was when `digest` was taken; an empty digest says nothing."""
    if not digest:
        return True
    return digest == listing_digest(source, kind, times=digest.startswith(_WITH_TIMES))


def _files(source: Path) -> Iterator[tuple[str, Path]]:
    """(path below the source, path) of all files that are not hidden."""
    if not source.is_dir():
        yield source.name, source
        return
    for place, folders, files in os.walk(source):
        if MANIFEST_NAME in files and _PREPARED.fullmatch(os.path.basename(place)):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name not in _NO_SOURCE:
                path = Path(place, name)
                yield path.relative_to(source).as_posix(), path
