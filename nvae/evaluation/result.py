"""The numbers of single images, in memory and on disk, and the table that they add up to.

Numbers are kept by image and added up at the end, in float64 and in the order of the index. That
is what makes a result independent of batches, workers and devices, and a killed run resumable.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from nvae.elbo import LN2
from nvae.files import check_array, read_kept_arrays, write_arrays
from nvae.models import HierarchicalVAE

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

    def check(self) -> None:
        """Raise a ValueError unless types, shapes and numbers are those of records."""
        if self.kl_per_channel.ndim != 3 or self.log_evidence.ndim != 2:
            raise ValueError("its arrays do not fit each other")
        images, groups, channels = self.kl_per_channel.shape
        bounds = images, self.log_evidence.shape[1]
        check_array("index", self.index, np.int64, (images,))
        check_array("reconstruction", self.reconstruction, np.float64, (images,))
        check_array("kl_per_channel", self.kl_per_channel, np.float64, (images, groups, channels))
        check_array("log_evidence", self.log_evidence, np.float64, bounds)
        check_array("effective_samples", self.effective_samples, np.float64, bounds)
        if (self.index < 0).any():
            raise ValueError("index holds numbers below 0")


R = TypeVar("R", bound=ImageRecords)


def concatenate(parts: Sequence[R]) -> R:
    """All parts in one, sorted by index; an image that occurs twice is counted once.

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("no images to evaluate: the data gave no batch")
    kind = type(parts[0])
    arrays = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(kind)
    }
    _, first = np.unique(arrays["index"], return_index=True)
    return kind(**{name: array[first] for name, array in arrays.items()})


def pool_ranks(
    records: R | None,
    error: Exception | None = None,
    group: dist.ProcessGroup | None = None,
) -> R | None:
    """Every rank's records, on every rank; ranks may hold unequal numbers of images, or none.

    Args:
        records: of this rank.
        error: that this rank has met instead.
        group: of the ranks; None: all of them, by the default group.

    Raises:
        Exception: ``error`` itself, where there is one.
        RuntimeError: another rank has met one; it is named.
    """
    mine = records, None if error is None else f"{type(error).__name__}: {error}"
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, mine, group=group)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(parts):
        if message is not None:
            raise RuntimeError(f"process {rank} has failed: {message}")
    found = [part for part, _ in parts if part is not None]
    return concatenate(found) if found else None


class RecordStore:
    """Finished images on disk, so that a killed evaluation goes on where it stopped.

    Args:
        folder: holds one file for every process; whatever is there counts as done, so a run may go
            on with another number of processes.
        protocol: what the numbers depend on; a file made under another one is refused.
        rank: this process's, which writes only its own file.
        kind: of the records.

    Raises:
        ValueError: a file belongs to another protocol or cannot be read.
    """

    def __init__(
        self, folder: Path, protocol: str, rank: int = 0, kind: type[ImageRecords] = ImageRecords
    ) -> None:
        self.folder = folder
        self._protocol, self._kind = protocol, kind
        self._path = folder / f"rank{rank}.npz"
        self._saved_at = time.monotonic()
        files = sorted(folder.glob("rank*.npz"))
        self._others = [self._read(path) for path in files if path != self._path]
        self._own = [self._read(self._path)] if self._path in files else []

    def _read(self, path: Path) -> ImageRecords:
        try:
            found = read_kept_arrays(path, self._protocol)
            if found is not None:
                records = self._kind(**found)
                records.check()
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


