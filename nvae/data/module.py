"""The one place where data meets Lightning."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from nvae.data.config import DataConfig
from nvae.data.loader import EvalLoader, RawBatch, TrainLoader, pin_memory_for
from nvae.data.sampler import EvalSampler, Shard, TrainSampler
from nvae.data.sources import open_tables, prepare_if_missing
from nvae.data.tables import TEST, TRAIN, VALID, DenseTable, ImageTable
from nvae.data.transforms import InputTransform

_MIB = 1 << 20


@dataclass(frozen=True)
class ImageBatch:
    """What the model gets.

    Attributes:
        x: (B, C, H, W) float32 in [0, 1], channels_last in memory.
        index: (B,) int64, the images' indices in their split.
    """

    x: Tensor
    index: Tensor


class ImageDataModule(pl.LightningDataModule):
    """Data set -> uint8 batches -> model input on the device.

    Works with a Trainer, and without one: `prepare_data()`, `setup()`, then `batches(...)`.
    Where a set has no validation images, validation reads the test images, and the other way
    round.

    Args:
        config: the data set.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.config = config
        self._transform = InputTransform.from_config(config)
        self._tables: dict[str, ImageTable] = {}
        self._device_tables: dict[tuple[str, torch.device], DenseTable] = {}
        self._noted = False

    def prepare_data(self) -> None:
        """Download and convert what is missing; one process of a machine does it."""
        prepare_if_missing(self.config)

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared form; every stage needs the same."""
        del stage
        if not self._tables:
            self._tables = open_tables(self.config)

    def table(self, split: str) -> ImageTable:
        """The images that `split` reads."""
        return self._tables[self._resolve(split)]

    def _resolve(self, split: str) -> str:
        other = {VALID: TEST, TEST: VALID}.get(split, split)
        return split if split in self._tables else other

    def fingerprint(self) -> dict[str, Any]:
        """What a run's order of images depends on, in plain types; call `setup()` first.

        Returns:
            `seed` (`data.seed`) and `splits`: for each, its number of `images` and their `sha256`.
        """
        splits = {
            name: {"images": len(table), "sha256": table.sha256}
            for name, table in self._tables.items()
        }
        return {"seed": self.config.seed, "splits": splits}

    @property
    def _shard(self) -> Shard:
        if self.trainer is None:
            return Shard()
        return Shard(self.trainer.global_rank, self.trainer.world_size)

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _on_device(self, table: ImageTable) -> bool:
        if not isinstance(table, DenseTable) or self.config.on_device == "never":
            return False
        if self.config.on_device == "always":
            return True
        return table.images.numel() <= self.config.on_device_limit * _MIB

    def _options(self, table: ImageTable) -> dict[str, Any]:
        return {
            "seed": self.config.seed,
            "num_workers": self.config.num_workers,
            "index_only": self._on_device(table),
            "pin_memory": pin_memory_for(self._device),
        }

    def train_dataloader(self) -> TrainLoader | EvalLoader:
        """Shuffled, resumable loader of the training images.

        Where there are fewer images than a batch, it is as large as they allow.

        With `Trainer(overfit_batches=...)` it is neither: the same batches at every epoch.
        """
        table = self.table(TRAIN)
        config = self.config
        # The attribute is set by the Trainer's constructor, but not declared.
        if getattr(self.trainer, "overfit_batches", 0) > 0:
            return self._eval_loader(TRAIN, config.batch_size)
        sampler = TrainSampler.fitting(len(table), config.batch_size, config.seed, self._shard)
        self._note_smaller_batch(sampler)
        return TrainLoader(sampler, table, TRAIN, **self._options(table))

    def _note_smaller_batch(self, sampler: TrainSampler) -> None:
        """Say once, in the first process, that there are fewer images than a step was to take."""
        if sampler.batch_size == self.config.batch_size or self._noted or sampler.shard.rank:
            return
        self._noted = True
        print(
            f"note: there are only {sampler.size} training images; a step takes "
            f"{sampler.global_batch_size} of them, not data.batch_size={self.config.batch_size} "
            "on each device",
            file=sys.stderr,
        )

    def _eval_loader(self, split: str, batch_size: int | None = None) -> EvalLoader:
        name = self._resolve(split)
        table = self._tables[name]
        batch_size = batch_size or self.config.eval_batch_size
        sampler = EvalSampler(len(table), batch_size, self._shard)
        return EvalLoader(sampler, table, name, **self._options(table))

    def val_dataloader(self) -> EvalLoader:
        """Every validation image once."""
        return self.eval_dataloader(VALID)

    def test_dataloader(self) -> EvalLoader:
        """Every test image once."""
        return self.eval_dataloader(TEST)

    def eval_dataloader(self, split: str) -> EvalLoader:
        """Every image of a split once, in order: no flip, fixed binarisation."""
        return self._eval_loader(split)

    def on_after_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> ImageBatch:
        """Lightning's hook: uint8 on the device -> model input."""
        del dataloader_idx
        return self.to_input(batch)

    def to_input(self, batch: RawBatch) -> ImageBatch:
        """Gather (for sets that live on the device), then flip, quantise, binarise and pad."""
        images = batch.images
        if images is None:
            table = self._device_table(batch.split, batch.indices.device)
            images = table.gather(batch.indices, epoch=batch.epoch, seed=self.config.seed)
        return ImageBatch(self._transform(images, batch.indices, epoch=batch.epoch), batch.indices)

    def _device_table(self, split: str, device: torch.device) -> DenseTable:
        key = split, device
        if key not in self._device_tables:
            table = self._tables[split]
            assert isinstance(table, DenseTable)
            self._device_tables[key] = table.to(device)
        return self._device_tables[key]

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[ImageBatch]:
        """Model inputs of a split in order on `device`: evaluation without a Trainer."""
        for raw in self.eval_dataloader(split):
            images = None if raw.images is None else raw.images.to(device, non_blocking=True)
            indices = raw.indices.to(device, non_blocking=True)
            yield self.to_input(raw._replace(images=images, indices=indices))
