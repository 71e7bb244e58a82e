"""Data sets that are made in memory: scikit-learn's digits, and random pixels."""

import hashlib

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from nvae.data.config import DataConfig
from nvae.data.images import fit_array
from nvae.data.splits import draw_splits, split_counts
from nvae.data.tables import TRAIN, DenseTable, ImageTable
from nvae.random import STREAM_CONTENT, UNIFORM_BITS, image_keys, uniform_bits

_LARGEST = 1 << 31
"""Bytes of a set that is made in memory."""

_CHUNK = 1 << 22
"""Pixels made at a time, of eight bytes each until they are done."""


def _digits(config: DataConfig) -> Tensor:
    """The 1797 handwritten digits of scikit-learn, 8x8, levels 0..16 as 0, 16, ..., 240, 255."""
    if config.channels != 1:
        raise ValueError(f"data.channels is {config.channels}; the digits are grey: channels=1")
    levels = load_digits().images
    # Steps of 16, so that the four upper bits tell the levels apart (but for the brightest two).
    images = np.minimum(levels * 16, 255).astype(np.uint8)
    size = config.stored_size
    return torch.from_numpy(
        np.stack([fit_array(i[:, :, None], size=size, channels=1, config=config) for i in images])
    )


def _random(config: DataConfig) -> Tensor:
    """Random pixels: as many images as the config's split sizes add up to."""
    if config.train_size is None:
        raise ValueError("data.train_size is not given; random images need their number")
    n = config.train_size + (config.valid_size or 0) + (config.test_size or 0)
    size = config.stored_size
    if n * size * size * config.channels > _LARGEST:
        raise ValueError(
            f"{n} random images of {size}x{size}x{config.channels} take more than {_LARGEST} "
            "bytes: set a smaller data.train_size"
        )
    out = torch.empty(n, size, size, config.channels, dtype=torch.uint8)
    pixels = out.view(n, -1)
    chunk = max(1, _CHUNK // pixels.shape[1])
    for start in range(0, n, chunk):
        index = torch.arange(start, min(start + chunk, n))
        keys = image_keys(index, seed=config.split_seed, epoch=0, stream=STREAM_CONTENT)
        pixels[index] = (uniform_bits(keys, pixels.shape[1]) >> (UNIFORM_BITS - 8)).to(torch.uint8)
    return out


def open_in_memory(config: DataConfig) -> dict[str, ImageTable]:
    """The splits of an in-memory data set.

    Raises:
        ValueError: The config asks for what the set does not have.
    """
    images = {"digits": _digits, "random": _random}[config.format](config)
    wanted = {"train": config.train_size, "valid": config.valid_size, "test": config.test_size}
    counts = split_counts({TRAIN: len(images)}, wanted)
    indices = draw_splits(len(images), counts["valid"], counts["test"], seed=config.split_seed)
    return {split: _table(images[rows]) for split, rows in indices.items() if len(rows)}


def _table(images: Tensor) -> DenseTable:
    return DenseTable(images, hashlib.sha256(images.numpy().tobytes()).hexdigest())
