"""Writing a prepared form: its arrays under temporary names, then a manifest that names them.

An older preparation in the same folder stays valid until the new manifest replaces the old one.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.lib.format as npy
from numpy.typing import NDArray

from nvae.data.store import (
    PARTIAL,
    ArrayFile,
    Manifest,
    SplitFiles,
    own_files,
    write_stamps,
)


class _ArrayWriter:
    """Appends rows to one array; its final name carries the checksum."""

    def __init__(self, folder: Path, stem: str, dtype: str, row: tuple[int, ...]) -> None:
        self._stem, self._dtype, self._row = stem, dtype, row
        self.path = folder / f"{stem}{PARTIAL}"
        self.file = self.path.open("wb")
        self._digest = hashlib.sha256()
        self.length = 0
        self._write_header(0)

    def _write_header(self, count: int) -> None:
        # numpy leaves room for the count to grow: the header is as long when it is written again.
        shape = (count, *self._row)
        header = {"descr": self._dtype, "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self.file, header)

    def add(self, array: NDArray[np.generic]) -> None:
        data = np.ascontiguousarray(array).data.cast("B")
        self.file.write(data)
        self._digest.update(data)
        self.length += len(data)

    @property
    def count(self) -> int:
        """Numbers that were added."""
        return self.length // np.dtype(self._dtype).itemsize

    def finish(self, count: int) -> ArrayFile:
        """Write the header for so many rows, and give the file its final name."""
        size = self.file.tell()
        self.file.seek(0)
        self._write_header(count)
        assert self.file.tell() == size - self.length
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        digest = self._digest.hexdigest()
        name = f"{self._stem}-{digest[:12]}.npy"
        self.path.replace(self.path.with_name(name))
        return ArrayFile(name, size, digest)


class SplitWriter:
    """Writes the images of one split.

    Args:
        folder: of the data set.
        name: of the split.
        shape: (H, W, C) of the images, or, where they are `ragged`, of the window cut from them.
        ragged: images differ in size.
        dtype: of the pixels, by numpy's name.
    """

    def __init__(
        self, folder: Path, name: str, shape: tuple[int, int, int], *, ragged: bool, dtype: str
    ) -> None:
        self._folder, self._name = folder, name
        self._shape, self._dtype = shape, dtype
        self._pixels = _ArrayWriter(folder, name, dtype, () if ragged else shape)
        self._layout = _ArrayWriter(folder, f"{name}-layout", "<i8", (3,)) if ragged else None
        self.count = 0
        self.skipped = 0

    def add(self, image: NDArray[Any]) -> None:
        """Append one image, (H, W, C) of the split's type."""
        assert image.dtype.str == self._dtype, (image.dtype, self._dtype)
        if self._layout is None:
            assert image.shape == self._shape, (image.shape, self._shape)
        else:
            self._layout.add(np.array([self._pixels.count, *image.shape[:2]], "<i8"))
        self._pixels.add(image)
        self.count += 1

    def finish(self, labels: NDArray[np.int64] | None = None) -> SplitFiles:
        """Put the files under their final names; they count only once a manifest names them.

        Args:
            labels: (N,) class numbers.
        """
        layout = None if self._layout is None else self._layout.finish(self.count)
        pixels = self._pixels.finish(self.count if layout is None else self._pixels.count)
        kept = None
        if labels is not None:
            writer = _ArrayWriter(self._folder, f"{self._name}-labels", "<i8", ())
            with writer.file:
                writer.add(labels)
                kept = writer.finish(len(labels))
        return SplitFiles(self.count, self._shape, pixels, layout, self.skipped, self._dtype, kept)

    def close(self) -> None:
        """Release the files."""
        for array in (self._pixels, self._layout):
            # On a full disk closing fails as well, because it writes what is still buffered.
            with suppress(OSError):
                if array is not None:
                    array.file.close()


class StoreWriter:
    """A prepared form in the making, under `exclusive`; what fails before `commit` leaves no
    trace."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for leftover in own_files(folder, PARTIAL):
            leftover.unlink()
        self._before = own_files(folder)
        self.splits: dict[str, SplitWriter] = {}

    def split(
        self, name: str, shape: tuple[int, int, int], *, ragged: bool, dtype: str = "|u1"
    ) -> SplitWriter:
        """Start a split; see `SplitWriter`."""
        self.splits[name] = SplitWriter(self._folder, name, shape, ragged=ragged, dtype=dtype)
        return self.splits[name]

    def finish(
        self, labels: Mapping[str, NDArray[np.int64]] | None = None
    ) -> dict[str, SplitFiles]:
        """Complete the arrays of all splits that have images, with the labels of each."""
        of_split = labels or {}
        return {
            name: split.finish(of_split.get(name))
            for name, split in self.splits.items()
            if split.count
        }

    def commit(self, manifest: Manifest) -> None:
        """Make the new arrays the data set, then remove what no manifest names."""
        manifest.write(self._folder)
        self._before |= {self._folder / array.file for array in manifest.files()}
        write_stamps(self._folder, manifest)
        keep = {self._folder / array.file for array in manifest.files()}
        for path in own_files(self._folder) - keep:
            path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for split in self.splits.values():
            split.close()
        for path in own_files(self._folder) - self._before:
            path.unlink()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Wait until no other process prepares this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not through a link, and nothing is cut: whatever lies there, it is not harmed.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(folder / ".lock", flags, 0o666), "r+b", buffering=0) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