ACTIVE_UNIT_NATS = 0.1
"""A latent channel is active if its KL, per image and summed over space, is larger."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def over_images(cls, values: NDArray[np.float64]) -> "Estimate":
        """The mean of values ``(N,)``; the error of a single one is infinite."""
        n = len(values)
        error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        return cls(float(values.mean()), error)

    def scaled(self, factor: float) -> "Estimate":
        """Both numbers in other units."""
        return Estimate(self.mean * factor, self.standard_error * factor)


@dataclass(frozen=True)
class ImportanceWeighted:
    """The bound with K draws.

    Attributes:
        samples: K.
        nll: -log p(x) or more, nats an image.
        bits_per_dim: the same in bits/dim.
        effective_samples: (sum w)^2 / sum w^2 of the weights, mean over images; 1 means that one
            draw decides, K that all weigh the same.
    """

    samples: int
    nll: Estimate
    bits_per_dim: Estimate
    effective_samples: float


@dataclass(frozen=True)
class EvaluationResult:
    """Likelihood of a data split; groups are listed coarsest first.

    Attributes:
        images: number of images.
        dimensions: pixels times channels that the likelihood counts.
        negative_elbo: -ELBO, nats an image.
        reconstruction: its part -log p(x | z).
        kl: its part KL(q || p).
        negative_elbo_bits_per_dim: -ELBO in bits/dim.
        kl_per_group: mean KL of every group, nats an image.
        active_units: active latent channels of every group (see ``ACTIVE_UNIT_NATS``).
        latent_channels: latent channels of every group.
        importance_weighted: one entry for every K, ascending.
        density_of: what the likelihood is a density of; empty: its values are masses, and
            bits/dim is a code length.
    """

    images: int
    dimensions: int
    negative_elbo: Estimate
    reconstruction: Estimate
    kl: Estimate
    negative_elbo_bits_per_dim: Estimate
    kl_per_group: tuple[float, ...]
    active_units: tuple[int, ...]
    latent_channels: tuple[int, ...]
    importance_weighted: tuple[ImportanceWeighted, ...]
    density_of: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Lines for a terminal."""
        lines = [
            f"{'images':24}{self.images:>12}",
            f"{'':24}{'nats':>12}{'+-':>9}{'bits/dim':>12}",
            _line("negative ELBO", self.negative_elbo, self.negative_elbo_bits_per_dim),
            _line("  reconstruction", self.reconstruction),
            _line("  KL", self.kl),
        ]
        for bound in self.importance_weighted:
            text = _line(f"NLL, K = {bound.samples}", bound.nll, bound.bits_per_dim)
            lines.append(f"{text}   effective samples {bound.effective_samples:.1f}")
        if self.density_of:
            lines.append(
                f"of the density of {self.density_of}, x in [0, 1]: may be negative, and is no "
                "code length"
            )
        lines += ["", f"{'group (coarsest first)':24}{'KL nats':>12}{'active units':>15}"]
        lines += [
            f"{group:<24}{kl:>12.3f}{f'{active} of {channels}':>15}"
            for group, (kl, active, channels) in enumerate(
                zip(self.kl_per_group, self.active_units, self.latent_channels, strict=True)
            )
        ]
        return "\n".join(lines)


def _line(name: str, nats: Estimate, bits: Estimate | None = None) -> str:
    text = f"{name:24}{nats.mean:>12.3f}{nats.standard_error:>9.3f}"
    return text if bits is None else f"{text}{bits.mean:>12.4f}"


def summarize(
    records: ImageRecords, model: HierarchicalVAE, importance_samples: Sequence[int]
) -> EvaluationResult:
    """Means over images, in float64.

    Args:
        records: sorted by index.
        model: gives the dimensions.
        importance_samples: values of K, in the order of the records' columns.
    """
    kl = records.kl_per_channel.sum((1, 2))
    per_dimension = 1 / (LN2 * model.config.counted_pixels)
    negative_elbo = Estimate.over_images(records.reconstruction + kl)
    bounds = []
    for column, samples in enumerate(importance_samples):
        nll = Estimate.over_images(-records.log_evidence[:, column])
        bounds.append(
            ImportanceWeighted(
                samples=samples,
                nll=nll,
                bits_per_dim=nll.scaled(per_dimension),
                effective_samples=float(records.effective_samples[:, column].mean()),
            )
        )
    channels = records.kl_per_channel.mean(0)
    return EvaluationResult(
        images=len(records),
        dimensions=model.config.counted_pixels,
        negative_elbo=negative_elbo,
        reconstruction=Estimate.over_images(records.reconstruction),
        kl=Estimate.over_images(kl),
        negative_elbo_bits_per_dim=negative_elbo.scaled(per_dimension),
        kl_per_group=tuple(channels.sum(1).tolist()),
        active_units=tuple((channels > ACTIVE_UNIT_NATS).sum(1).tolist()),
        latent_channels=tuple(shape[0] for shape in model.latent_shapes),
        importance_weighted=tuple(bounds),
        density_of=model.config.pixel_distribution.density_of,
    )
