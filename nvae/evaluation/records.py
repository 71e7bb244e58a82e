"""The likelihood of every single image, in memory and on disk.

Numbers are kept by image and added up at the end, in float64 and in the order of the index. That
is what makes a result independent of batches, workers and devices, and a killed run resumable.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from nvae.files import check_array, read_kept_arrays, write_arrays

_SAVE_EVERY_SECONDS = 15.0


@dataclass(frozen=True)
class ImageRecords:
    """Results of N images; G groups, L channels of the widest group, Q values of K.

    Attributes:
        index: ``(N,)`` int64, index in the split.
        reconstruction: -log p(x | z), ``(N,)`` float64, nats.
        kl_per_channel: KL of every latent channel, ``(N, G, L)`` float64, nats; 0 beyond the
            channels of a narrower group.
        log_evidence: importance-weighted bound on log p(x) for every K, ``(N, Q)``, nats.
        effective_samples: (sum w)^2 / sum w^2 for every K, ``(N, Q)``.
    """

    index: NDArray[np.int64]
    reconstruction: NDArray[np.float64]
    kl_per_channel: NDArray[np.float64]
    log_evidence: NDArray[np.float64]
    effective_samples: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.index)


def concatenate(parts: Sequence[ImageRecords]) -> ImageRecords:
    """All parts in one, sorted by index; an image that occurs twice is counted once.

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("no images to evaluate: the data gave no batch")
    arrays = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(ImageRecords)
    }
    _, first = np.unique(arrays["index"], return_index=True)
    return ImageRecords(**{name: array[first] for name, array in arrays.items()})


def pool_ranks(records: ImageRecords | None) -> ImageRecords:
    """Every rank's records, on every rank; ranks may hold unequal numbers of images, or none."""
    parts: list[ImageRecords | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, records)
    return concatenate([part for part in parts if part is not None])


def _check(records: ImageRecords) -> None:
    """Raise a ValueError unless types, shapes and numbers are those of records."""
    if records.kl_per_channel.ndim != 3 or records.log_evidence.ndim != 2:
        raise ValueError("its arrays do not fit each other")
    images, groups, channels = records.kl_per_channel.shape
    bounds = images, records.log_evidence.shape[1]
    check_array("index", records.index, np.int64, (images,))
    check_array("reconstruction", records.reconstruction, np.float64, (images,))
    check_array("kl_per_channel", records.kl_per_channel, np.float64, (images, groups, channels))
    check_array("log_evidence", records.log_evidence, np.float64, bounds)
    check_array("effective_samples", records.effective_samples, np.float64, bounds)
    if (records.index < 0).any():
        raise ValueError("index holds numbers below 0")


class RecordStore:
    """Finished images on disk, so that a killed evaluation goes on where it stopped.

    Args:
        folder: holds one file for every process; whatever is there counts as done, so a run may go
            on with another number of processes.
        protocol: what the numbers depend on; a file made under another one is refused.
        rank: this process's, which writes only its own file.

    Raises:
        ValueError: a file belongs to another protocol or cannot be read.
    """

    def __init__(self, folder: Path, protocol: str, rank: int = 0) -> None:
        self.folder = folder
        self._protocol = protocol
        self._path = folder / f"rank{rank}.npz"
        self._saved_at = time.monotonic()
        files = sorted(folder.glob("rank*.npz"))
        self._others = [self._read(path) for path in files if path != self._path]
        self._own = [self._read(self._path)] if self._path in files else []

    def _read(self, path: Path) -> ImageRecords:
        try:
            found = read_kept_arrays(path, self._protocol)
            if found is not None:
                records = ImageRecords(**found)
                _check(records)
                return records
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it") from None
        raise ValueError(
            f"{path} was begun with other settings; delete it or choose another output"
        )

    def check_shapes(self, groups: int, channels: int, bounds: int) -> None:
        """Raise a ValueError unless what is there has these numbers of groups, channels and K."""
        for records in self._others + self._own:
            shape = (*records.kl_per_channel.shape[1:], records.log_evidence.shape[1])
            if shape != (groups, channels, bounds):
                raise ValueError(f"{self.folder} holds results of another model; delete it")

    @property
    def done(self) -> frozenset[int]:
        """Indices of the images that need no further work."""
        return frozenset(int(i) for part in self._others + self._own for i in part.index)

    @property
    def records(self) -> ImageRecords | None:
        """Everything so far."""
        parts = self._others + self._own
        return concatenate(parts) if parts else None

    def add(self, records: ImageRecords) -> None:
        """Keep ``records``, and write to disk if the last time is a while ago."""
        self._own.append(records)
        if time.monotonic() - self._saved_at > _SAVE_EVERY_SECONDS:
            self.save()

    def save(self) -> None:
        """Write this process's records, atomically."""
        if not self._own:
            return
        self._own = [concatenate(self._own)]
        write = partial(write_arrays, self._path, vars(self._own[0]), self._protocol, compress=True)
        try:
            write()
        except FileNotFoundError:
            # another evaluation of the same likelihood finished and removed the folder just now
            write()
        self._saved_at = time.monotonic()
