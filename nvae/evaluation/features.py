"""Features of samples and of data: taken, pooled over processes, kept on disk.

Our own loop and sums, not torch-fidelity's or torchmetrics': samples must be those of
:func:`sample_images`, seed by seed, whatever the number of processes; a network that users name may
give any features; and what is kept of the data is bound to everything that it depends on, and
checked before it counts.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from nvae.evaluation.extractors import FeatureExtractor
from nvae.files import check_array, read_kept_arrays, write_arrays
from nvae.models import HierarchicalVAE, Temperature
from nvae.sampling import Decode, PixelTemperature, sample_images


@dataclass
class FeatureMoments:
    """Sufficient statistics of a Gaussian, in float64; D features.

    They are sums, so they add up over batches, processes and devices.

    Attributes:
        count: number of images.
        total: sum of the features, ``(D,)``.
        outer: sum of their outer products, ``(D, D)``.
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, features: int) -> "FeatureMoments":
        """The moments of no image."""
        zero = torch.zeros(features, features, dtype=torch.float64)
        return cls(0, zero[0].clone(), zero)

    def add(self, features: Tensor) -> None:
        """Count ``features`` ``(B, D)``."""
        x = features.detach().to("cpu", torch.float64)
        self.count += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    @property
    def mean(self) -> NDArray[np.float64]:
        """``(D,)``."""
        return (self.total / self.count).numpy()

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased, ``(D, D)``.

        Raises:
            ValueError: fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} image(s) have no covariance; at least 2 are needed")
        mean = self.total / self.count
        centered = self.outer - self.count * torch.outer(mean, mean)
        return (centered / (self.count - 1)).numpy()


@dataclass(frozen=True)
class FeatureSet:
    """What is known about a set of images; N images, D features.

    Attributes:
        moments: give mean and covariance.
        features: ``(N, D)`` float32, where kept.
        logits: ``(N, classes)``, where the extractor has them and they were kept.
    """

    moments: FeatureMoments
    features: Tensor | None = None
    logits: Tensor | None = None


def image_features(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    *,
    keep: bool = False,
    keep_logits: bool = False,
    progress: Callable[[int], None] | None = None,
) -> FeatureSet:
    """Features of ``batches`` of images, each ``(B, C, H, W)`` in [0, 1].

    Args:
        batches: on the extractor's device.
        extractor: images to features.
        keep: keep every image's features, not their moments alone.
        keep_logits: keep every image's logits.
        progress: called with the number of images just done.

    Raises:
        ValueError: no images.
    """
    moments: FeatureMoments | None = None
    all_features: list[Tensor] = []
    all_logits: list[Tensor] = []
    for images in batches:
        features, logits = extractor(images)
        if moments is None:
            moments = FeatureMoments.empty(features.shape[1])
        moments.add(features)
        if keep:
            all_features.append(features.cpu())
        if keep_logits and logits is not None:
            all_logits.append(logits.cpu())
        if progress is not None:
            progress(len(images))
    if moments is None:
        raise ValueError("no images to take features of")
    return FeatureSet(
        moments,
        torch.cat(all_features) if all_features else None,
        torch.cat(all_logits) if all_logits else None,
    )


