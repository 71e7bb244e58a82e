"""What files a source consists of, by name, size and time: whether it changed since it was read."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nvae.data.manifest import MANIFEST_NAME
from nvae.data.readers.archives import ARCHIVE_SUFFIXES
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
        is_wanted = is_picture(name) or name.lower().endswith(ARCHIVE_SUFFIXES)
        if kind == "folder" and not is_wanted:
            continue
        try:
            status = os.stat(path)
        except OSError:  # a dangling link, or one that leads round in a circle
            line = f"{name}\0none\n"
        else:
            time = f"\0{status.st_mtime_ns}" if times else ""
            line = f"{name}\0{status.st_size}{time}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return (_WITH_TIMES if times else "") + digest.hexdigest()


def is_unchanged(source: Path, kind: str, digest: str) -> bool:
    """Whether a source is what it was when `digest` was taken; an empty digest says nothing."""
    if not digest:
        return True
    return digest == listing_digest(source, kind, times=digest.startswith(_WITH_TIMES))


# Strings and not Path objects: a data set may have millions of files.
def _files(source: Path) -> Iterator[tuple[str, str]]:
    """(path below the source with slashes, path) of all files that are not hidden."""
    if not source.is_dir():
        yield source.name, str(source)
        return
    for place, folders, files in os.walk(source):
        if MANIFEST_NAME in files and _PREPARED.fullmatch(os.path.basename(place)):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = "" if place == str(source) else f"{os.path.relpath(place, source)}/"
        for name in files:
            if not name.startswith(".") and name not in _NO_SOURCE:
                yield f"{below}{name}", os.path.join(place, name)
