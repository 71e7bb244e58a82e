"""Source files -> the prepared form: decoded in threads, written in order, committed in one step.

An older preparation in the same folder stays valid until the new manifest replaces the old one.
"""

import fcntl
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.lib.format as npy
from numpy.typing import NDArray

from nvae.data.config import IN_MEMORY_FORMATS, SPLITS, TRAIN, DataConfig, DataError
from nvae.data.loader import read_ahead
from nvae.data.places import (
    by_hand,
    can_be_fetched,
    download,
    is_current,
    listing_digest,
    prepared_folder,
    source_folder,
)
from nvae.data.readers import (
    Item,
    MissingSourceError,
    Part,
    Plan,
    detect_format,
    plan_splits,
    read_source,
)
from nvae.data.store import (
    PARTIAL,
    ArrayFile,
    Manifest,
    SplitFiles,
    own_files,
    write_stamps,
)
from nvae.data.transforms import BadImageError, decode, fit, fit_array, to_channels

_CHUNK = 32
_NAMES_KEPT = 100

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""

Result = tuple[int, Item, NDArray[np.uint8] | BadImageError]
"""Number of the split, the picture, and its pixels or what is wrong with it."""


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

    def finish(self, count: int) -> ArrayFile:
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
    """

    def __init__(
        self, folder: Path, name: str, shape: tuple[int, int, int], *, ragged: bool
    ) -> None:
        self._shape = shape
        self._pixels = _ArrayWriter(folder, name, "|u1", () if ragged else shape)
        self._layout = _ArrayWriter(folder, f"{name}-layout", "<i8", (3,)) if ragged else None
        self.count = 0
        self.skipped = 0

    def add(self, image: NDArray[np.uint8]) -> None:
        """Append one image, (H, W, C) uint8."""
        if self._layout is None:
            assert image.shape == self._shape, (image.shape, self._shape)
        else:
            self._layout.add(np.array([self._pixels.length, *image.shape[:2]], "<i8"))
        self._pixels.add(image)
        self.count += 1

    def finish(self) -> SplitFiles:
        """Put the files under their final names; they count only once a manifest names them."""
        layout = None if self._layout is None else self._layout.finish(self.count)
        pixels = self._pixels.finish(self.count if layout is None else self._pixels.length)
        return SplitFiles(self.count, self._shape, pixels, layout, self.skipped)

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

    def split(self, name: str, shape: tuple[int, int, int], *, ragged: bool) -> SplitWriter:
        """Start a split."""
        self.splits[name] = SplitWriter(self._folder, name, shape, ragged=ragged)
        return self.splits[name]

    def finish(self) -> dict[str, SplitFiles]:
        """Complete the arrays of all splits that have images."""
        return {name: split.finish() for name, split in self.splits.items() if split.count}

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


def _to_array(item: Item, config: DataConfig) -> NDArray[np.uint8] | BadImageError:
    try:
        loaded = item.load()
        if isinstance(loaded, np.ndarray):
            return fit_array(loaded, config)
        if isinstance(loaded, bytes):
            return fit(decode(loaded, config.channels), config)
        return fit(to_channels(loaded, config.channels), config)
    except BadImageError as error:
        return error
    except OSError as error:
        return BadImageError(f"it cannot be read: {error.strerror or error}")


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
    needed = images * config.stored_size**2 * config.channels
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
    config: DataConfig,
    *,
    skip_bad: bool,
    workers: int,
    progress: Progress | None,
) -> list[str]:
    """Write every picture of the source to its split.

    Returns:
        The first pictures that were left out, with the reason.

    Raises:
        DataError: An unreadable picture, or nothing is left of the training split.
    """
    shape = (config.stored_size, config.stored_size, config.channels)
    writers = {
        SPLITS.index(split): writer.split(split, shape, ragged=config.crop == "random")
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
                writers[split].add(result)
            done += 1
            if progress is not None and (done % _CHUNK == 0 or done == total):
                progress(done, total)
    if not writers[SPLITS.index(TRAIN)].count:
        raise DataError(f"none of the {total} pictures can be read; {skipped[0]}")
    return skipped


def geometry(config: DataConfig) -> dict[str, Any]:
    """How pictures become squares: what the prepared pixels depend on beside their shape."""
    box = None if config.crop_box is None else list(config.crop_box)
    return {"crop_box": box, "crop": config.crop, "resize": config.resize}


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
    skip_bad: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    source = source_folder(config)
    kind, parts = _read_or_download(config, source)
    # Before the pictures are read: what changes meanwhile is seen at the next start.
    digest = listing_digest(source, kind)
    plan = plan_splits({split: part.count for split, part in parts.items()}, config)
    workers = workers or min(8, os.cpu_count() or 1)
    with StoreWriter(folder) as writer:
        _check_space(folder, sum(plan.counts.values()), config)
        skipped = _convert(
            parts, plan, writer, config, skip_bad=skip_bad, workers=workers, progress=progress
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
