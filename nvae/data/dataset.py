"""A data set, open: prepared if need be, held against its config, batched for the model.

It needs no Lightning; `nvae.data.module` makes a `LightningDataModule` of it.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvae.data.config import (
    IN_MEMORY_FORMATS,
    SPLITS,
    TEST,
    TRAIN,
    VALID,
    DataConfig,
    DataError,
    prepare_command,
)
from nvae.data.conversion import geometry, prepare_if_missing
from nvae.data.loader import (
    DenseSplit,
    EvalLoader,
    RawBatch,
    Split,
    TrainLoader,
)
from nvae.data.pixels import fit_array, keeps_depth
from nvae.data.places import prepared_folder
from nvae.data.readers.splits import TOO_FEW, plan_splits
from nvae.data.samplers import EvalSampler, Shard, TrainSampler
from nvae.data.store import MANIFEST_NAME, open_store, read_manifest
from nvae.data.transforms import model_input
from nvae.random import STREAM_CONTENT, UNIFORM_BITS, image_keys, uniform_bits

_MIB = 1 << 20
_CPU = torch.device("cpu")
_ALONE = Shard()

_LARGEST_IN_MEMORY = 1 << 31
"""Bytes of a set that is made in memory."""
_CHUNK = 1 << 22
"""Pixels made at a time, of eight bytes each until they are done."""


@dataclass(frozen=True)
class ImageBatch:
    """What the model gets.

    Attributes:
        x: (B, C, H, W) float32 in [0, 1], channels_last in memory.
        index: (B,) int64, the images' indices in their split.
        labels: (B,) int64, the images' class numbers; None unless `data.labels` is true.
    """

    x: Tensor
    index: Tensor
    labels: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> "ImageBatch":
        """Some of the images."""
        labels = None if self.labels is None else self.labels[rows]
        return ImageBatch(self.x[rows], self.index[rows], labels)


class ImageData:
    """A data set: `prepare()`, `setup()`, then its splits, loaders and batches.

    Where a set has no validation images, validation reads the test images, and the other way
    round.

    Args:
        config: the data set.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._splits: dict[str, Split] = {}
        self._on_device: dict[tuple[str, torch.device], DenseSplit] = {}
        self._labels: dict[tuple[str, torch.device], Tensor] = {}
        self._classes: list[str] = []
        self._noted = False

    def prepare(self) -> None:
        """Download and convert what is missing; see `prepare_if_missing`."""
        prepare_if_missing(self.config)

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared form. Every stage of a Trainer needs the same.

        Raises:
            ValueError: It is not prepared, damaged, or not what the config describes.
        """
        del stage
        if not self._splits:
            self._splits, self._classes = _open(self.config)

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of their numbers; empty where no labels were kept."""
        return self._classes

    def check_classes(self, num_classes: int) -> None:
        """Raise a ValueError where a model of so many classes cannot be told these; 0: it is told
        none."""
        if num_classes and len(self._classes) > num_classes:
            raise ValueError(
                f"{self.config.name} has {len(self._classes)} classes, and the model knows "
                f"{num_classes}: model.num_classes={len(self._classes)}, or data.labels=false"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The splits that the set has itself."""
        return tuple(name for name in SPLITS if name in self._splits)

    def resolved(self, name: str) -> str:
        """The split whose images `name` reads."""
        other = {VALID: TEST, TEST: VALID}.get(name, name)
        return name if name in self._splits else other

    def split(self, name: str) -> Split:
        """The images that `train`, `valid` or `test` reads."""
        return self._splits[self.resolved(name)]

    def fingerprint(self) -> dict[str, Any]:
        """What a run's order of images depends on, in plain types.

        Returns:
            `seed` (`data.seed`) and `splits`: for each, its number of `images`, their `sha256` and,
            where `data.labels` is true, that of their `labels`.
        """
        splits = {}
        for name, split in self._splits.items():
            splits[name] = {"images": len(split), "sha256": split.sha256}
            if (labels := self.labels_sha256(name)) is not None:
                splits[name]["labels"] = labels
        return {"seed": self.config.seed, "splits": splits}

    def labels_sha256(self, name: str) -> str | None:
        """SHA-256 of the labels that batches of a split hold; None where they hold none."""
        labels = self.split(name).labels
        if self.config.labels is not True or labels is None:
            return None
        return hashlib.sha256(labels.numpy().tobytes()).hexdigest()

    def _options(self, split: Split, device: torch.device) -> dict[str, Any]:
        config = self.config
        index_only = isinstance(split, DenseSplit) and (
            config.on_device == "always"
            or (config.on_device == "auto" and split.images.nbytes <= config.on_device_limit * _MIB)
        )
        return {
            "seed": config.seed,
            "num_workers": config.num_workers,
            "index_only": index_only,
            "pin_memory": device.type == "cuda",
        }

    def train_sampler(self, shard: Shard = _ALONE) -> TrainSampler:
        """Which training images a process reads, and when.

        Raises:
            ValueError: There are fewer images than devices, or than `data.global_batch`.
        """
        config = self.config
        return TrainSampler.fitting(
            len(self.split(TRAIN)), config.batch_size, config.seed, shard, config.global_batch
        )

    def train_loader(self, shard: Shard = _ALONE, device: torch.device = _CPU) -> TrainLoader:
        """Shuffled, resumable loader of the training images.

        Where there are fewer images than a batch, it is as large as they allow; the first process
        says so, once. A `data.global_batch` is taken as it is.
        """
        split, config = self.split(TRAIN), self.config
        sampler = self.train_sampler(shard)
        if sampler.batch_size != config.batch_size and not self._noted and not shard.rank:
            self._noted = True
            print(
                f"note: there are only {sampler.size} training images; a step takes "
                f"{sampler.global_batch_size} of them, not data.batch_size={config.batch_size} "
                "on each device",
                file=sys.stderr,
            )
        return TrainLoader(sampler, split, TRAIN, **self._options(split, device))

    def eval_loader(
        self,
        name: str,
        shard: Shard = _ALONE,
        device: torch.device = _CPU,
        batch_size: int | None = None,
    ) -> EvalLoader:
        """Every image of a split once, in order: no flip, fixed binarization."""
        name = self.resolved(name)
        split = self._splits[name]
        sampler = EvalSampler(len(split), batch_size or self.config.eval_batch_size, shard)
        return EvalLoader(sampler, split, name, **self._options(split, device))

    def to_input(self, batch: RawBatch) -> ImageBatch:
        """Gather (for sets that live on the device), then flip, quantize, binarize and pad.

        Where `data.labels` is true, the batch holds the images' labels.
        """
        images, index, epoch = batch.images, batch.indices, batch.epoch
        if images is None:
            key = batch.split, index.device
            if key not in self._on_device:
                split = self._splits[batch.split]
                assert isinstance(split, DenseSplit)
                self._on_device[key] = split.to(index.device)
            images = self._on_device[key].gather(index, epoch=epoch, seed=self.config.seed)
        x = model_input(images, index, epoch=epoch, config=self.config)
        labels = self._labels_on(batch.split, index.device) if self.config.labels is True else None
        return ImageBatch(x, index, None if labels is None else labels[index])

    def _labels_on(self, split: str, device: torch.device) -> Tensor:
        """(N,) class numbers of a split, on a device from the first time on."""
        if (split, device) not in self._labels:
            labels = self._splits[split].labels
            assert labels is not None
            self._labels[split, device] = labels.to(device)
        return self._labels[split, device]

    def batches(
        self, split: str, device: torch.device | str = "cpu", shard: Shard = _ALONE
    ) -> Iterator[ImageBatch]:
        """Model inputs of a split, or of a share of it, in order on `device`."""
        for raw in self.eval_loader(split, shard):
            images = None if raw.images is None else raw.images.to(device, non_blocking=True)
            indices = raw.indices.to(device, non_blocking=True)
            yield self.to_input(raw._replace(images=images, indices=indices))

    def some(self, split: str, index: Tensor) -> ImageBatch:
        """The images of a split with these indices, (N,) int64, as `batches` gives them."""
        images = self.split(split).gather(index, epoch=None, seed=self.config.seed)
        return self.to_input(RawBatch(images, index, self.resolved(split), None))


def _open(config: DataConfig) -> tuple[dict[str, Split], list[str]]:
    """The splits that a set has, none of them empty, and the names of their classes."""
    if config.format in IN_MEMORY_FORMATS:
        splits, skipped = make_in_memory(config), {}
        classes = [str(digit) for digit in range(10)] if config.format == "digits" else []
    else:
        folder = prepared_folder(config)
        if not (folder / MANIFEST_NAME).exists():
            raise DataError(
                f"{config.name} is not prepared ({folder} is not there); run: "
                f"{prepare_command(config)}"
            )
        splits = open_store(folder)
        manifest = read_manifest(folder)
        skipped = {name: files.skipped for name, files in manifest.splits.items()}
        classes = manifest.classes
        if manifest.geometry != geometry(config):
            found, wanted = (
                ", ".join(f"{key}={value}" for key, value in values.items())
                for values in (manifest.geometry, geometry(config))
            )
            raise DataError(
                f"{folder} was prepared with {found}, the config says {wanted}: {_again(config)}"
            )
    _check(config, splits, skipped)
    return splits, classes


def _again(config: DataConfig) -> str:
    """What to do where the prepared form is another than the config describes."""
    if prepared_folder(config) == Path(config.root):  # where its source is, nobody says
        return "prepare it again or change the config"
    return f"change the config, or prepare it again: {prepare_command(config)}"


def _check(config: DataConfig, splits: dict[str, Split], skipped: dict[str, int]) -> None:
    """Hold the open splits against the config: shape, sizes and labels."""
    wanted = config.stored_shape
    for name, split in splits.items():
        if config.labels is True and split.labels is None:
            raise DataError(
                f"{config.name} has no labels of its {name} images, and data.labels=true needs "
                "them: prepare it again from a source that has them"
            )
        if split.shape != wanted:
            raise DataError(
                f"the prepared {name} images of {config.name} are "
                f"{'x'.join(map(str, split.shape))}, the config wants "
                f"{'x'.join(map(str, wanted))}: prepare them again or change data.image_size, "
                "data.pad or data.channels"
            )
    for name in SPLITS:
        asked, have = getattr(config, f"{name}_size"), len(splits.get(name, ()))
        if asked is not None and asked != have + skipped.get(name, 0):
            raise DataError(
                f"{config.name} has {have} {name} images, the config says "
                f"data.{name}_size={asked}: {_again(config)}"
            )
    if TRAIN not in splits:
        raise DataError(f"{config.name} has no training images")
    if VALID not in splits and TEST not in splits:
        if config.format not in IN_MEMORY_FORMATS and len(splits[TRAIN]) == 1:
            raise DataError(f"{config.name} has one picture; {TOO_FEW}")
        raise DataError(
            f"{config.name} has neither validation nor test images: set data.valid_size"
        )


def make_in_memory(config: DataConfig) -> dict[str, Split]:
    """The splits of scikit-learn's digits, or of random pixels.

    Raises:
        ValueError: The config asks for what the set does not have.
    """
    images, labels = _digits(config) if config.format == "digits" else (_random(config), None)
    plan = plan_splits({TRAIN: len(images)}, config)
    splits: dict[str, Split] = {}
    for number, split in enumerate(SPLITS):
        is_chosen = torch.from_numpy(plan.destination[TRAIN] == number)
        chosen = images[is_chosen]
        if len(chosen):
            sha256 = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
            splits[split] = DenseSplit(
                chosen, sha256, None if labels is None else labels[is_chosen]
            )
    return splits


def _digits(config: DataConfig) -> tuple[Tensor, Tensor]:
    """The 1797 handwritten digits of scikit-learn, 8x8, levels 0..16 as 0, 16, ..., 240, 255, and
    what they are."""
    from sklearn.datasets import load_digits  # takes a second

    if config.channels not in (1, 3):
        raise ValueError(
            f"data.channels is {config.channels}; the digits are gray: channels=1 or 3"
        )
    if keeps_depth(config):
        raise ValueError(
            "the digits have 17 levels: they take data.bits of at most 8, data.floats=false and no "
            "data.value_range"
        )
    digits = load_digits()
    # Steps of 16, so that the four upper bits tell the levels apart (but for the brightest two).
    images = np.minimum(digits.images * 16, 255).astype(np.uint8)
    fitted = np.stack([fit_array(image[:, :, None], config) for image in images])
    return torch.from_numpy(fitted), torch.from_numpy(digits.target.astype(np.int64))


def _random(config: DataConfig) -> Tensor:
    """Random pixels: as many images as the config's split sizes add up to."""
    if config.train_size is None:
        raise ValueError("data.train_size is not given; random images need their number")
    n = config.train_size + (config.valid_size or 0) + (config.test_size or 0)
    shape, number = config.stored_shape, prod(config.stored_shape)
    if n * number * np.dtype(config.stored_type).itemsize > _LARGEST_IN_MEMORY:
        raise ValueError(
            f"{n} random images of {'x'.join(map(str, shape))} take more than "
            f"{_LARGEST_IN_MEMORY} bytes: set a smaller data.train_size"
        )
    out = np.empty((n, number), config.stored_type)
    chunk = max(1, _CHUNK // number)
    for start in range(0, n, chunk):
        index = torch.arange(start, min(start + chunk, n))
        keys = image_keys(index, seed=config.split_seed, epoch=0, stream=STREAM_CONTENT)
        bits = uniform_bits(keys, number).numpy()
        if config.floats:
            out[start : start + chunk] = bits / np.float32(1 << UNIFORM_BITS)
        else:
            out[start : start + chunk] = bits >> (UNIFORM_BITS - config.stored_bits)
    return torch.from_numpy(out.reshape(n, *shape))
