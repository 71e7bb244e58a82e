"""The one place where data meets Lightning."""

import pytorch_lightning as pl
import torch

from nvae.data.config import TEST, TRAIN, VALID, DataConfig
from nvae.data.dataset import ImageBatch, ImageData
from nvae.data.loader import EvalLoader, RawBatch, TrainLoader
from nvae.data.samplers import Shard


class ImageDataModule(ImageData, pl.LightningDataModule):
    """A data set for a Trainer: every process reads its share, on its own device.

    Args:
        config: the data set.
    """

    def __init__(self, config: DataConfig) -> None:
        pl.LightningDataModule.__init__(self)
        ImageData.__init__(self, config)

    def prepare_data(self) -> None:
        """Download and convert what is missing; one process of a machine does it."""
        self.prepare()

    def _process(self) -> tuple[Shard, torch.device]:
        trainer = self.trainer
        if trainer is None:
            return Shard(), torch.device("cpu")
        return Shard(trainer.global_rank, trainer.world_size), trainer.strategy.root_device

    def train_dataloader(self) -> TrainLoader | EvalLoader:
        """Shuffled, resumable loader of the training images.

        With `Trainer(overfit_batches=...)` it is neither: the same batches at every epoch.
        """
        # The attribute is set by the Trainer's constructor, but not declared.
        if getattr(self.trainer, "overfit_batches", 0) > 0:
            return self.eval_loader(TRAIN, *self._process(), self.config.batch_size)
        return self.train_loader(*self._process())

    def val_dataloader(self) -> EvalLoader:
        """Every validation image once."""
        return self.eval_dataloader(VALID)

    def test_dataloader(self) -> EvalLoader:
        """Every test image once."""
        return self.eval_dataloader(TEST)

    def eval_dataloader(self, split: str) -> EvalLoader:
        """Every image of a split once, in order: no flip, fixed binarization."""
        return self.eval_loader(split, *self._process())

    def on_after_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> ImageBatch:
        """Lightning's hook: uint8 on the device -> model input."""
        del dataloader_idx
        return self.to_input(batch)
