"""Classes of pictures in folders: the first folder below the split, or what a CSV file says."""

import csv
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from nvae.data.config import DataError
from nvae.data.readers.splits import split_of_word

LABEL_FILES = ("labels.csv", "metadata.csv")
"""Read where they lie among the pictures; the second is what Hugging Face calls them."""
_FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
_LABEL_COLUMNS = ("label", "class")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz")


class Table(NamedTuple):
    """A CSV file of labels.

    Attributes:
        title: for error messages.
        place: the folder that it lies in, named as the pictures are.
        content: of the file.
    """

    title: str
    place: str
    content: bytes


class FolderLabels:
    """The label of every picture of a source.

    Args:
        names: of the pictures, with slashes.
        tables: CSV files among them. Where there is one, folders say nothing.

    Raises:
        DataError: A CSV file is not one of file names and labels.
    """

    def __init__(self, names: list[str], tables: list[Table]) -> None:
        self._names = names
        self._listed = {name: label for table in tables for name, label in _rows(table)}
        # A class may be called train; such a folder is a split only where every picture is in one.
        self._has_splits = all(_below_split(name.split("/")[:-1]) for name in names)
        self._skip = 0 if tables else self._shared_depth()
        self._has_table = bool(tables)

    def of(self, position: int) -> str | None:
        """The label of a picture; None where it has none."""
        name = self._names[position]
        if self._has_table:
            return self._listed.get(name)
        folders = self._folders(name)[self._skip :]
        return folders[0] if folders else None

    def _folders(self, name: str) -> list[str]:
        """The folders of a picture below its split; an archive is no folder."""
        words = name.split("/")[:-1]
        below = _below_split(words) if self._has_splits else 0
        return [word for word in words[below:] if not word.lower().endswith(_ARCHIVES)]

    def _shared_depth(self) -> int:
        """How many folders all pictures share: an archive often has one around everything."""
        shared: list[str] | None = None
        for name in self._names:
            # The last folder is never left out: it may be the one class that there is.
            folders = self._folders(name)[:-1]
            if shared is None:
                shared = folders
            same = [one == other for one, other in zip(shared, folders, strict=False)]
            shared = shared[: same.index(False) if False in same else len(same)]
            if not shared:
                return 0
        return len(shared or ())


def _below_split(words: list[str]) -> int:
    """Where the folders below the first that names a split begin; 0 where none does."""
    return next((i for i, word in enumerate(words, 1) if split_of_word(word)), 0)


def _rows(table: Table) -> Iterator[tuple[str, str]]:
    """(name of the picture, label) of every line of a CSV file."""
    title, place, content = table
    lines = csv.reader(content.decode("utf-8-sig", "replace").splitlines())
    try:
        header = [word.strip().lower() for word in next(lines, [])]
        columns = [
            next((header.index(name) for name in names if name in header), None)
            for names in (_FILE_COLUMNS, _LABEL_COLUMNS)
        ]
        if None in columns:
            raise DataError(
                f"{title} must begin with a line that names its columns: file,label (it begins "
                f"with {','.join(header)[:100]!r}); data.labels=false passes over it"
            )
        of_file, of_label = (int(column or 0) for column in columns)
        for row in lines:
            if not row:
                continue
            if len(row) <= max(of_file, of_label):
                raise DataError(f"{title}, line {lines.line_num}: it has {len(row)} columns")
            yield str(PurePosixPath(place, row[of_file].strip())), row[of_label].strip()
    except csv.Error as error:
        raise DataError(f"{title}, line {lines.line_num}: {error}") from error
