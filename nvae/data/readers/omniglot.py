"""Omniglot at 28x28 in the `chardata.mat` layout of Burda, Grosse and Salakhutdinov (2016)."""

from pathlib import Path

import numpy as np
from scipy.io import loadmat

from nvae.data.config import DataConfig
from nvae.data.manifest import DataError
from nvae.data.readers.source import Part, Pixels, array_part, find_files
from nvae.data.tables import TEST, TRAIN

_SIDE = 28
_KEYS = {TRAIN: "data", TEST: "testdata"}


def _images(content: dict[str, object], key: str, path: Path) -> Pixels:
    values = content.get(key)
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.shape[0] != _SIDE**2:
        raise DataError(f"{path} has no {key!r} of {_SIDE**2} rows, one column an image")
    if values.dtype.kind not in "fbu" or not (np.all(values >= 0) and np.all(values <= 1)):
        raise DataError(f"{path}: {key!r} must hold intensities between 0 and 1")
    # A column holds the picture column by column (MATLAB's order).
    images = np.rint(values.T * 255.0).astype(np.uint8).reshape(-1, _SIDE, _SIDE)
    return np.ascontiguousarray(images.transpose(0, 2, 1))[..., None]


def read_omniglot(source: Path, config: DataConfig) -> dict[str, Part]:
    """Training and test characters of `chardata.mat`."""
    del config
    path = find_files(source, ("chardata.mat",))
    try:
        content = loadmat(str(path), variable_names=list(_KEYS.values()))
    # scipy raises anything on damaged files.
    except Exception as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}") from error
    return {split: array_part(_images(content, key, path), key) for split, key in _KEYS.items()}
