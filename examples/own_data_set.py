"""A data set of one's own: any torch Dataset of images, with or without labels.

    python examples/own_data_set.py

Images are uint8 or float in [0, 1], ``(C, H, W)``; the module keeps the upper ``bits`` of them. A
folder of pictures needs no code at all: ``python train.py data=folder data.root=PICTURES``.
"""

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nvae.models import NVAE, ModelConfig
from nvae.training.module import NVAELightning


class Stripes(Dataset[tuple[Tensor, int]]):
    """Stripes of every width and direction, made when asked for."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        width, direction = 1 + index % 4, index // 4 % 4
        along = (x, y, x + y, x - y)[direction]
        return ((along // width % 2) * 255).to(torch.uint8)[None], direction


if __name__ == "__main__":
    model = NVAE(
        ModelConfig(
            image_size=16, bits=1, num_scales=2, groups_per_scale=2, preprocess_blocks=1,
            encoder_channels=8, decoder_channels=8, latent_channels=2,
        )
    )  # fmt: skip
    trainer = pl.Trainer(max_steps=4, logger=False, enable_checkpointing=False)
    loader = DataLoader(Stripes(), batch_size=16, shuffle=True)
    trainer.fit(NVAELightning(model, optimizer={"warmup_epochs": 1}), loader)
    print("samples", tuple(model.eval().sample(4).shape))
