"""Data sets that are made in memory: scikit-learn's digits, and random pixels."""

import hashlib

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from nvae.counter_rng import STREAM_CONTENT, UNIFORM_BITS, image_keys, uniform_bits
from nvae.data.config import DataConfig
from nvae.data.images import fit_array
from nvae.data.splits import draw_splits, split_counts
from nvae.data.tables import TRAIN, DenseTable, ImageTable


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
    keys = image_keys(torch.arange(n), seed=config.split_seed, epoch=0, stream=STREAM_CONTENT)
    bits = uniform_bits(keys, size * size * config.channels) >> (UNIFORM_BITS - 8)
    return bits.to(torch.uint8).view(n, size, size, config.channels)


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
