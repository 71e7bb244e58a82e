"""Features of the data, kept on disk together with the protocol they were taken under."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from nvae.files import replacing
from nvae.metrics.distances import FeatureSet
from nvae.metrics.moments import FeatureMoments

_FORMAT = 1


def reference_path(folder: Path, protocol: dict[str, Any]) -> Path:
    """Where the features of a protocol lie."""
    text = json.dumps(protocol, sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


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
        folder: of the cache.
        protocol: everything that the features depend on: data, split, extractor.
        compute: takes them anew; with ``distributed``, pools them over all ranks.
        keep: every image's features are wanted, not their moments alone.
        distributed: every rank of the process group calls this. The first one reads and writes,
            and alone is sure to get every image's features; the others get the moments.

    Raises:
        ValueError: there is a file, but it cannot be read.
    """
    path = reference_path(folder, protocol)
    first = not distributed or dist.get_rank() == 0
    found = _read(path, protocol, keep) if first and path.exists() else None
    if distributed:
        found = _agreed(found)
    if found is None:
        found = compute()
        if first:
            _write(path, protocol, found)
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


def _read(path: Path, protocol: dict[str, Any], keep: bool) -> FeatureSet | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["format"]) != _FORMAT or json.loads(str(file["protocol"])) != protocol:
                return None
            moments = FeatureMoments(
                int(file["count"]), torch.from_numpy(file["total"]), torch.from_numpy(file["outer"])
            )
            features = torch.from_numpy(file["features"]) if "features" in file else None
            return None if keep and features is None else FeatureSet(moments, features)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it") from None


def _write(path: Path, protocol: dict[str, Any], found: FeatureSet) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "format": np.array(_FORMAT),
        "protocol": np.array(json.dumps(protocol, sort_keys=True)),
        "count": np.array(found.moments.count),
        "total": found.moments.total.numpy(),
        "outer": found.moments.outer.numpy(),
    }
    if found.features is not None:
        arrays["features"] = found.features.numpy()
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
