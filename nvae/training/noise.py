"""Training noise as a pure function of (seed, rank, batch).

No generator state has to be saved: a resumed run draws what the uninterrupted one would have
drawn, and ranks never share a draw.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nvae.models import HierarchicalVAE


class TrainingNoise:
    """Draws the posterior noise of training batches.

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
