"""Writing a prepared data set: streamed, hashed on the way, committed in one step."""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from nvae.data.manifest import ArrayFile, Manifest, SplitFiles
from nvae.data.store import write_stamps
from nvae.data.tables import SPLITS

_HEADER_BYTES = 128
_PARTIAL = ".partial"
_OWN = re.compile(rf"({'|'.join(SPLITS)})(-layout)?(-[0-9a-f]{{12}}\.npy|\{_PARTIAL})")


def own_files(folder: Path, suffix: str = "") -> set[Path]:
    """What preparations wrote into a folder: arrays and their unfinished forms, nothing else."""
    found = [path for path in folder.iterdir() if _OWN.fullmatch(path.name)]
    return {path for path in found if path.name.endswith(suffix)}


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    """A version 1.0 `.npy` header of fixed length: the count is filled in at the end."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + f"{text:<117}\n".encode()


class _ArrayWriter:
    """Appends to one array; its final name carries the checksum."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder = folder
        self._stem = stem
        self.partial = folder / f"{stem}{_PARTIAL}"
        self._file: BinaryIO = self.partial.open("wb")
        self._digest = hashlib.sha256()
        self.length = 0
        self._file.write(bytes(_HEADER_BYTES))

    def add(self, array: NDArray[np.generic]) -> None:
        data = np.ascontiguousarray(array).data.cast("B")
        self._file.write(data)
        self._digest.update(data)
        self.length += len(data)

    def finish(self, shape: tuple[int, ...], dtype: str) -> ArrayFile:
        self._file.seek(0)
        self._file.write(_header(shape, dtype))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = self._digest.hexdigest()
        name = f"{self._stem}-{digest[:12]}.npy"
        self.partial.replace(self._folder / name)
        return ArrayFile(name, _HEADER_BYTES + self.length, digest)

    def close(self) -> None:
        self._file.close()


class SplitWriter:
    """Collects the images of one split.

    Args:
        folder: of the data set.
        name: of the split.
        shape: (H, W, C) of the images, or of the window cut from them when `ragged`.
        ragged: images differ in size.
    """

    def __init__(
        self, folder: Path, name: str, shape: tuple[int, int, int], *, ragged: bool
    ) -> None:
        self._shape = shape
        self._ragged = ragged
        self._folder = folder
        self._name = name
        self._pixels = _ArrayWriter(folder, name)
        self._layout: list[tuple[int, int, int]] = []
        self.count = 0
        self.skipped = 0

    def add(self, image: NDArray[np.uint8]) -> None:
        """Append one image, (H, W, C) uint8."""
        if self._ragged:
            self._layout.append((self._pixels.length, image.shape[0], image.shape[1]))
        else:
            assert image.shape == self._shape, (image.shape, self._shape)
        self._pixels.add(image)
        self.count += 1

    def finish(self) -> SplitFiles:
        """Put the files under their final names; they count only once a manifest names them."""
        if not self._ragged:
            pixels = self._pixels.finish((self.count, *self._shape), "|u1")
            return SplitFiles(self.count, self._shape, pixels, skipped=self.skipped)
        pixels = self._pixels.finish((self._pixels.length,), "|u1")
        layout = _ArrayWriter(self._folder, f"{self._name}-layout")
        layout.add(np.array(self._layout, dtype="<i8").reshape(-1, 3))
        positions = layout.finish((self.count, 3), "<i8")
        return SplitFiles(self.count, self._shape, pixels, positions, self.skipped)

    def close(self) -> None:
        """Release the file."""
        self._pixels.close()


class StoreWriter:
    """All splits of one data set. Leaving the block without `commit` leaves no trace.

    Use under `exclusive(folder)`. An older preparation in the same folder stays valid until the
    new manifest replaces the old one; then its arrays are removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, SplitWriter] = {}
        self._before: set[Path] = set()
        self._committed = False

    def __enter__(self) -> Self:
        for leftover in own_files(self._folder, _PARTIAL):
            leftover.unlink()
        self._before = own_files(self._folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in self._writers.values():
            # On a full disk closing fails as well, because it writes what is still buffered.
            with suppress(OSError) if kind is not None else nullcontext():
                writer.close()
        if kind is not None and not self._committed:
            for path in own_files(self._folder) - self._before:
                path.unlink()

    def split(self, name: str, shape: tuple[int, int, int], *, ragged: bool) -> SplitWriter:
        """Start a split."""
        self._writers[name] = SplitWriter(self._folder, name, shape, ragged=ragged)
        return self._writers[name]

    def finish(self) -> dict[str, SplitFiles]:
        """Complete the arrays of all splits that have images."""
        return {name: writer.finish() for name, writer in self._writers.items() if writer.count}

    def commit(self, manifest: Manifest) -> None:
        """Make the new arrays the data set, then remove what no manifest names."""
        manifest.write(self._folder)
        self._committed = True
        write_stamps(self._folder, manifest)
        keep = {self._folder / array.file for array in manifest.files()}
        for path in own_files(self._folder) - keep:
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
