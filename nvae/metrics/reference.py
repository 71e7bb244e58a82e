"""Features of the data, kept on disk together with the protocol they were taken under."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nvae.atomic import replacing
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
) -> FeatureSet:
    """Features of data images, from ``folder`` if they are there.

    Args:
        folder: of the cache.
        protocol: everything that the features depend on: data, split, extractor.
        compute: takes them anew.
        keep: every image's features are wanted, not their moments alone.

    Raises:
        ValueError: there is a file, but it cannot be read.
    """
    path = reference_path(folder, protocol)
    found = _read(path, protocol) if path.exists() else None
    if found is None or (keep and found.features is None):
        found = compute()
        _write(path, protocol, found)
    return found


def _read(path: Path, protocol: dict[str, Any]) -> FeatureSet | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["format"]) != _FORMAT or json.loads(str(file["protocol"])) != protocol:
                return None
            moments = FeatureMoments(
                int(file["count"]), torch.from_numpy(file["total"]), torch.from_numpy(file["outer"])
            )
            features = torch.from_numpy(file["features"]) if "features" in file else None
            return FeatureSet(moments, features)
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
