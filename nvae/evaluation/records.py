"""What evaluation knows about every single image.

Numbers are kept by image and added up at the end, in float64 and in the order of the index. That
is what makes a result independent of batches, workers and devices, and a killed run resumable.
"""

import os
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

_FORMAT = 1
_SAVE_EVERY_SECONDS = 15.0


@dataclass(frozen=True)
class ImageRecords:
    """Per-image results; N images, G groups, L channels a group, Q values of K.

    Attributes:
        index: ``(N,)`` int64, index in the split.
        reconstruction: -log p(x | z), ``(N,)`` float64, nats.
        kl_per_channel: KL of every latent channel, ``(N, G, L)`` float64, nats.
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
    _, first = np.unique(np.concatenate([part.index for part in parts]), return_index=True)
    return ImageRecords(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])[first]
            for field in fields(ImageRecords)
        )
    )


def pool_ranks(records: ImageRecords | None) -> ImageRecords:
    """Every rank's records, on every rank; ranks may hold unequal numbers of images, or none."""
    parts: list[ImageRecords | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, records)
    return concatenate([part for part in parts if part is not None])


class RecordStore:
    """Finished images on disk, so that a killed evaluation goes on where it stopped.

    Args:
        path: ``.npz`` file; read if it is there.
        protocol: what the numbers depend on; a file made under another one is refused.

    Raises:
        ValueError: the file belongs to another protocol or cannot be read.
    """

    def __init__(self, path: Path, protocol: str) -> None:
        self.path = path
        self._protocol = protocol
        self._parts: list[ImageRecords] = []
        self._saved_at = time.monotonic()
        if path.exists():
            self._parts.append(self._read())

    def _read(self) -> ImageRecords:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if int(file["format"]) != _FORMAT or str(file["protocol"]) != self._protocol:
                    raise ValueError(
                        f"{self.path} was begun with other settings; "
                        "delete it or choose another output"
                    )
                return ImageRecords(*(file[field.name] for field in fields(ImageRecords)))
        except (OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} cannot be read ({error}); delete it") from None

    @property
    def done(self) -> frozenset[int]:
        """Indices of the images that need no further work."""
        return frozenset(int(i) for part in self._parts for i in part.index)

    @property
    def records(self) -> ImageRecords | None:
        """Everything so far."""
        return concatenate(self._parts) if self._parts else None

    def add(self, records: ImageRecords) -> None:
        """Keep ``records``, and write to disk if the last time is a while ago."""
        self._parts.append(records)
        if time.monotonic() - self._saved_at > _SAVE_EVERY_SECONDS:
            self.save()

    def save(self) -> None:
        """Write everything, atomically."""
        if not self._parts:
            return
        merged = concatenate(self._parts)
        self._parts = [merged]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez_compressed(
                file,
                format=np.int64(_FORMAT),
                protocol=np.array(self._protocol),
                **{field.name: getattr(merged, field.name) for field in fields(ImageRecords)},
            )
        os.replace(temporary, self.path)
        self._saved_at = time.monotonic()