def generated_features(
    model: HierarchicalVAE,
    extractor: FeatureExtractor,
    seeds: Sequence[int],
    *,
    temperature: Temperature = 1.0,
    pixel_temperature: PixelTemperature = 1.0,
    batch_size: int = 64,
    decode: Decode | None = None,
    keep: bool = False,
    keep_logits: bool = False,
    progress: Callable[[int], None] | None = None,
    distributed: bool = False,
) -> FeatureSet:
    """Features of samples.

    The arguments are those of :func:`sample_images` and of :func:`image_features`. With
    ``distributed`` every rank of the process group makes its share, ``progress`` counts that share,
    and :func:`pool_features` pools them.

    Raises:
        ValueError: fewer seeds than ranks, or none.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    if len(seeds) < world:
        raise ValueError(f"{len(seeds)} images cannot be shared by {world} processes")
    mine = seeds[rank::world]
    batches = (
        sample_images(
            model, list(mine[start : start + batch_size]), temperature=temperature,
            pixel_temperature=pixel_temperature, batch_size=batch_size, decode=decode,
        ).to(model.device)
        for start in range(0, len(mine), batch_size)
    )  # fmt: skip
    found = image_features(
        batches, extractor, keep=keep, keep_logits=keep_logits, progress=progress
    )
    return pool_features(found, len(seeds)) if distributed else found


def pool_features(share: FeatureSet, count: int) -> FeatureSet:
    """All ranks' images, ``count`` of them; rank r of the process group holds r, r + world, ...

    Sums travel, so unequal shares do no harm. All ranks keep features and logits, or none does.

    Returns:
        The moments of all images; on the first rank also their features and logits, where kept,
        in the order of the images. Those may be gigabytes, and one process compares them.
    """
    moments = share.moments
    images, total, outer = torch.tensor(moments.count), moments.total.clone(), moments.outer.clone()
    for value in (images, total, outer):
        dist.all_reduce(value)
    return FeatureSet(
        FeatureMoments(int(images), total, outer),
        _interleaved(share.features, count),
        _interleaved(share.logits, count),
    )


def _interleaved(mine: Tensor | None, count: int) -> Tensor | None:
    if mine is None:
        return None
    world = dist.get_world_size()
    if dist.get_rank() != 0:
        dist.gather_object(mine)
        return None
    parts: list[Tensor] = [torch.empty(0)] * world
    dist.gather_object(mine, parts)
    everything = mine.new_empty(count, mine.shape[1])
    for rank, part in enumerate(parts):
        everything[rank::world] = part
    return everything


def reference_path(folder: Path, protocol: dict[str, Any]) -> Path:
    """Where :func:`reference_features` keeps the features of a protocol."""
    return folder / f"{hashlib.sha256(_text(protocol).encode()).hexdigest()[:16]}.npz"


def _text(protocol: dict[str, Any]) -> str:
    return json.dumps(protocol, sort_keys=True)


def reference_features(
    folder: Path,
    protocol: dict[str, Any],
    compute: Callable[[], FeatureSet],
    *,
    keep: bool,
    distributed: bool = False,
) -> FeatureSet:
    """Features of data images, from ``folder`` if they are there.

    Args:
        folder: holds one file for every protocol.
        protocol: everything that the features depend on: data, split, extractor.
        compute: takes them anew; with ``distributed``, pools them over all ranks.
        keep: every image's features are wanted, not their moments alone.
        distributed: every rank of the process group calls this. The first one reads and writes,
            and alone is sure to get every image's features; the others get the moments.

    Raises:
        ValueError: there is a file, but it cannot be read, or not all of it makes sense.
    """
    path = reference_path(folder, protocol)
    first = not distributed or dist.get_rank() == 0
    found = _read(path, _text(protocol), keep) if first and path.exists() else None
    if distributed:
        found = _agreed(found)
    if found is None:
        found = compute()
        if first:
            _write(path, _text(protocol), found)
    return found


def _agreed(found: FeatureSet | None) -> FeatureSet | None:
    """What the first rank found, or its moments: ranks may see other disks, or other moments of
    the same one, but must either all compute or none."""
    first = dist.get_rank() == 0
    moments: list[FeatureMoments | None] = [found.moments if first and found else None]
    dist.broadcast_object_list(moments)
    if first or moments[0] is None:
        return found
    return FeatureSet(moments[0])


def _read(path: Path, protocol: str, keep: bool) -> FeatureSet | None:
    try:
        found = read_kept_arrays(path, protocol)
        if found is None:
            return None
        count, total = found["count"], found["total"]
        if count.shape != () or count.dtype.kind != "i" or count < 1:
            raise ValueError(f"count has shape {count.shape} of {count.dtype}, or is below 1")
        check_array("total", total, np.float64, (total.size,))
        check_array("outer", found["outer"], np.float64, (total.size, total.size))
        features = found.get("features")
        if features is not None:
            check_array("features", features, np.float32, (int(count), total.size))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it") from None
    if keep and features is None:
        return None
    moments = FeatureMoments(int(count), *map(torch.from_numpy, (total, found["outer"])))
    return FeatureSet(moments, None if features is None else torch.from_numpy(features))


def _write(path: Path, protocol: str, found: FeatureSet) -> None:
    moments = found.moments
    arrays = {
        "count": np.array(moments.count),
        "total": moments.total.numpy(),
        "outer": moments.outer.numpy(),
    }
    if found.features is not None:
        arrays["features"] = found.features.numpy()
    write_arrays(path, arrays, protocol)
