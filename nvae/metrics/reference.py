"""Features of the data, kept on disk together with the protocol they were taken under."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from nvae.files import read_arrays, write_arrays
from nvae.metrics.distances import FeatureSet
from nvae.metrics.moments import FeatureMoments

_FORMAT = 1


def reference_path(folder: Path, protocol: dict[str, Any]) -> Path:
    """Where the features of a protocol lie."""
    return folder / f"{hashlib.sha256(_text(protocol).encode()).hexdigest()[:16]}.npz"


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
        ValueError: there is a file, but it cannot be read, or not all of it makes sense.
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
        found = read_arrays(path)
        if str(found["format"]) != str(_FORMAT) or str(found["protocol"]) != _text(protocol):
            return None
        features = found.get("features")
        moments = _moments(found["count"], found["total"], found["outer"])
        if features is not None:
            _check_array("features", features, np.float32, (moments.count, len(moments.total)))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it") from None
    if features is None:
        return None if keep else FeatureSet(moments)
    return FeatureSet(moments, torch.from_numpy(features))


def _moments(count: NDArray[Any], total: NDArray[Any], outer: NDArray[Any]) -> FeatureMoments:
    if count.shape != () or count.dtype.kind != "i" or count < 1:
        raise ValueError(f"count has shape {count.shape} of {count.dtype}, or is below 1")
    _check_array("total", total, np.float64, (total.size,))
    _check_array("outer", outer, np.float64, (total.size, total.size))
    return FeatureMoments(int(count), torch.from_numpy(total), torch.from_numpy(outer))


def _check_array(name: str, array: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape} of {array.dtype}, not {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds numbers that are not finite")


def _text(protocol: dict[str, Any]) -> str:
    return json.dumps(protocol, sort_keys=True)


def _write(path: Path, protocol: dict[str, Any], found: FeatureSet) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "format": np.array(_FORMAT),
        "protocol": np.array(_text(protocol)),
        "count": np.array(found.moments.count),
        "total": found.moments.total.numpy(),
        "outer": found.moments.outer.numpy(),
    }
    if found.features is not None:
        arrays["features"] = found.features.numpy()
    write_arrays(path, arrays)
