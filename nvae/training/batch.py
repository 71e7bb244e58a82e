"""A training batch: images as the model takes them, of whatever a loader gives, and their noise."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nvae.data.dataset import ImageBatch
from nvae.models import HierarchicalVAE
from nvae.models.conditioning import NO_LABEL
from nvae.settings import height_width


def images_of(batch: Any, model: HierarchicalVAE, first: int = 0, stride: int = 1) -> ImageBatch:
    """What the model takes: images in [0, 1], their indices, and labels where it knows classes.

    Args:
        batch: on the model's device: an :class:`ImageBatch`, which is given back, a tensor of
            images ``(B, C, H, W)``, or a tuple that begins with one and goes on with labels.
        model: for which they are.
        first: index of the first image, where the batch has none.
        stride: from one image's index to the next one's.

    Raises:
        ValueError: these are no images in [0, 1], or not of this model's shape.
    """
    if isinstance(batch, ImageBatch):
        return batch
    x, *more = batch if isinstance(batch, list | tuple) and batch else [batch]
    config = model.config
    labels = more[0] if config.num_classes and more else None
    if not isinstance(x, Tensor) or x.ndim != 4:
        shown = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        wanted = ", ".join(map(str, config.image_shape))
        raise ValueError(
            f"a batch holds {shown}; expected are images (B, {wanted}) or a tuple that begins "
            "with them"
        )
    config.pixel_distribution.check_data(config, config.bits)
    stored_bits = max(8, config.bits)
    whole = torch.uint8 if stored_bits == 8 else torch.uint16
    # a density is of any number, masses are of levels
    exact = x.is_floating_point() and bool(config.pixel_distribution.density_of)
    if x.dtype == whole or exact:
        values = x.float()
    elif x.is_floating_point():  # a NaN stays one: it makes a bad step, which is left out
        values = (x.float() * (2**stored_bits - 1)).round()
    else:
        name = str(whole).removeprefix("torch.")
        raise ValueError(f"images are {x.dtype}; expected are {name}, or float in [0, 1]")
    if config.counted_size is not None and tuple(x.shape[2:]) == height_width(config.counted_size):
        height, width = config.image_shape[1] - x.shape[2], config.image_shape[2] - x.shape[3]
        values = nn.functional.pad(values, [width // 2, width // 2, height // 2, height // 2])
    if not exact:
        levels = (values / 2 ** (stored_bits - config.bits)).floor()
        # a tensor, not a number: CUDA multiplies by a number's reciprocal, which rounds otherwise
        values = levels / torch.full((), 2.0**config.bits - 1, device=x.device)
    index = first + stride * torch.arange(len(x), device=x.device)
    return ImageBatch(values.to(model.dtype, memory_format=torch.channels_last), index, labels)


class TrainingNoise:
    """Posterior noise of training batches, a pure function of (seed, rank, batch).

    No generator state has to be saved: a resumed run draws what the uninterrupted one would have
    drawn, and ranks never share a draw.

    Args:
        seed: of the run.
        rank: of this process.
    """

    def __init__(self, seed: int, rank: int = 0) -> None:
        self.seed, self.rank = seed, rank
        self._generator: torch.Generator | None = None

    def __call__(self, model: HierarchicalVAE, batch_size: int, batch: int) -> Sequence[Tensor]:
        """Noise of batch number ``batch`` (counted over the whole run), one tensor a group."""
        device = model.device
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device)
        key = np.random.SeedSequence((self.seed, self.rank, batch)).generate_state(1, np.uint64)
        self._generator.manual_seed(int(key[0] >> np.uint64(1)))
        return model.draw_noise(batch_size, self._generator)

    def further(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the same batch that nothing else has used."""
        return torch.randn(
            like.shape, generator=self._generator, device=like.device, dtype=like.dtype
        )

    def drop(self, labels: Tensor, share: float) -> Tensor:
        """``labels`` ``(B,)`` of the same batch, each forgotten with probability ``share``."""
        chance = torch.rand(labels.shape, generator=self._generator, device=labels.device)
        return labels.masked_fill(chance < share, NO_LABEL)
